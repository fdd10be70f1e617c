/**
 * virtio-blk: feature bits, configuration space and requests. Source: virtio 1.3, 5.2; linux/virtio_blk.h.
 *
 * @module
 */
import { checkRecord, type FieldTable, getFields, putFields } from "./record.ts";

/** Feature bits of a block device by kernel name without prefix: bit numbers. */
export const VIRTIO_BLK_FEATURE_BITS = {
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

/** Bytes of a sector, whatever the block size is. */
export const VIRTIO_BLK_SECTOR_BYTES = 512;
/** Bytes of the configuration space, zoned part included. */
export const VIRTIO_BLK_CONFIG_BYTES = 96;
/** Bytes of a request's head. */
export const VIRTIO_BLK_REQUEST_BYTES = 16;
/** Bytes of the answer to GET_ID, padded with NUL. */
export const VIRTIO_BLK_ID_BYTES = 20;
/** Bytes of one segment of a discard, write-zeroes or secure-erase request. */
export const VIRTIO_BLK_RANGE_BYTES = 16;

/** Types of requests (virtio 1.3, 5.2.6). */
export const VIRTIO_BLK_T = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  GET_LIFETIME: 10,
  DISCARD: 11,
  WRITE_ZEROES: 13,
  SECURE_ERASE: 14,
} as const;

/** The status byte that ends every request. */
export const VIRTIO_BLK_S = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

/** Flag of a write-zeroes segment: the device may deallocate. */
export const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1;

/** The configuration space (virtio 1.3, 5.2.4), without the zoned part. */
export interface VirtioBlkConfig {
  /** Sectors of 512 bytes, below 2^53. */
  capacity: number;
  /** Longest segment, bytes; needs SIZE_MAX. */
  sizeMax: number;
  /** Most data segments of a request; needs SEG_MAX. */
  segMax: number;
  /** Needs GEOMETRY. */
  cylinders: number;
  /** Needs GEOMETRY. */
  heads: number;
  /** Per track; needs GEOMETRY. */
  sectors: number;
  /** Bytes; needs BLK_SIZE. */
  blkSize: number;
  /** Logical blocks in a physical one, as a power of two; needs TOPOLOGY. */
  physicalBlockExp: number;
  /** Logical blocks before the first aligned one; needs TOPOLOGY. */
  alignmentOffset: number;
  /** Logical blocks; needs TOPOLOGY. */
  minIoSize: number;
  /** Logical blocks; needs TOPOLOGY. */
  optIoSize: number;
  /** 1: write-back cache; needs CONFIG_WCE. */
  wce: number;
  /** Needs MQ. */
  numQueues: number;
  /** Sectors in a discard segment; needs DISCARD. */
  maxDiscardSectors: number;
  /** Segments of a discard request; needs DISCARD. */
  maxDiscardSeg: number;
  /** Sectors; needs DISCARD. */
  discardSectorAlignment: number;
  /** Sectors in a write-zeroes segment; needs WRITE_ZEROES. */
  maxWriteZeroesSectors: number;
  /** Segments of a write-zeroes request; needs WRITE_ZEROES. */
  maxWriteZeroesSeg: number;
  /** 1: write-zeroes may deallocate; needs WRITE_ZEROES. */
  writeZeroesMayUnmap: number;
  /** Sectors in a secure-erase segment; needs SECURE_ERASE. */
  maxSecureEraseSectors: number;
  /** Segments of a secure-erase request; needs SECURE_ERASE. */
  maxSecureEraseSeg: number;
  /** Sectors; needs SECURE_ERASE. */
  secureEraseSectorAlignment: number;
}

