/**
 * Tap interfaces: ioctl numbers and flags (linux/if_tun.h). Data, no I/O.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** ioctl requests of /dev/net/tun. */
export const TUN = {
  SETIFF: 0x400454ca,
  SETOFFLOAD: 0x400454d0,
  SETVNETHDRSZ: 0x400454d8,
} as const;

/** Flags of {@linkcode encodeIfreq} (`IFF_…`). */
export const IFF = { TAP: 2, NO_PI: 0x1000, VNET_HDR: 0x4000 } as const;

/** What the guest takes off our hands (`TUN_F_…`). */
export const TUN_F = { CSUM: 1, TSO4: 2, TSO6: 4, TSO_ECN: 8, UFO: 0x10 } as const;

const IFREQ_SIZE = 40;
const NAME_LIMIT = 15;

/** struct ifreq with an interface's name and flags, 40 bytes. @throws SvqError BAD_INTERFACE_NAME */
export function encodeIfreq(name: string, flags: number): Uint8Array<ArrayBuffer> {
  const text = new TextEncoder().encode(name);
  if (text.length === 0 || text.length > NAME_LIMIT || /[\s/]/.test(name)) {
    throw new SvqError("BAD_INTERFACE_NAME", `${JSON.stringify(name)} is no name of a network interface`, {
      exitCode: 2,
      hint: `1 to ${NAME_LIMIT} characters, without spaces and slashes`,
    });
  }
  const bytes = new Uint8Array(IFREQ_SIZE);
  bytes.set(text);
  new DataView(bytes.buffer).setUint16(16, flags, true);
  return bytes;
}
