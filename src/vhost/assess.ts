/**
 * What a relay could do with a device: each relay mode, and migration, possible or not, with the reasons and what to do about
 * each. A pure function of what a probe found.
 *
 * @module
 */
import { hasBit } from "../uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import { deviceName, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_ID } from "../uapi/virtio.ts";
import type { BackendKind, RingStop } from "./backend.ts";

/** Why something is not possible, or what to mind. */
export interface Reason {
  /** Stable name. */
  code: string;
  /** One sentence. */
  text: string;
  /** What to do about it. */
  remedy: string;
}

/** Possible or not. */
export interface Verdict {
  /** It can be done. */
  possible: boolean;
  /** Why not; empty where it can be done. */
  reasons: Reason[];
  /** What to mind where it can be done. */
  caveats: Reason[];
}

/** Relay modes, as design and documents name them. */
export type ModeName = "passthrough" | "notify" | "used" | "shadow";

/** What {@linkcode assess} goes by. */
export interface AssessedDevice {
  /** What it is. */
  kind: BackendKind;
  /** Virtio device id, where it is known. */
  deviceId: number | undefined;
  /** Features offered. */
  features: bigint;
  /** vhost-user protocol features; 0 for others. */
  protocolFeatures: bigint;
  /** How rings stop. */
  ringStop: RingStop;
  /** Whether its driver pins guest memory, where that is known. */
  pins?: boolean | undefined;
}

/** Devices with state of their own, outside of the rings and of what the VMM sets. */
const STATEFUL: readonly number[] = [
  VIRTIO_ID.gpu,
  VIRTIO_ID.vsock,
  VIRTIO_ID.crypto,
  VIRTIO_ID.snd,
  VIRTIO_ID.fs,
];

function verdict(reasons: Reason[], caveats: Reason[] = []): Verdict {
  return { possible: reasons.length === 0, reasons, caveats: reasons.length === 0 ? caveats : [] };
}

/** The verdicts about a device. */
export function assess(device: AssessedDevice): { modes: Record<ModeName, Verdict>; migratable: Verdict } {
  const legacy: Reason[] = (device.features & VIRTIO_F_VERSION_1) !== 0n ? [] : [{
    code: "NO_VERSION_1",
    text: "The device offers no VERSION_1: its rings are in the guest's byte order, which a relay cannot know",
    remedy: "Use a device that follows virtio 1.0 or later",
  }];
  const stays: Reason[] = device.ringStop !== "at-rest" ? [] : [{
    code: "NO_SUSPEND",
    text: "The device cannot be stopped while requests are in flight, so a running guest cannot leave this mode",
    remedy: "For migration run it with --mode shadow from the start; or use a driver with SUSPEND",
  }];
  const packedOnly: Reason[] = (device.features & VIRTIO_F_RING_PACKED) === 0n ? [] : [{
    code: "SPLIT_ONLY",
    text: "This mode copies a split ring's used ring; packed rings have none",
    remedy: "Guests that negotiate RING_PACKED get mode shadow instead",
  }];
  const pinned: Reason[] = device.pins === false || device.kind !== "vhost-vdpa" ? [] : [{
    code: "PINNED_MEMORY",
    text: "The device pins all guest memory behind the VMM's back: a balloon, virtio-mem or free page reporting would break its DMA",
    remedy: "Leave these devices out of the VM, and let the relay lock that much memory (LimitMEMLOCK)",
  }];
  const modes = {
    passthrough: verdict([], [...stays, ...pinned]),
    notify: verdict([], [...stays, ...pinned]),
    used: verdict(legacy, [...packedOnly, ...stays, ...pinned]),
    shadow: verdict(legacy, pinned),
  };
  return { modes, migratable: verdict([...legacy, ...stateful(device)], migrationCaveats(device, [...stays, ...pinned])) };
}

function stateful({ deviceId, protocolFeatures }: AssessedDevice): Reason[] {
  if (deviceId === undefined || !STATEFUL.includes(deviceId) || hasBit(protocolFeatures, PROTOCOL_FEATURE.DEVICE_STATE)) return [];
  return [{
    code: "DEVICE_STATE",
    text: `A ${deviceName(deviceId)} device keeps state that only it knows, and it offers no DEVICE_STATE to hand it over`,
    remedy: "Use a back-end with VHOST_USER_PROTOCOL_F_DEVICE_STATE",
  }];
}

function migrationCaveats(device: AssessedDevice, more: Reason[]): Reason[] {
  const unknown: Reason[] = device.deviceId !== undefined || device.kind !== "vhost-user" ? [] : [{
    code: "DEVICE_UNKNOWN",
    text: "vhost-user does not tell which device it is; one with state of its own needs DEVICE_STATE",
    remedy: "blk and net keep none; check for others",
  }];
  return [...unknown, ...more.map((one) => one.code === "NO_SUSPEND" ? { ...one, text: NO_SUSPEND_MIGRATION } : one)];
}

const NO_SUSPEND_MIGRATION =
  "The driver has no SUSPEND: the relay must run it in shadow mode from the start, and stops it by not forwarding";
