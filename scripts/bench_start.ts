/**
 * How long the executable takes to say its version, against an empty program under the same deno: medians of runs that take
 * turns, so that what else the machine does falls on both.
 *
 *     deno task bench:start [--runs=N] [FILE]
 *
 * @module
 */
const ROOT = new URL("..", import.meta.url).pathname;

interface Times {
  name: string;
  words: string[];
  wallMs: number[];
}

async function once({ words, wallMs }: Times): Promise<void> {
  const started = performance.now();
  const { success } = await new Deno.Command(words[0]!, { args: words.slice(1), stdin: "null", stdout: "null", stderr: "null" }).output();
  wallMs.push(performance.now() - started);
  if (!success) throw new Error(`${words.join(" ")} failed`);
}

function quantile(values: readonly number[], part: number): number {
  return [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) * part)]!;
}

async function main(args: string[]): Promise<void> {
  const runs = Number(args.find((arg) => arg.startsWith("--runs="))?.slice("--runs=".length) ?? 41);
  const file = args.find((arg) => !arg.startsWith("--")) ?? `${ROOT}dist/svq`;
  const empty = await Deno.makeTempFile({ prefix: "svq-empty-", suffix: ".js" });
  try {
    const contenders: Times[] = [
      { name: "empty program", words: [Deno.execPath(), "run", empty], wallMs: [] },
      { name: "svq version", words: [file, "version"], wallMs: [] },
    ];
    for (const contender of contenders) await once({ ...contender, wallMs: [] });
    for (let i = 0; i < runs; i++) for (const contender of contenders) await once(contender);
    for (const { name, wallMs } of contenders) {
      console.log(`${name.padEnd(14)}  median ${quantile(wallMs, 0.5).toFixed(1)} ms, p10 ${quantile(wallMs, 0.1).toFixed(1)} ms`);
    }
    const ratio = (part: number) => (quantile(contenders[1]!.wallMs, part) / quantile(contenders[0]!.wallMs, part)).toFixed(2);
    console.log(`ratio           ${ratio(0.5)} of the medians, ${ratio(0.1)} of the p10 (goal: at most 1.5)`);
  } finally {
    await Deno.remove(empty);
  }
}

if (import.meta.main) await main(Deno.args);
