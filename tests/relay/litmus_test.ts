import assert from "node:assert/strict";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { buildLitmus } from "./litmus_build.ts";
import { type Litmus, prepare } from "./litmus_thread.ts";

// Two threads of the WebAssembly core against each other on real processors: the handshake before a side goes to sleep (store
// what asks for notifications, then look at the ring; store an index, then look whether a notification is asked for), and marks
// in one word of a dirty log. A core broken on purpose, with plain accesses, shows that the loops would find it.

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const ROUNDS = SOAK ? 1_000_000 : 100_000;
/** 2^30 marks are 2^25 words. */
const WORDS = SOAK ? 2 ** 25 : 50_000;
/** The default run stops at this time, wherever it is: threads that wait for each other are slow on a busy machine. */
const PATIENCE_MS = SOAK ? Infinity : 500;
const CHUNK = 1000;

const sound = await buildLitmus(false);
const broken = await buildLitmus(true);

/** Runs until `enough` wrong outcomes were seen. @returns how many were, in how many rounds */
async function run(
  litmus: Omit<Litmus, "ring" | "meeting">,
  enough = Infinity,
  patienceMs = PATIENCE_MS,
): Promise<{ wrong: number; rounds: number }> {
  using fd = createMemfd("svq-test-litmus", 8192);
  using memory = mapFd(fd.fd, { length: 8192 });
  const task: Litmus = { ...litmus, ring: memory.address, meeting: memory.address + 4096 };
  const worker = new Worker(new URL("./litmus_thread.ts", import.meta.url), { type: "module" });
  const next = (): Promise<unknown> =>
    new Promise((resolve, reject) => {
      worker.onmessage = resolve;
      worker.onerror = (event) => {
        event.preventDefault();
        reject(new Error(event.message));
      };
    });
  try {
    worker.postMessage(task);
    const work = prepare(task, true);
    await next();
    const done = next();
    let [wrong, round] = [0, 1];
    const end = performance.now() + patienceMs;
    for (; round <= task.rounds && wrong < enough && performance.now() < end; round += CHUNK) wrong += work(round, round + CHUNK);
    Atomics.store(new Int32Array(memory.buffer(4096, 4096)), 192 / 4, 1);
    await done;
    return { wrong, rounds: round - 1 };
  } finally {
    worker.terminate();
  }
}

const HANDSHAKES = [
  ["kicks", false, false, "kicks of a split ring, by flags"],
  ["kicks", false, true, "kicks of a split ring, by EVENT_IDX"],
  ["kicks", true, false, "kicks of a packed ring"],
  ["calls", false, false, "calls of a split ring, by flags"],
  ["calls", false, true, "calls of a split ring, by EVENT_IDX"],
] as const;

// Each way to ask once in the default run.
for (const [what, packed, eventIdx, name] of SOAK ? HANDSHAKES : HANDSHAKES.filter((_, i) => i % 2 === 0)) {
  Deno.test(`no thread of the WebAssembly core goes to sleep unseen: ${name}`, async () => {
    const { wrong } = await run({ module: sound, what, packed, eventIdx, rounds: ROUNDS });
    assert.equal(wrong, 0);
  });
}

Deno.test("of two threads that mark pages of one word of the log at the same time, neither loses a mark", async () => {
  const { wrong } = await run({ module: sound, what: "marks", packed: false, eventIdx: false, rounds: WORDS });
  assert.equal(wrong, 0);
});

// A tenth of all rounds go wrong, where the threads really run at the same time.
async function shows(litmus: Pick<Litmus, "what" | "packed" | "eventIdx">): Promise<void> {
  const { wrong, rounds } = await run({ ...litmus, module: broken, rounds: 2 ** 25 }, 1, 10_000);
  assert.ok(wrong > 0, `${rounds} rounds without a wrong outcome`);
}

const ignore = navigator.hardwareConcurrency < 2;

for (const [what, packed, eventIdx, name] of SOAK ? HANDSHAKES : HANDSHAKES.slice(0, 1)) {
  Deno.test({ name: `a core with plain stores is found out: ${name}`, ignore, fn: () => shows({ what, packed, eventIdx }) });
}

Deno.test({
  name: "a core that marks with a plain or is found out",
  ignore,
  fn: () => shows({ what: "marks", packed: false, eventIdx: false }),
});
