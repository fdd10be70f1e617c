/**
 * Runs fuzz targets in a process of its own, which scripts/fuzz.ts watches: guard pages around every mapping; what runs now is in
 * a file before it runs; descriptors, mappings and memory are counted before and after.
 *
 *     deno run -A tests/fuzz/main.ts PROGRESS_FILE TARGET SEED FIRST_ROUND ROUND_DONE COUNT
 *
 * @module
 */
import { collected } from "../support/leak_net.ts";
import "../support/guard_pages.ts";
import { TARGETS } from "./targets.ts";
import { Random } from "./random.ts";
import type { Outcome } from "./target.ts";

/** Inputs that showed something new, at most so many. */
const POOL = 400;
/** Rounds until everything that is made once has been made. */
const WARM = 12;
/** The runtime opens a pair of sockets at some time of its own; what leaks does so again and again. */
const SPARE_FDS = 2;
/** Growth that is noise, bytes: of the process (it levels off at 50 to 100 MiB), and of the heap, which the pool is part of. */
const GROWTH = 192 << 20;
const HEAP_GROWTH = 32 << 20;

/** A file that the watcher reads at any time. */
class Progress {
  readonly #path: string;
  #state: object = {};
  #step = 0;

  constructor(path: string) {
    this.#path = path;
  }

  write(state: object): void {
    this.#state = state;
    this.#step = 0;
    Deno.writeTextFileSync(this.#path, JSON.stringify(state));
  }

  step(): void {
    Deno.writeTextFileSync(this.#path, JSON.stringify({ ...this.#state, step: ++this.#step }));
  }
}

interface Load {
  fds: number;
  /** What the descriptors are. */
  files: string[];
  maps: number;
  rss: number;
  heap: number;
}

async function load(): Promise<Load> {
  // What was let go is collected first.
  for (let i = 0; i < 3; i++) {
    (globalThis as { gc?: () => void }).gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const files = [...Deno.readDirSync("/proc/self/fd")].map(({ name }) => {
    try {
      return Deno.readLinkSync(`/proc/self/fd/${name}`).replaceAll(/\d+/g, "#");
    } catch {
      return "gone";
    }
  });
  return {
    fds: files.length,
    files: files.sort(),
    maps: Deno.readTextFileSync("/proc/self/maps").split("\n").filter((line) => /memfd|---s/.test(line)).length,
    rss: Deno.memoryUsage().rss,
    heap: Deno.memoryUsage().heapUsed,
  };
}

function more(before: readonly string[], after: readonly string[]): string[] {
  const rest = [...before];
  return after.filter((file) => {
    const at = rest.indexOf(file);
    if (at >= 0) rest.splice(at, 1);
    return at < 0;
  });
}

function corpusPath(target: string): string {
  return new URL(`./corpus/${target}.json`, import.meta.url).pathname;
}

/** Inputs that were kept. */
function corpus(target: string): unknown[] {
  try {
    return JSON.parse(Deno.readTextFileSync(corpusPath(target)));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
}

async function main([path, name, seedText, roundText, doneText, countText]: string[]): Promise<void> {
  const target = TARGETS[name!]!;
  const [seed, count] = [Number(seedText), Number(countText)];
  let [round, done] = [Number(roundText), Number(doneText)];
  const progress = new Progress(path!);
  const session = await target.open();
  const pool = corpus(name!);
  const kept = pool.length;
  const seen = new Set<string>();
  const attempt = async (input: unknown): Promise<Outcome> => {
    const outcome = await session.run(input, () => progress.step());
    const fresh = outcome.signs.filter((sign) => !seen.has(sign));
    for (const sign of fresh) seen.add(sign);
    if (fresh.length > 0 && !pool.includes(input)) {
      if (pool.length >= POOL) pool.splice(kept + (round % Math.max(1, POOL - kept)), 1);
      pool.push(input);
    }
    return outcome;
  };
  for (const [index, input] of pool.slice().entries()) {
    progress.write({ seed, round: -1 - index, done, input });
    await attempt(input);
  }
  let before: Load | undefined;
  const first = round;
  while (done < count) {
    const input = session.generate(new Random(seed, round), pool);
    progress.write({ seed, round, done, input });
    done += (await attempt(input)).count;
    round++;
    if (round - first === WARM) before = await load();
  }
  const after = await load();
  await session[Symbol.asyncDispose]();
  before ??= after;
  const grown = {
    fds: after.fds - before.fds,
    maps: after.maps - before.maps,
    bytes: after.rss - before.rss,
    heap: after.heap - before.heap,
  };
  progress.write({ seed, round, done, signs: [...seen].sort(), grown });
  if (collected.length > 0) throw new Error(`${collected.length} descriptors were never closed: ${collected.slice(0, 5).join("\n")}`);
  if (grown.fds > SPARE_FDS) {
    throw new Error(`${grown.fds} descriptors more than after ${WARM} rounds: ${more(before.files, after.files).join(", ")}`);
  }
  if (grown.maps > 0) throw new Error(`${grown.maps} mappings more than after ${WARM} rounds`);
  if (grown.bytes > GROWTH) throw new Error(`${grown.bytes} bytes of memory more than after ${WARM} rounds`);
  if (grown.heap > HEAP_GROWTH) throw new Error(`The heap has grown by ${grown.heap} bytes after ${WARM} rounds`);
  if (Deno.env.get("SVQ_FUZZ_KEEP") !== undefined) keep(name!, pool);
}

// A small corpus: what is short, and enough of it.
function keep(name: string, pool: readonly unknown[]): void {
  const texts = pool.map((input) => JSON.stringify(input)).filter((text) => text.length < 6000);
  const chosen = texts.filter((_, index) => index % Math.ceil(texts.length / 24) === 0);
  Deno.writeTextFileSync(corpusPath(name), `[\n${chosen.join(",\n")}\n]\n`);
}

await main(Deno.args);
Deno.exit(0);
