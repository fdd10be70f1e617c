/**
 * virtio: feature bits that every device may have, status bits, device ids (virtio 1.3, 2.1, 5, 6; linux/virtio_config.h,
 * virtio_ring.h, virtio_ids.h).
 *
 * @module
 */

/** Feature bits for the ring and the transport (`VIRTIO_F_…`, `VIRTIO_RING_F_…`), by number. */
export const VIRTIO_F = {
  NOTIFY_ON_EMPTY: 24,
  ANY_LAYOUT: 27,
  RING_INDIRECT_DESC: 28,
  RING_EVENT_IDX: 29,
  VERSION_1: 32,
  ACCESS_PLATFORM: 33,
  RING_PACKED: 34,
  IN_ORDER: 35,
  ORDER_PLATFORM: 36,
  SR_IOV: 37,
  NOTIFICATION_DATA: 38,
  NOTIF_CONFIG_DATA: 39,
  RING_RESET: 40,
  ADMIN_VQ: 41,
  SUSPEND: 43,
} as const;

/** Bits of the device status. */
export const VIRTIO_STATUS = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  NEEDS_RESET: 64,
  FAILED: 128,
} as const;

/** Device ids. */
export const VIRTIO_ID = { NET: 1, BLOCK: 2 } as const;
