/**
 * What a device offers and a relay does not pass on to the guest, and why. Data for the relay, `svq probe` and the documents;
 * docs/features.md says the same, and a test holds the two together.
 *
 * @module
 */
import { VHOST_F } from "../uapi/vhost.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";

/** One feature that a guest or a VMM does not get through a relay. */
export interface MaskedFeature {
  /** `feature` (virtio, negotiated by the guest) or `protocol` (vhost-user, negotiated by the VMM). */
  kind: "feature" | "protocol";
  /** Its name; `bit_40` for one without a name here. */
  name: string;
  /** Its bit. */
  bit: number;
  /** One sentence. */
  text: string;
}

const FEATURES: readonly (readonly [bit: number, name: string, text: string])[] = [
  [24, "NOTIFY_ON_EMPTY", "Only drivers older than virtio 1.0 know it; a ring of the relay's own calls by flags or EVENT_IDX alone"],
  [33, "ACCESS_PLATFORM", "A guest IOMMU is not carried; kernel vDPA devices get the bit from the relay itself"],
  [37, "SR_IOV", "The PCI function that would have virtual functions is the device's own, which the guest does not see"],
  [38, "NOTIFICATION_DATA", "The data of a kick cannot cross an eventfd"],
  [39, "NOTIF_CONFIG_DATA", "The value that a kick carries cannot cross an eventfd"],
  [40, "RING_RESET", "vhost-user has no message for the reset of one ring"],
  [41, "ADMIN_VQ", "An administration queue would change the device past the relay, and its state would not move with a migration"],
];

/** Virtio feature bits that the relay hides from the guest; LOG_ALL it offers by itself. */
export const MASKED_FEATURES: bigint = FEATURES.reduce((word, [number]) => word | bit(number), bit(VHOST_F.LOG_ALL));

// What the relay does not negotiate with a vhost-user device. Towards the VMM it may offer such a feature of its own accord.
const PROTOCOL: Readonly<Record<number, string>> = {
  [PROTOCOL_FEATURE.CROSS_ENDIAN]: "Rings in the other byte order are not carried: rings are little-endian, as virtio 1.0 has them",
  [PROTOCOL_FEATURE.CRYPTO_SESSION]: "Crypto sessions are not carried: their keys and numbers would have to move with a migration",
  [PROTOCOL_FEATURE.PAGEFAULT]: "Postcopy is not carried: the device would fault on memory that the relay has mapped",
  [PROTOCOL_FEATURE.BACKEND_SEND_FD]: "Descriptors that the device sends by itself have no use without HOST_NOTIFIER",
  [PROTOCOL_FEATURE.HOST_NOTIFIER]:
    "The doorbell of a vhost-user device is not passed on; that of a kernel vDPA device is, in mode passthrough",
  [PROTOCOL_FEATURE.INFLIGHT_SHMFD]: "The device's record is not used: the relay keeps one of its own, and offers that to the VMM",
  [PROTOCOL_FEATURE.INBAND_NOTIFICATIONS]: "Kicks and calls as messages are not carried: the relay uses eventfds",
  [PROTOCOL_FEATURE.XEN_MMAP]: "Memory that must be mapped through Xen is not carried",
  [PROTOCOL_FEATURE.SHARED_OBJECT]: "Objects that devices share among themselves are not carried: no dirty log covers them",
  [PROTOCOL_FEATURE.GET_VRING_BASE_INFLIGHT]: "It needs the device's INFLIGHT_SHMFD; the relay drains the device instead",
  [PROTOCOL_FEATURE.SHMEM]: "Shared memory regions of the device are not carried: the relay does not see them and no dirty log covers them",
};

const PROTOCOL_NAMES = new Map<number, string>(Object.entries(PROTOCOL_FEATURE).map(([name, number]) => [number, name]));

/** Every named feature that is not passed on, whoever offers it. */
export function allMasked(): MaskedFeature[] {
  return [
    ...FEATURES.map(([number, name, text]): MaskedFeature => ({ kind: "feature", name, bit: number, text })),
    ...Object.entries(PROTOCOL).map(([number, text]): MaskedFeature => (
      { kind: "protocol", name: PROTOCOL_NAMES.get(Number(number))!, bit: Number(number), text }
    )),
  ];
}

/**
 * What of a device's offer does not reach the guest or the VMM.
 *
 * @param features virtio features offered
 * @param protocolFeatures vhost-user protocol features offered; 0 for other devices
 */
export function maskedOf(features: bigint, protocolFeatures: bigint): MaskedFeature[] {
  const known = allMasked().filter(({ kind, bit }) => hasBit(kind === "feature" ? features : protocolFeatures, bit));
  const unknown: MaskedFeature[] = [];
  for (let number = 0; number < 64; number++) {
    if (!hasBit(protocolFeatures, number) || PROTOCOL_NAMES.has(number)) continue;
    unknown.push({ kind: "protocol", name: `bit_${number}`, bit: number, text: "A protocol feature that this version does not know" });
  }
  return [...known, ...unknown];
}
