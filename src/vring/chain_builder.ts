/**
 * How the device's sides put a chain together from descriptors: the checks that both formats share.
 *
 * @module
 */
import { VRING_DESC_F_WRITE } from "./layout.ts";
import type { Chain, RingMemory } from "./queue.ts";
import { VringError } from "./rules.ts";

/** 2^52: buffers end at or below it. */
const LIMIT = 0x10_0000_0000_0000;

/** Empties a record without touching its segments. */
export function beginChain(chain: Chain): void {
  chain.count = 0;
  chain.readableCount = 0;
  chain.readableBytes = 0;
  chain.writableBytes = 0;
  chain.slots = 0;
  chain.indirectAddress = -1;
  chain.indirectLength = 0;
}

/** The address in a descriptor, from its two words. @throws VringError ADDRESS_LIMIT when the buffer ends above 2^52 */
export function bufferAddress(head: number, index: number, low: number, high: number, length: number): number {
  const address = high * 0x1_0000_0000 + low;
  if (address + length > LIMIT) {
    throw new VringError("ADDRESS_LIMIT", index, `Descriptor ${index} of chain ${head} ends above 2^52`);
  }
  return address;
}

/**
 * Appends one descriptor's buffer, checked, to a chain.
 *
 * @param memory where buffers must lie; undefined to leave that to the caller
 * @param limit most segments of a chain
 * @param head for messages
 * @param index of the descriptor, for messages
 * @param address below 2^52, bytes
 * @param length bytes
 * @param flags of the descriptor
 */
export function appendBuffer(
  chain: Chain,
  memory: RingMemory | undefined,
  limit: number,
  head: number,
  index: number,
  address: number,
  length: number,
  flags: number,
): void {
  const count = chain.count;
  if (length === 0) throw new VringError("DESCRIPTOR_EMPTY", index, `Descriptor ${index} of chain ${head} has no bytes`);
  if (count >= limit) throw new VringError("CHAIN_TOO_LONG", head, `The chain at ${head} has more than ${limit} segments`);
  if (memory !== undefined && !memory.contains(address, length)) {
    const where = `0x${address.toString(16)}+${length}`;
    throw new VringError("OUTSIDE_MEMORY", index, `Descriptor ${index} of chain ${head}, ${where}, is not in memory`);
  }
  if ((flags & VRING_DESC_F_WRITE) !== 0) {
    chain.writableBytes += length;
  } else {
    if (chain.writableBytes !== 0) {
      throw new VringError("READABLE_AFTER_WRITABLE", index, `Descriptor ${index} of chain ${head} is readable after a writable one`);
    }
    chain.readableBytes += length;
    chain.readableCount = count + 1;
  }
  chain.addresses[count] = address;
  chain.lengths[count] = length;
  chain.count = count + 1;
}

/** Checks a complete chain. @throws VringError CHAIN_BYTES */
export function endChain(chain: Chain, head: number): void {
  const bytes = chain.readableBytes + chain.writableBytes;
  if (bytes > 0x1_0000_0000) throw new VringError("CHAIN_BYTES", head, `The chain at ${head} has ${bytes} bytes`);
}
