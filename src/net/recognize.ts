/**
 * What a device is that does not say it: vhost-user has no message for the device id.
 *
 * @module
 */
import { bit } from "../uapi/bits.ts";
import { VIRTIO_NET_FEATURE_BITS } from "../uapi/virtio_net.ts";

const F = VIRTIO_NET_FEATURE_BITS;
// Bits that mean nothing to a device of another kind: block devices, the nearest ones, have 15, 16 and 18 to 23 free.
const NET_ONLY = [F.MRG_RXBUF, F.STATUS, F.CTRL_RX, F.CTRL_VLAN, F.CTRL_RX_EXTRA, F.GUEST_ANNOUNCE, F.MQ, F.CTRL_MAC_ADDR]
  .reduce((word, number) => word | bit(number), 0n);

/** Does a device with these features look like a network device? */
export function looksLikeNet(features: bigint): boolean {
  return (features & NET_ONLY) !== 0n;
}
