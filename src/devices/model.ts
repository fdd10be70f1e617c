/**
 * What the worker of an embedded device needs of the kind of device that it is.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { IoVector } from "../ffi/mod.ts";
import type { RangeTable } from "../memory/range_table.ts";
import type { Chain } from "../vring/queue.ts";

/** The part of an embedded device that knows what a request means. It lives in the device's worker. */
export interface DeviceModel {
  /** Called with the negotiated features before the first request. */
  configure(features: bigint): void;
  /**
   * Does what a chain asks for, completely, and writes the answer into its writable segments.
   *
   * @param queue whose it is
   * @param mayWait whether {@linkcode WAIT} may be answered
   * @returns bytes written, from the first writable one on; {@linkcode WAIT} when it cannot be done now
   * @throws SvqError when the chain is no request at all: the queue stops
   */
  execute(chain: Chain, memory: RangeTable, queue: number, mayWait: boolean): number;
}

/** The chain stays in the ring until the model says that it can go on. */
export const WAIT = -1;

/** A chain that is not even a request: the driver broke the device's rules, and the queue stops. */
export function malformed(message: string): SvqError {
  return new SvqError("MALFORMED_REQUEST", message);
}

/** Called with the parts of a piece of a chain: address in guest memory and bytes. */
export type PartVisitor = (gpa: number, length: number) => void;

/**
 * Visits the bytes `[skip, skip + length)` of the readable or of the writable segments of a chain, in order.
 *
 * @returns bytes visited, less than `length` where the segments end
 */
export function visitParts(chain: Chain, writable: boolean, skip: number, length: number, visit: PartVisitor): number {
  const end = writable ? chain.count : chain.readableCount;
  let rest = length;
  for (let i = writable ? chain.readableCount : 0; i < end && rest > 0; i++) {
    const size = chain.lengths[i]!;
    if (skip >= size) {
      skip -= size;
      continue;
    }
    const part = Math.min(size - skip, rest);
    visit(chain.addresses[i]! + skip, part);
    skip = 0;
    rest -= part;
  }
  return length - rest;
}

/** Adds guest memory to a vector, a piece per mapping. @returns false when the vector has no room for all the pieces */
export function pushGuest(vector: IoVector, memory: RangeTable, gpa: number, length: number): boolean {
  for (let done = 0; done < length;) {
    const run = Math.min(memory.runLength(gpa + done), length - done);
    if (run === 0) throw malformed(`A buffer at 0x${gpa.toString(16)}+0x${length.toString(16)} is not in guest memory any more`);
    if (vector.count === vector.capacity) return false;
    vector.push(memory.addressOf(gpa + done, run), run);
    done += run;
  }
  return true;
}

/** Copies out of the readable segments. @returns bytes copied into `target` */
export function readChain(chain: Chain, memory: RangeTable, skip: number, target: Uint8Array): number {
  let at = 0;
  return visitParts(chain, false, skip, target.length, (gpa, length) => {
    for (let i = 0; i < length; i++) target[at++] = memory.readByte(gpa + i);
  });
}

/** Copies into the writable segments. @returns bytes copied */
export function writeChain(chain: Chain, memory: RangeTable, skip: number, source: Uint8Array): number {
  let at = 0;
  return visitParts(chain, true, skip, source.length, (gpa, length) => {
    for (let i = 0; i < length; i++) memory.writeByte(gpa + i, source[at++]!);
  });
}
