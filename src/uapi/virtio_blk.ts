/**
 * virtio-blk: feature bits, configuration space and requests (linux/virtio_blk.h; virtio 1.3, 5.2).
 *
 * @module
 */

/** Unit of the capacity and of all positions, bytes. */
export const SECTOR_SIZE = 512;

/** Feature bits of virtio-blk (`VIRTIO_BLK_F_…`), by number. */
export const BLK_F = {
  SIZE_MAX: 1,
  SEG_MAX: 2,
  GEOMETRY: 4,
  RO: 5,
  BLK_SIZE: 6,
  FLUSH: 9,
  TOPOLOGY: 10,
  CONFIG_WCE: 11,
  MQ: 12,
  DISCARD: 13,
  WRITE_ZEROES: 14,
  LIFETIME: 15,
  SECURE_ERASE: 16,
  ZONED: 17,
} as const;

/** Request types (`VIRTIO_BLK_T_…`). */
export const BLK_T = { IN: 0, OUT: 1, FLUSH: 4, GET_ID: 8, GET_LIFETIME: 10, DISCARD: 11, WRITE_ZEROES: 13, SECURE_ERASE: 14 } as const;

/** Status byte of a request (`VIRTIO_BLK_S_…`). */
export const BLK_S = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

/** Flag of a write-zeroes range: the device may deallocate it. */
export const BLK_WRITE_ZEROES_FLAG_UNMAP = 1;

/** Bytes of a request's header: type u32, reserved u32, sector u64. */
export const BLK_HEADER_SIZE = 16;
/** Bytes of one range of a discard or write-zeroes request: sector u64, number of sectors u32, flags u32. */
export const BLK_RANGE_SIZE = 16;
/** Bytes of the id string, NUL padded. */
export const BLK_ID_SIZE = 20;
/** Bytes of the configuration space up to `write_zeroes_may_unmap` and its padding. */
export const BLK_CONFIG_SIZE = 60;

/** What the configuration space says; a field of a feature that is not offered is 0. */
export interface BlkConfig {
  /** Sectors of 512 bytes. */
  capacity: number;
  /** Data segments in a request. */
  segMax: number;
  /** Logical block size in bytes. */
  blkSize: number;
  /** Queues. */
  numQueues: number;
  /** Sectors in one discard range. */
  maxDiscardSectors: number;
  /** Ranges in one discard request. */
  maxDiscardSeg: number;
  /** Alignment of a discard range, sectors. */
  discardSectorAlignment: number;
  /** Sectors in one write-zeroes range. */
  maxWriteZeroesSectors: number;
  /** Ranges in one write-zeroes request. */
  maxWriteZeroesSeg: number;
  /** May write-zeroes deallocate? */
  writeZeroesMayUnmap: boolean;
}

/** The bytes of a configuration space, {@linkcode BLK_CONFIG_SIZE} of them. */
export function encodeBlkConfig(config: BlkConfig): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(BLK_CONFIG_SIZE);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(config.capacity), true);
  view.setUint32(12, config.segMax, true);
  view.setUint32(20, config.blkSize, true);
  view.setUint16(34, config.numQueues, true);
  view.setUint32(36, config.maxDiscardSectors, true);
  view.setUint32(40, config.maxDiscardSeg, true);
  view.setUint32(44, config.discardSectorAlignment, true);
  view.setUint32(48, config.maxWriteZeroesSectors, true);
  view.setUint32(52, config.maxWriteZeroesSeg, true);
  view.setUint8(56, config.writeZeroesMayUnmap ? 1 : 0);
  return bytes;
}

/** Reads a configuration space of at least 36 bytes; what lies behind its end is 0. @throws RangeError when it is shorter */
export function decodeBlkConfig(bytes: Uint8Array): BlkConfig {
  if (bytes.length < 36) throw new RangeError(`A virtio-blk configuration space has 36 bytes or more, not ${bytes.length}`);
  const padded = new Uint8Array(BLK_CONFIG_SIZE);
  padded.set(bytes.subarray(0, BLK_CONFIG_SIZE));
  const view = new DataView(padded.buffer);
  return {
    capacity: Number(view.getBigUint64(0, true)),
    segMax: view.getUint32(12, true),
    blkSize: view.getUint32(20, true),
    numQueues: view.getUint16(34, true),
    maxDiscardSectors: view.getUint32(36, true),
    maxDiscardSeg: view.getUint32(40, true),
    discardSectorAlignment: view.getUint32(44, true),
    maxWriteZeroesSectors: view.getUint32(48, true),
    maxWriteZeroesSeg: view.getUint32(52, true),
    writeZeroesMayUnmap: view.getUint8(56) !== 0,
  };
}
