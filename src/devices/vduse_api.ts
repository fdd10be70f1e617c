/**
 * What this kernel's VDUSE has, agreed on before a device is made: the API version (1 adds groups and address spaces), and, from
 * kernels that ask for it, messages when a queue is readied and when the device is suspended.
 *
 * @module
 */
import { ERRNO, SysError } from "../ffi/mod.ts";
import { bit } from "../uapi/bits.ts";
import { VDUSE, VDUSE_FEATURE } from "../uapi/vduse.ts";
import { encodeU64, viewOf } from "../uapi/vhost.ts";

/** ioctl(2) on /dev/vduse/control. @throws SysError */
export type ControlIoctl = (request: number, argument: Uint8Array<ArrayBuffer>, name: string) => number;

/** What both sides keep to. */
export interface VduseAgreement {
  /** 0 or 1. */
  apiVersion: number;
  /** The kernel says when a queue is readied or not any more (SET_VQ_READY). */
  queueReady: boolean;
  /** The kernel says when the device is to stop and keep its state (SUSPEND). */
  suspend: boolean;
}

const KNOWN_FEATURES = bit(VDUSE_FEATURE.QUEUE_READY) | bit(VDUSE_FEATURE.SUSPEND);

/** Asks the kernel for the best that both sides know, and tells it so. @throws SysError of SET_API_VERSION */
export function agree(control: ControlIoctl): VduseAgreement {
  const offered = read(control, VDUSE.GET_API_VERSION, "VDUSE_GET_API_VERSION") ?? 0n;
  const apiVersion = offered >= 1n ? 1 : 0;
  // Also for 0: some kernels take the question itself for a choice of what they answered.
  control(VDUSE.SET_API_VERSION, encodeU64(BigInt(apiVersion)), "VDUSE_SET_API_VERSION");
  const features = (read(control, VDUSE.GET_FEATURES, "VDUSE_GET_FEATURES") ?? 0n) & KNOWN_FEATURES;
  const agreed = features !== 0n && write(control, features) ? features : 0n;
  return {
    apiVersion,
    queueReady: (agreed & bit(VDUSE_FEATURE.QUEUE_READY)) !== 0n,
    suspend: (agreed & bit(VDUSE_FEATURE.SUSPEND)) !== 0n,
  };
}

// A kernel that does not know a request answers one of these.
function isUnknown(error: unknown): boolean {
  return error instanceof SysError && [ERRNO.EINVAL, ERRNO.ENOTTY, ERRNO.EOPNOTSUPP].some((errno) => errno === error.errno);
}

function read(control: ControlIoctl, request: number, name: string): bigint | undefined {
  const word = encodeU64(0n);
  try {
    control(request, word, name);
  } catch (error) {
    if (isUnknown(error)) return undefined;
    throw error;
  }
  return viewOf(word).getBigUint64(0, true);
}

function write(control: ControlIoctl, features: bigint): boolean {
  try {
    control(VDUSE.SET_FEATURES, encodeU64(features), "VDUSE_SET_FEATURES");
    return true;
  } catch (error) {
    if (isUnknown(error)) return false;
    throw error;
  }
}
