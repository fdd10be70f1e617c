/** Builds of the WebAssembly core with the loops of litmus_test.ts inside, so that two threads meet within nanoseconds. */
import { buildRelayCore } from "../../scripts/build_wasm.ts";

const FOLDER = "src/wasm/assembly";

// Each thread stores its own round and waits for the other's; words lie in cache lines of their own.
const LOOPS = `
import * as N from "./notify";

const OTHER: u32 = 64;
const ANSWER: u32 = 128;
const STOP: u32 = 192;

function meet(at: u32, mine: u32, round: u32): bool {
  atomic.store<u32>(at + mine, round);
  while (atomic.load<u32>(at + (OTHER - mine)) < round) if (atomic.load<u32>(at + STOP) != 0) return false;
  return true;
}

function linger(at: u32, turns: u32): void {
  for (let i: u32 = 0; i < turns; i++) atomic.load<u32>(at + STOP);
}

/** Asks for notifications in every round, and counts those in which nobody would wake it. */
export function sleeper(q: Queue, calls: u32, at: u32, from: u32, to: u32): u32 {
  let forbidden: u32 = 0;
  for (let round = from; round < to; round++) {
    if (calls) N.disableCalls(q);
    else N.disableKicks(q);
    if (!meet(at, 0, round * 2 - 1)) break;
    linger(at, round % 61);
    const saw = calls ? N.enableCalls(q) : N.enableKicks(q);
    if (!meet(at, 0, round * 2)) break;
    if (saw == 0 && atomic.load<u32>(at + ANSWER) == 0) forbidden++;
    if (calls) {
      q.devicePublished = (q.devicePublished + 1) & 0xffff;
      q.deviceUsedNext = (q.deviceUsedNext + 1) & 0xffff;
    } else if (!q.guestPacked) {
      q.guestNext = (q.guestNext + 1) & 0xffff;
    } else if (++q.guestNext == q.guestNum) {
      q.guestNext = 0;
      q.guestSeen ^= 1;
    }
  }
  return forbidden;
}

/** Publishes one chain in every round, and says whether it notifies. */
export function publisher(q: Queue, calls: u32, at: u32, rounds: u32): void {
  for (let round: u32 = 1; round <= rounds; round++) {
    const packed = q.deviceKind == S.KIND_PACKED;
    if (calls) q.guestUsedNext = (q.guestUsedNext + 1) & 0xffff;
    else if (!packed) q.deviceNext = (q.deviceNext + 1) & 0xffff;
    else {
      q.batchSlot = <i32>((round - 1) % q.deviceNum);
      q.batchFlags = ((round - 1) / q.deviceNum & 1) == 0 ? S.PACKED_AVAIL : S.PACKED_USED;
      q.batchSlots = 1;
    }
    if (!meet(at, OTHER, round * 2 - 1)) break;
    linger(at, round % 53);
    const wanted = calls ? N.flush(q, 1) : N.publish(q);
    atomic.store<u32>(at + ANSWER, wanted != 0 ? 1 : 0);
    if (!meet(at, OTHER, round * 2)) break;
  }
}

/** Marks every second page of a word in every round; the first thread counts the words that lack a bit. */
export function marker(e: Env, second: u32, at: u32, from: u32, to: u32): u32 {
  let lost: u32 = 0;
  for (let round = from; round < to; round++) {
    if (!second) atomic.store<u32>(e.log, 0);
    if (!meet(at, second ? OTHER : 0, round * 2 - 1)) break;
    for (let page = second; page < 32; page += 2) mark(e, page << 12, 1);
    if (!meet(at, second ? OTHER : 0, round * 2)) break;
    if (!second && atomic.load<u32>(e.log) != <u32>-1) lost++;
  }
  return lost;
}
`;

// What the core must not do: store and or without order.
const PLAIN_STORES = `
export function store8(at: u32, value: u32): void { store<u8>(at, <u8>value); }
export function store16(at: u32, value: u32): void { store<u16>(at, <u16>value); }
export function store32(at: u32, value: u32): void { store<u32>(at, value); }
`;

async function source(name: string): Promise<string> {
  return await Deno.readTextFile(new URL(`../../${FOLDER}/${name}`, import.meta.url));
}

/** The core as it is, or broken on purpose, with the loops. */
export async function buildLitmus(broken: boolean): Promise<WebAssembly.Module> {
  const replaced: Record<string, string> = { [`${FOLDER}/index.ts`]: await source("index.ts") + LOOPS };
  if (broken) {
    const memory = await source("memory.ts");
    const plain = memory.replaceAll("atomic.or<u32>(word, bits)", "store<u32>(word, load<u32>(word) | bits)");
    if (plain === memory) throw new Error("memory.ts has no atomic or that could be broken");
    replaced[`${FOLDER}/memory.ts`] = plain;
    replaced[`${FOLDER}/ordered.ts`] = PLAIN_STORES;
  }
  return new WebAssembly.Module(await buildRelayCore(replaced));
}
