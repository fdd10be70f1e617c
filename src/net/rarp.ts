/**
 * The frame by which a guest is announced at its new place: switches learn from it behind which port its address is.
 *
 * @module
 */

/** Bytes of an announcement: the shortest ethernet frame. */
export const RARP_BYTES = 60;

/** A reverse ARP request for `mac` by `mac`, to everybody (RFC 903). @param mac 6 bytes */
export function rarpFrame(mac: Uint8Array): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(RARP_BYTES);
  frame.fill(0xff, 0, 6);
  frame.set(mac.subarray(0, 6), 6);
  // Ethertype; ethernet, IPv4, 6 and 4 bytes of address, request.
  frame.set([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], 12);
  frame.set(mac.subarray(0, 6), 22);
  frame.set(mac.subarray(0, 6), 32);
  return frame;
}
