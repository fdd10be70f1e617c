/**
 * Copies of an embedded driver's rings, for `svq vring`: a driver of our own is the one owner of a device that can tell where its
 * rings are without a relay.
 *
 * @module
 */
import { mapFd } from "../ffi/mod.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import type { ImageQueue, VringImage } from "../vring/image.ts";
import { type RingSource, snapshotRing } from "../vring/snapshot.ts";
import type { EmbeddedDriver } from "./embedded_driver.ts";

/** Copies made in a row until one is consistent. */
const ATTEMPTS = 64;

/**
 * Copies a driver's rings; the driver and its device are not disturbed. What both sides have taken is known as far as the rings
 * show it: there are no counters of a relay.
 *
 * @param device its address, for the image
 */
export function driverRings(driver: EmbeddedDriver, device: string): VringImage {
  const { layout, features, regions } = driver;
  const { queues, num, packed, ramSize } = layout.options;
  using mapping = mapFd(driver.ram.fd, { length: ramSize, what: "guest RAM" });
  const offsetOf = (gpa: number, length: number) => {
    const region = regions.find((one) => gpa >= one.gpa && gpa + length <= one.gpa + one.size);
    return region === undefined ? -1 : region.fdOffset + gpa - region.gpa;
  };
  const images = Array.from({ length: queues }, (_, queue): ImageQueue => {
    const start = layout.ringOffset(queue);
    const { desc, avail, used } = layout.ring;
    const part = ({ offset, size }: { offset: number; size: number }) => ({ buffer: mapping.buffer(start + offset, size) });
    const source: RingSource = {
      layout: packed ? "packed" : "split",
      num,
      eventIdx: hasBit(features, VIRTIO_FEATURE_BITS.EVENT_IDX),
      indirect: hasBit(features, VIRTIO_FEATURE_BITS.INDIRECT_DESC),
      inOrder: hasBit(features, VIRTIO_FEATURE_BITS.IN_ORDER),
      addresses: layout.addresses(queue),
      memory: regions.map(({ gpa, size }) => ({ address: gpa, size })),
      ...{ desc: part(desc), avail: part(avail), used: part(used) },
      tableMemory: {
        contains: (gpa, length) => offsetOf(gpa, length) >= 0,
        buffer: (gpa, length) => mapping.buffer(offsetOf(gpa, length), length),
      },
    };
    return { index: driver.deviceIndex(queue), side: "guest", mode: "driver", ring: snapshotRing(source, ATTEMPTS), seen: [] };
  });
  return { created: new Date().toISOString(), device, queues: images };
}
