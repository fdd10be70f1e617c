/** What one JUnit report counts, and which tests it names as skipped or failed. */
export interface JunitCounts {
  passed: number;
  failed: number;
  skipped: number;
  passedNames: string[];
  skippedNames: string[];
  failedNames: string[];
  /** What each of `failedNames` failed with: message and stack. */
  reasons: string[];
}

const ENTITIES: Record<string, string> = { lt: "<", gt: ">", amp: "&", quot: '"', apos: "'" };

function unescape(text: string): string {
  return text.replace(/&(?:#(\d+)|#x([0-9a-fA-F]+)|(\w+));/g, (whole, decimal, hex, name) => {
    if (decimal !== undefined) return String.fromCodePoint(Number(decimal));
    if (hex !== undefined) return String.fromCodePoint(Number.parseInt(hex, 16));
    return ENTITIES[name] ?? whole;
  });
}

/** Reads the report that `deno test --junit-path` writes: one `testcase` element per test, empty when it passed. */
export function parseJunit(xml: string): JunitCounts {
  const counts: JunitCounts = { passed: 0, failed: 0, skipped: 0, passedNames: [], skippedNames: [], failedNames: [], reasons: [] };
  for (const match of xml.matchAll(/<testcase\b([^>]*?)(?:\/>|>([\s\S]*?)<\/testcase>)/g)) {
    const [, attributes = "", body = ""] = match;
    const name = unescape(/\bname="([^"]*)"/.exec(attributes)?.[1] ?? "?");
    if (/<skipped\b/.test(body)) {
      counts.skipped++;
      counts.skippedNames.push(name);
    } else if (/<(?:failure|error)\b/.test(body)) {
      counts.failed++;
      counts.failedNames.push(name);
      counts.reasons.push(unescape(/<(?:failure|error)\b[^>]*>([\s\S]*?)<\/(?:failure|error)>/.exec(body)?.[1] ?? ""));
    } else {
      counts.passed++;
      counts.passedNames.push(name);
    }
  }
  return counts;
}
