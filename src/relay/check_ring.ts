/**
 * What is checked of a guest's ring before anybody touches it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import { packedLayout, splitLayout } from "../vring/layout.ts";
import type { RelayQueue } from "./relay_queue.ts";

/**
 * Every part of the ring is aligned and lies in one piece of guest memory.
 *
 * @throws SvqError RING_UNALIGNED, RING_OUTSIDE_MEMORY, naming the part
 */
export function checkRing(queue: RelayQueue, memory: GuestMemory, packed: boolean): void {
  const { index, num } = queue;
  const layout = packed ? packedLayout(num) : splitLayout(num);
  const names = packed
    ? { desc: "descriptor ring", avail: "driver event area", used: "device event area" }
    : { desc: "descriptor table", avail: "avail ring", used: "used ring" };
  for (const part of ["desc", "avail", "used"] as const) {
    const gpa = queue.addresses![part];
    const { size, align } = layout[part];
    const what = `Queue ${index}: its ${names[part]} at 0x${gpa.toString(16)}`;
    if (gpa % align !== 0) throw new SvqError("RING_UNALIGNED", `${what} is not aligned to ${align} bytes`);
    try {
      memory.addressOf(gpa, size);
    } catch (cause) {
      throw new SvqError("RING_OUTSIDE_MEMORY", `${what}, ${size} bytes, does not lie in guest memory`, { cause });
    }
  }
}
