/**
 * The internet checksum, for frames that reach a guest which did not agree to complete it itself.
 *
 * @module
 */

/**
 * Completes a checksum (virtio 1.3, 5.1.6.2): sums from `start` to the end and puts the result at `start + offset`.
 *
 * @returns false where the place is outside of the frame; nothing is changed then
 */
export function completeChecksum(frame: Uint8Array, start: number, offset: number): boolean {
  const at = start + offset;
  if (at + 2 > frame.length) return false;
  let sum = 0;
  for (let i = start; i + 1 < frame.length; i += 2) sum += frame[i]! << 8 | frame[i + 1]!;
  if ((frame.length - start) % 2 === 1) sum += frame[frame.length - 1]! << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + Math.floor(sum / 0x10000);
  const folded = ~sum & 0xffff;
  // 0 would say "none" in UDP; ones' complement has two zeros.
  const value = folded === 0 ? 0xffff : folded;
  frame[at] = value >> 8;
  frame[at + 1] = value & 0xff;
  return true;
}