const CONFIG: FieldTable<VirtioBlkConfig> = [
  ["capacity", 0, 8],
  ["sizeMax", 8, 4],
  ["segMax", 12, 4],
  ["cylinders", 16, 2],
  ["heads", 18, 1],
  ["sectors", 19, 1],
  ["blkSize", 20, 4],
  ["physicalBlockExp", 24, 1],
  ["alignmentOffset", 25, 1],
  ["minIoSize", 26, 2],
  ["optIoSize", 28, 4],
  ["wce", 32, 1],
  ["numQueues", 34, 2],
  ["maxDiscardSectors", 36, 4],
  ["maxDiscardSeg", 40, 4],
  ["discardSectorAlignment", 44, 4],
  ["maxWriteZeroesSectors", 48, 4],
  ["maxWriteZeroesSeg", 52, 4],
  ["writeZeroesMayUnmap", 56, 1],
  ["maxSecureEraseSectors", 60, 4],
  ["maxSecureEraseSeg", 64, 4],
  ["secureEraseSectorAlignment", 68, 4],
];

/** Decodes the configuration space; a short one reads as if zeros followed. @throws SvqError BAD_RECORD when longer than 4096 */
export function decodeBlkConfig(bytes: Uint8Array): VirtioBlkConfig {
  const view = checkRecord("virtio-blk configuration", bytes, VIRTIO_BLK_CONFIG_BYTES, 0);
  return getFields(view, CONFIG) as unknown as VirtioBlkConfig;
}

/** Encodes the configuration space, {@linkcode VIRTIO_BLK_CONFIG_BYTES} bytes; what is left out is 0. */
export function encodeBlkConfig(config: Partial<VirtioBlkConfig>): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VIRTIO_BLK_CONFIG_BYTES);
  putFields(new DataView(bytes.buffer), CONFIG, config);
  return bytes;
}

/** The head of a request. */
export interface VirtioBlkRequest {
  /** One of {@linkcode VIRTIO_BLK_T}. */
  type: number;
  /** First sector of 512 bytes. */
  sector: number;
}

const REQUEST: FieldTable<VirtioBlkRequest> = [["type", 0, 4], ["sector", 8, 8]];

/** Decodes the head of a request. @throws SvqError BAD_RECORD when there are fewer than 16 bytes */
export function decodeBlkRequest(bytes: Uint8Array): VirtioBlkRequest {
  const head = bytes.subarray(0, VIRTIO_BLK_REQUEST_BYTES);
  const view = checkRecord("virtio-blk request", head, VIRTIO_BLK_REQUEST_BYTES, VIRTIO_BLK_REQUEST_BYTES);
  return getFields(view, REQUEST) as unknown as VirtioBlkRequest;
}

/** Encodes the head of a request, {@linkcode VIRTIO_BLK_REQUEST_BYTES} bytes. */
export function encodeBlkRequest(request: VirtioBlkRequest): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VIRTIO_BLK_REQUEST_BYTES);
  putFields(new DataView(bytes.buffer), REQUEST, request);
  return bytes;
}

/** One segment of a discard, write-zeroes or secure-erase request. */
export interface VirtioBlkRange {
  /** First sector. */
  sector: number;
  /** Sectors. */
  numSectors: number;
  /** {@linkcode VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP} or 0. */
  flags: number;
}

const RANGE: FieldTable<VirtioBlkRange> = [["sector", 0, 8], ["numSectors", 8, 4], ["flags", 12, 4]];

/** Decodes the segments of a discard, write-zeroes or secure-erase request; bytes beyond the last whole one are ignored. */
export function decodeBlkRanges(bytes: Uint8Array): VirtioBlkRange[] {
  const ranges: VirtioBlkRange[] = [];
  for (let at = 0; at + VIRTIO_BLK_RANGE_BYTES <= bytes.length; at += VIRTIO_BLK_RANGE_BYTES) {
    const view = new DataView(bytes.buffer, bytes.byteOffset + at, VIRTIO_BLK_RANGE_BYTES);
    ranges.push(getFields(view, RANGE) as unknown as VirtioBlkRange);
  }
  return ranges;
}

/** Encodes segments of such a request, {@linkcode VIRTIO_BLK_RANGE_BYTES} bytes each. */
export function encodeBlkRanges(ranges: readonly VirtioBlkRange[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(ranges.length * VIRTIO_BLK_RANGE_BYTES);
  for (const [index, range] of ranges.entries()) {
    putFields(new DataView(bytes.buffer, index * VIRTIO_BLK_RANGE_BYTES), RANGE, range);
  }
  return bytes;
}
