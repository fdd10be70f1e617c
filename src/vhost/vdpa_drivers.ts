/**
 * What is known about vDPA parent drivers and cannot be asked of the device: found out by tests on the real drivers
 * (tests/lab/), one entry each.
 *
 * @module
 */

import { hasBit } from "../uapi/bits.ts";
import { BACKEND_FEATURE } from "../uapi/vhost.ts";
import type { RingStop } from "./backend.ts";

/** Facts about a parent driver. */
export interface VdpaDriverFacts {
  /**
   * SUSPEND, VRING_ENABLE 0, NUM, ADDR, BASE, VRING_ENABLE 1, RESUME gives a ring new addresses. A driver may take the
   * ioctls and ignore them silently, and no feature bit tells: so this is believed only of drivers that a test has watched.
   */
  readdressUnderSuspend: boolean;
  /** It pins every mapped page; `undefined`: that depends (see {@linkcode pinsMemory}). */
  pins: boolean | undefined;
}

/** By the name of the management device's class, as the vdpa netlink family gives it, or of the parent's PCI driver. */
const FACTS: Readonly<Record<string, VdpaDriverFacts>> = {
  // Takes addresses on the edge of VRING_ENABLE from 0 to 1.
  vdpasim_net: { readdressUnderSuspend: true, pins: undefined },
  vdpasim_blk: { readdressUnderSuspend: true, pins: undefined },
  vduse: { readdressUnderSuspend: false, pins: false },
  "vp-vdpa": { readdressUnderSuspend: false, pins: true },
};

/** The facts about a driver; the careful assumption about one without an entry. */
export function driverFacts(driver: string | undefined): VdpaDriverFacts {
  const known = driver !== undefined && Object.hasOwn(FACTS, driver) ? FACTS[driver] : undefined;
  return known ?? { readdressUnderSuspend: false, pins: undefined };
}

/** How a device's rings stop, by its backend features and its driver. */
export function ringStopOf(backendFeatures: bigint, driver: string | undefined): RingStop {
  if (!hasBit(backendFeatures, BACKEND_FEATURE.SUSPEND)) return "at-rest";
  return driverFacts(driver).readdressUnderSuspend && hasBit(backendFeatures, BACKEND_FEATURE.RESUME) ? "each" : "together";
}

/** Does the driver pin pages? Undefined where nobody knows. @param sysfs where sysfs is mounted */
export function pinsMemory(driver: string | undefined, sysfs = "/sys"): boolean | undefined {
  const { pins } = driverFacts(driver);
  if (pins !== undefined || driver === undefined || !driver.startsWith("vdpasim_")) return pins;
  try {
    // On by default; kernels before 6.2 have no such parameter and pin.
    return Deno.readTextFileSync(`${sysfs}/module/vdpa_sim/parameters/use_va`).trim() !== "Y";
  } catch {
    return true;
  }
}
