/**
 * What `svq bench ring` and its Workers say to each other.
 *
 * @module
 */
import type { ErrorRecord } from "../errors.ts";
import type { RingCase, Workload } from "./ring_rig.ts";

/** To a Worker; each is answered once. */
export type RingRequest =
  | { type: "open"; ring: RingCase }
  /** For `ms` milliseconds. */
  | { type: "measure"; workload: Workload; batch: number; ms: number }
  | { type: "close" };

/** From a Worker: ns per chain for `measure`. */
export interface RingReply {
  /** ns per chain. */
  ns?: number;
  /** What went wrong. */
  error?: ErrorRecord;
}
