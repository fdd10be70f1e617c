/**
 * Waiting for a device that gets no new chains to have returned what it took.
 *
 * @module
 */

/** How long a stopped device may take to give back what it holds before it is resumed, ms. */
const CATCH_UP_MS = 100;
/** Without progress for so long, a device that does not say what it holds counts as idle, ms. */
export const QUIET_MS = 20;
/** The same for a device that says that it holds something, ms. */
export const HELD_MS = 30_000;

/** Resolves after `ms` milliseconds. */
export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** A ring whose device is to come to rest. */
export interface RestingRing {
  /** The used ring of a split ring, half words; undefined for a packed one, in which progress is not looked for. */
  used: Uint16Array | undefined;
  /** Descriptors. */
  num: number;
  /** Does the device say how far it has read (avail_event)? */
  eventIdx: boolean;
  /** Which way frames go in it; undefined for what is no data queue of a network device. */
  way: "in" | "out" | undefined;
  /** Where the guest's avail ring ended when the device's kicks fell silent; undefined where they did not. */
  end?: number | undefined;
  /** Is there nothing left to wait for? */
  over?: () => boolean;
}

/**
 * Waits until a device that gets no new chains has probably returned what it took. With EVENT_IDX the device says how far
 * it has read (avail_event); otherwise, and where it does not keep that word, a time without progress has to do. Only the
 * base that the device gives afterwards proves it; this keeps devices out of their rarely used paths.
 *
 * Where frames keep coming there is no such time: a receive queue has nothing half done, and is not waited for beyond one. A device
 * that goes on behind what was there when its kicks fell silent polls, and never rests: a frame that is sent has nothing half done
 * either, and of others it must have been a ringful, since one that was just woken reads on for a while.
 */
export async function settle({ used, num, eventIdx, way, end, over }: RestingRing): Promise<void> {
  if (used === undefined) return await pause(QUIET_MS);
  let last = Atomics.load(used, 1);
  let since = performance.now();
  for (let wait = 0;; wait = Math.min(wait + 0.2, 2)) {
    const now = Atomics.load(used, 1);
    if (now !== last && way !== "in") {
      last = now;
      since = performance.now();
    }
    const held = eventIdx ? (Atomics.load(used, 2 + 4 * num) - now) & 0xffff : -1;
    if (held === 0) return;
    const says = held > 0 && held <= num && way !== "in";
    const beyond = end === undefined ? -1 : (now - end) & 0xffff;
    if (!says && beyond >= (way === undefined ? num : 0) && beyond < 0x8000) return;
    const limit = says ? HELD_MS : QUIET_MS;
    if (performance.now() - since > limit || over?.() === true) return;
    await pause(wait);
  }
}

/** Waits a moment for a stopped device to give back what it holds. @returns whether `condition` came true */
export async function until(condition: () => Promise<boolean>): Promise<boolean> {
  const deadline = performance.now() + CATCH_UP_MS;
  for (let wait = 0;; wait = Math.min(wait + 1, 5)) {
    if (await condition()) return true;
    if (performance.now() > deadline) return false;
    await pause(wait);
  }
}
