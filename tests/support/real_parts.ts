/**
 * Tests that need real parts: registered as skipped, with the reason in the name, where a part cannot be had.
 *
 * @module
 */
import { ensurePart, type PartName } from "../../scripts/lab/host.ts";
import { TempDir } from "./temp.ts";

/** What a test may ask for: parts of the lab, or `root` for privileges. */
export type Need = PartName | "root";

/** What a lab test is given. */
export interface LabContext {
  /** Removed at the end of the test. */
  folder: TempDir;
  step: Deno.TestContext["step"];
}

async function missing(needs: readonly Need[]): Promise<string | undefined> {
  if (needs.includes("root") && Deno.uid() !== 0) return "root";
  for (const need of needs) {
    if (need === "root") continue;
    const state = await ensurePart(need);
    if (!state.ok) return `${need}: ${state.reason}`;
  }
  return undefined;
}

/** Set by `deno task soak`: full counts. */
export const SOAKING = Deno.env.get("SVQ_SOAK") === "1";

/**
 * Registers a test with real parts; await it at the top level of the test file, so that a skip is known by name.
 */
export async function labTest(
  name: string,
  needs: readonly Need[],
  fn: (context: LabContext) => Promise<void>,
): Promise<void> {
  const reason = await missing(needs);
  if (reason !== undefined) {
    Deno.test({ name: `${name} (left out, needs ${reason})`, ignore: true, fn: () => {} });
    return;
  }
  Deno.test(name, async (t) => {
    using folder = new TempDir();
    await fn({ folder, step: t.step.bind(t) });
  });
}
