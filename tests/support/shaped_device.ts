/**
 * An embedded device that looks like another kind: other facts, or rings that stop and start only together.
 *
 * @module
 */
import type { BackendInfo, VhostBackend, VringStart, VringStop } from "../../src/vhost/backend.ts";

/** `device` with other facts in its `info`; with `together`, its rings stop and start in one call. */
export function shapedDevice(device: VhostBackend, info: Partial<BackendInfo>, together = false): VhostBackend {
  const extra: Record<string, unknown> = { info: { ...device.info, ...info } };
  if (together) {
    extra.stopVrings = (rings: readonly VringStop[]) => Promise.all(rings.map(({ index }) => device.getVringBase(index)));
    extra.startVrings = async (rings: readonly VringStart[]) => {
      for (const ring of rings) {
        await device.setVringNum(ring.index, ring.num);
        await device.setVringBase(ring.index, ring.base);
        await device.setVringAddresses(ring.index, ring.addresses);
        await device.setVringCall(ring.index, ring.call);
        await device.setVringErr(ring.index, ring.err);
        await device.setVringKick(ring.index, ring.kick);
        await device.setVringEnable(ring.index, ring.enabled);
      }
    };
  }
  return new Proxy(device, {
    get(target, name) {
      if (name in extra) return extra[name as string];
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
}
