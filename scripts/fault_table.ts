/**
 * Has every fault happen at every step of a migration, and writes what came of it into docs/migration-faults.md:
 *
 *     deno run -A scripts/fault_table.ts [--check] [--kind=cut,stall,...]
 *
 * With --check nothing is written. Exit 1 where something else came of it than what is promised (tests/support/faults.ts).
 *
 * @module
 */
import { frameName } from "../src/migration/protocol.ts";
import { faultTable, type Kind, KINDS, promised, STEPS, strike, type Whereabouts } from "../tests/support/faults.ts";

const FILE = new URL("../docs/migration-faults.md", import.meta.url);
const chosen = Deno.args.find((arg) => arg.startsWith("--kind="))?.slice("--kind=".length).split(",") ?? Object.keys(KINDS);
const seen = new Map<string, Whereabouts>();
let wrong = 0;
for (const kind of chosen as Kind[]) {
  for (const step of STEPS) {
    const wanted = promised(kind, step);
    if (wanted === undefined) continue;
    const place = `${KINDS[kind]} at ${frameName(step[1])} of the ${step[0]}`;
    try {
      const found = await strike(kind, step);
      seen.set(`${kind} ${step}`, found);
      console.log(`${place}: ${found}`);
      if (found === wanted) continue;
      console.error(`  promised is: ${wanted}`);
    } catch (error) {
      console.error(`${place}: ${(error as Error).stack}`);
    }
    wrong++;
  }
}
console.log(`${seen.size} cases, ${wrong} not as promised`);
if (wrong === 0 && chosen.length === Object.keys(KINDS).length && !Deno.args.includes("--check")) {
  const text = await Deno.readTextFile(FILE);
  const table = faultTable((kind, step) => seen.get(`${kind} ${step}`)) + "\n";
  await Deno.writeTextFile(FILE, text.replace(/^\| frame [^]*?\n(?!\|)/m, table));
}
Deno.exit(wrong === 0 ? 0 : 1);
