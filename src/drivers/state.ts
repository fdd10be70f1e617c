/**
 * The state of an embedded driver as it travels to another host: what the guest's processor and its program know. The
 * contents of the RAM travel apart.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { RamOptions } from "./layout.ts";
import type { WorkerState, WorkloadOptions } from "./messages.ts";

/** What an embedded driver is, besides the contents of its RAM. Untrusted until it is restored. */
export interface DriverState {
  /** Version of this shape. */
  version: 1;
  /** Shape of the RAM. */
  ram: RamOptions;
  /** Negotiated features, `0x…`. */
  features: string;
  /** Per queue: where the device goes on. */
  bases: number[];
  /** What the driver does. */
  workload: WorkloadOptions;
  /** What its worker knows. */
  worker: WorkerState;
  /** net: what it has set through the control queue, as src/net/state.ts saves it; who starts the device there sees to it. */
  net?: unknown;
}

/** The state as bytes: u32 length, JSON of that length, then the workload's table (u32 each). Little-endian. */
export function encodeDriverState(state: DriverState): Uint8Array<ArrayBuffer> {
  const { table, ...workload } = state.worker.workload;
  const json = new TextEncoder().encode(JSON.stringify({ ...state, worker: { ...state.worker, workload } }));
  const bytes = new Uint8Array(4 + json.length + table.byteLength);
  new DataView(bytes.buffer).setUint32(0, json.length, true);
  bytes.set(json, 4);
  bytes.set(new Uint8Array(table.buffer, table.byteOffset, table.byteLength), 4 + json.length);
  return bytes;
}

/** The inverse of {@linkcode encodeDriverState}. @throws SvqError STATE_INVALID */
export function decodeDriverState(bytes: Uint8Array): DriverState {
  const invalid = (cause?: unknown) => new SvqError("STATE_INVALID", "These bytes are no state of an embedded driver", { cause });
  if (bytes.length < 4) throw invalid();
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const rest = bytes.length - 4 - length;
  if (rest < 0 || rest % 4 !== 0) throw invalid();
  let state: DriverState;
  try {
    state = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(4, 4 + length)));
  } catch (error) {
    throw invalid(error);
  }
  if (state?.version !== 1 || typeof state.worker?.workload !== "object" || state.worker.workload === null) throw invalid();
  const table = bytes.slice(4 + length);
  state.worker.workload.table = new Uint32Array(table.buffer, 0, rest / 4);
  return state;
}

/** Refuses a state whose parts do not have the shape that the worker relies on. @throws SvqError STATE_INVALID */
export function checkDriverState(state: DriverState): void {
  const invalid = (reason: string) => new SvqError("STATE_INVALID", `The driver's state cannot be used: ${reason}`);
  const { ram, worker } = state;
  const whole = (value: unknown, high: number) => Number.isInteger(value) && value as number >= 0 && value as number <= high;
  if (state.version !== 1) throw invalid(`its version is ${state.version}`);
  if (!/^0x[0-9a-f]{1,32}$/.test(state.features)) throw invalid("its features are no number");
  if (!whole(ram?.ramSize, 2 ** 40) || !whole(ram.queues, 256) || !whole(ram.num, 32768) || !whole(ram.depth, 32768)) {
    throw invalid("its RAM has no such shape");
  }
  if (!Array.isArray(state.bases) || state.bases.length !== ram.queues || !state.bases.every((base) => whole(base, 2 ** 32 - 1))) {
    throw invalid("it has no base for each queue");
  }
  const lists: unknown[] = [worker?.rings, worker?.owners, worker?.workload?.slots, worker?.faults, worker?.latency?.counts];
  if (!lists.every(Array.isArray) || !(worker.workload.table instanceof Uint32Array)) throw invalid("a part is missing");
  if (!worker.owners.every((list) => Array.isArray(list) && list.every((pair) => Array.isArray(pair) && pair.length === 2))) {
    throw invalid("its requests have no slots");
  }
  if (!whole(worker.workload.sequence, 2 ** 32) || !Number.isInteger(worker.workload.random)) throw invalid("its workload has no position");
}
