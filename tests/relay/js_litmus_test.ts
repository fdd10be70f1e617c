import assert from "node:assert/strict";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { type JsLitmus, PART, prepare } from "./js_litmus_thread.ts";

// What litmus_test.ts does with the WebAssembly core, with the JavaScript core: its fast path and the rings of its general one.
// The core broken on purpose has plain stores and a plain or in place of those of Atomics.

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const ROUNDS = SOAK ? 1_000_000 : 50_000;
/** 2^30 marks are 2^25 words. */
const WORDS = SOAK ? 2 ** 25 : 20_000;
/** The default run stops at this time, wherever it is: threads that wait for each other are slow on a busy machine. */
const PATIENCE_MS = SOAK ? Infinity : 300;
const CHUNK = 100;

/** Runs until `enough` wrong outcomes were seen. @returns how many were, in how many rounds */
async function run(
  litmus: Omit<JsLitmus, "memory">,
  enough = Infinity,
  patienceMs = PATIENCE_MS,
): Promise<{ wrong: number; rounds: number }> {
  using fd = createMemfd("svq-test-litmus", 3 * PART);
  using memory = mapFd(fd.fd, { length: 3 * PART });
  const task: JsLitmus = { ...litmus, memory: memory.address };
  const worker = new Worker(new URL("./js_litmus_thread.ts", import.meta.url), { type: "module" });
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
    Atomics.store(new Int32Array(memory.buffer(2 * PART, PART)), 48, 1);
    await done;
    return { wrong, rounds: round - 1 };
  } finally {
    worker.terminate();
  }
}

const HANDSHAKES: [JsLitmus["ring"], "kicks" | "calls", boolean][] = [
  ["fast", "kicks", false],
  ["fast", "calls", false],
  ["fast", "kicks", true],
  ["fast", "calls", true],
  ["split", "kicks", true],
  ["split", "kicks", false],
  ["split", "calls", false],
  ["split", "calls", true],
  ["packed", "kicks", false],
  ["packed", "calls", true],
];
const name = ([ring, what, eventIdx]: (typeof HANDSHAKES)[number]) => `${what}, ${ring}, ${eventIdx ? "EVENT_IDX" : "flags"}`;

for (const handshake of SOAK ? HANDSHAKES : HANDSHAKES.filter((_, i) => i % 4 === 0)) {
  const [ring, what, eventIdx] = handshake;
  Deno.test(`no thread of the JavaScript core goes to sleep unseen: ${name(handshake)}`, async () => {
    const { wrong } = await run({ ring, what, eventIdx, broken: false, rounds: ROUNDS });
    assert.equal(wrong, 0);
  });
}

Deno.test("of two threads that mark pages of one word of the log in JavaScript at the same time, neither loses a mark", async () => {
  const { wrong } = await run({ ring: "fast", what: "marks", eventIdx: false, broken: false, rounds: WORDS });
  assert.equal(wrong, 0);
});

async function shows(litmus: Pick<JsLitmus, "ring" | "what" | "eventIdx">): Promise<void> {
  const { wrong, rounds } = await run({ ...litmus, broken: true, rounds: 2 ** 25 }, 1, 10_000);
  assert.ok(wrong > 0, `${rounds} rounds without a wrong outcome`);
}

const ignore = navigator.hardwareConcurrency < 2;

for (const handshake of SOAK ? HANDSHAKES : HANDSHAKES.slice(0, 1)) {
  const [ring, what, eventIdx] = handshake;
  Deno.test({
    name: `plain stores in the JavaScript core are found out: ${name(handshake)}`,
    ignore,
    fn: () => shows({ ring, what, eventIdx }),
  });
}

Deno.test({
  name: "marking with a plain or in JavaScript is found out",
  ignore,
  fn: () => shows({ ring: "fast", what: "marks", eventIdx: false }),
});
