/**
 * The migration stream: how a running guest moves from a source to a destination. Own protocol, version 2.
 *
 *     source                                                  destination
 *       |  1  HELLO    versions                                     |
 *       |-------------------------------------------------------->|
 *       |  2  HELLO    version chosen, session (16 random bytes)    |
 *       |<--------------------------------------------------------|
 *       |  3  OFFER    session, features, config, memory, queues    |
 *       |-------------------------------------------------------->|  opens its device, allocates memory
 *       |  4  ACCEPT   (or ERROR: refused, with the reason)         |
 *       |<--------------------------------------------------------|
 *       |  4a DISK_READ  sectors that it just changed (may be left |
 *       |-------------------------------------------------------->|  out: see "Disks")
 *       |  4b DISK_DATA  what this side's disk holds there          |
 *       |<--------------------------------------------------------|
 *       |  4c DISK       is the disk going to be copied?            |
 *       |-------------------------------------------------------->|
 *       |        the guest runs; the dirty log is on                |
 *       |  5a ROUND (disk), BLOCKS…, ZERO_BLOCKS…, ROUND_END        |
 *       |-------------------------------------------------------->|  } only where the disk is copied
 *       |  6a ROUND_ACK                                             |  }
 *       |<--------------------------------------------------------|
 *       |  5  ROUND, PAGES…, ZERO…, ROUND_END                       |
 *       |-------------------------------------------------------->|  } repeated until what is
 *       |  6  ROUND_ACK pages, checksum                             |  } left is little enough
 *       |<--------------------------------------------------------|
 *       |  7  stop: guest paused, rings taken from the device       |
 *       |        (GET_VRING_BASE answered: the device is fenced)    |
 *       |  8a ROUND (frozen, disk) … ROUND_END, ROUND_ACK           |
 *       |  8  ROUND (frozen) … ROUND_END, 9 STATE                   |
 *       |-------------------------------------------------------->|  checks, loads, starts nothing
 *       | 10  ROUND_ACK, PREPARED (digest of all memory)            |
 *       |<--------------------------------------------------------|
 *       | 11  COMMIT   session                                      |  ===== hand-over =====
 *       |-------------------------------------------------------->|  starts the rings
 *       | 12  RUNNING                                               |
 *       |<--------------------------------------------------------|  then lets the guest's processor go
 *       | 13  source closes its device                              |
 *       | 14  REPORT…  how the guest does (if asked for)            |
 *       |<--------------------------------------------------------|
 *
 * Version rule: HELLO has this layout for ever and says the lowest and the highest version that its sender speaks. Both use
 * the lower one of the two highest; where that is below either's lowest the destination refuses with ERROR, which also never
 * changes. Within a version JSON documents may gain keys, which a receiver that does not know them ignores; everything else
 * that changes makes a new version.
 *
 * Hand-over rule: the guest belongs to the source until the destination has said RUNNING.
 * - Before 11 any failure, on either side, and any cancel: the destination drops what it has; the source restarts its rings at
 *   the bases that they stopped at, and the guest goes on there.
 * - Between 11 and 12: a destination that cannot start its rings resets its device and says ERROR, and the guest goes on at
 *   the source; no instruction of the guest has run at the destination. A destination that dies writes no RUNNING: the source
 *   reads the end of the stream and goes on (RUNNING is written before the guest's processor is let go, and what was written
 *   is read before the end; a process that dies with COMMIT unread resets the link, and nobody listens there any more). In
 *   every case the source first connects anew and sends QUERY with the session; OUTCOME says whether the destination runs.
 *   When it does not, the destination has promised by its answer never to start that session. Where the link fell silent and
 *   nobody answers, the source stays stopped (in doubt, exit 8): two guests on one disk are worse than none.
 * - After 12 the destination runs, whatever happens to the link.
 * The requests that the device had not taken when its rings were stopped are still in the avail ring: the destination's
 * device takes them there. That is the only way in which a request is submitted again, and only after step 7.
 *
 * Disks: where OFFER asks for it (`disk`: `auto` or `yes`) and ACCEPT agrees (`disk`), the source finds out whether both devices
 * show the same disk: it writes random bytes to sectors that no request of the guest uses, asks what the destination reads there
 * (4a, 4b), and writes back what was there. It never copies a disk onto itself; with `auto` it copies when the disk is another
 * one. Blocks have 4096 bytes; a last one that is shorter is padded with zeros. While the guest runs the source reads them through
 * the guest's own rings, and marks what the guest's requests change when the device has answered them; what is out when the
 * guest stands still counts as changed. The last blocks are read when the device has given its rings back, through a ring of the
 * source's own, and are on the destination's medium before 8. The destination's disk is worth nothing until RUNNING: a
 * migration that ends before leaves it half written.
 *
 * ERROR may come from either side at any step in place of anything else. Every wait has a time-out. Frames are numbered in
 * each direction; a number out of order (a frame lost, repeated or replayed) ends the migration. A recorded stream cannot be
 * replayed: OFFER, COMMIT and QUERY repeat the session that this destination made up.
 *
 * The checksum of PAGES and BLOCKS is over the pages, then over the number and the length of each run.
 *
 * Frame: u32 type, u32 number (from 0), u32 length of the payload, u32 checksum, then the payload. Little-endian.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

/** Highest version spoken. */
export const VERSION = 2;
/** Lowest version spoken. */
export const VERSION_MIN = 2;
/** Bytes before a frame's payload. */
export const FRAME_HEADER_BYTES = 16;
/** Bytes of a run in PAGES, BLOCKS, ZERO and ZERO_BLOCKS: u64 first page, u32 pages, u32 reserved. */
export const RUN_HEADER_BYTES = 16;
/** Bytes before the runs in PAGES and BLOCKS: u32 runs, u32 pages. The runs follow, then the pages, in the same order. */
export const PAGES_HEADER_BYTES = 8;
/** Bytes of a page. */
export const PAGE_BYTES = 4096;
/** Most pages in one PAGES or BLOCKS frame: 1 MiB. */
export const MAX_FRAME_PAGES = 256;
/** Most ranges in one ZERO frame. */
export const MAX_ZERO_RANGES = 4096;
/** Longest JSON payload, bytes. */
export const MAX_JSON = 1 << 20;
/** Most rounds. */
export const MAX_ROUNDS = 10_000;
/** Bytes of a session. */
export const SESSION_BYTES = 16;

/** Frame types. */
export const FRAME = {
  HELLO: 1,
  OFFER: 2,
  ACCEPT: 3,
  ROUND: 4,
  PAGES: 5,
  ZERO: 6,
  ROUND_END: 7,
  ROUND_ACK: 8,
  STATE: 9,
  PREPARED: 10,
  COMMIT: 11,
  RUNNING: 12,
  REPORT: 13,
  ERROR: 14,
  QUERY: 15,
  OUTCOME: 16,
  DISK_READ: 17,
  DISK_DATA: 18,
  DISK: 19,
  BLOCKS: 20,
  ZERO_BLOCKS: 21,
} as const;

/** One of {@linkcode FRAME}. */
export type FrameType = typeof FRAME[keyof typeof FRAME];

/** Name of a frame type, for messages. */
export function frameName(type: number): string {
  return Object.entries(FRAME).find(([, number]) => number === type)?.[0] ?? `type ${type}`;
}

/** The peer broke the protocol. */
export function violation(message: string): SvqError {
  return new SvqError("MIGRATION_PROTOCOL", `The other side of the migration broke the protocol: ${message}`, {
    exitCode: EXIT.migrationAborted,
  });
}

const MAGIC = new TextEncoder().encode("svq-migr");

/** The first frame of each side. 32 bytes: magic, u16 version, u16 lowest version, u32 reserved, session. */
export interface Hello {
  /** Highest version that the sender speaks; in the destination's answer the version to use. */
  version: number;
  /** Lowest version that the sender speaks. */
  versionMin: number;
  /** Made up by the destination; the source sends zeros. */
  session: Uint8Array<ArrayBuffer>;
}

/** The payload of HELLO. */
export function encodeHello({ version, versionMin, session }: Hello): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(16 + SESSION_BYTES);
  bytes.set(MAGIC);
  const view = new DataView(bytes.buffer);
  view.setUint16(8, version, true);
  view.setUint16(10, versionMin, true);
  bytes.set(session, 16);
  return bytes;
}

/** The inverse. @throws SvqError MIGRATION_PROTOCOL */
export function decodeHello(bytes: Uint8Array): Hello {
  if (bytes.length !== 16 + SESSION_BYTES || !MAGIC.every((byte, i) => bytes[i] === byte)) throw violation("its HELLO is no HELLO of svq");
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const hello = { version: view.getUint16(8, true), versionMin: view.getUint16(10, true), session: bytes.slice(16) };
  if (hello.versionMin > hello.version || hello.versionMin === 0) throw violation("the versions in its HELLO are no range");
  return hello;
}

/** The version to use with a peer. @throws SvqError MIGRATION_VERSION */
export function commonVersion(peer: Hello): number {
  const version = Math.min(VERSION, peer.version);
  if (version < VERSION_MIN || version < peer.versionMin) {
    throw new SvqError(
      "MIGRATION_VERSION",
      `The other side speaks versions ${peer.versionMin} to ${peer.version} of the migration protocol, this one ${VERSION_MIN} to ${VERSION}`,
      { exitCode: EXIT.migrationAborted, hint: "use the same version of svq on both sides" },
    );
  }
  return version;
}

/** Consecutive pages by number (GPA / 4096). */
export interface PageRange {
  /** Number of the first page. */
  page: number;
  /** Pages, at least 1. */
  count: number;
}

/** Reads the u64 page and u32 count at `at`. @throws SvqError MIGRATION_PROTOCOL when they are no range below 2^52 bytes */
export function decodeRange(view: DataView, at: number): PageRange {
  const page = view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
  const count = view.getUint32(at + 8, true);
  if (count === 0 || page + count > 2 ** 40) throw violation(`it names pages ${page}+${count}`);
  return { page, count };
}

/** Writes a range as {@linkcode decodeRange} reads it; the u32 behind it becomes 0. */
export function encodeRange(view: DataView, at: number, { page, count }: PageRange): void {
  view.setUint32(at, page % 2 ** 32, true);
  view.setUint32(at + 4, Math.floor(page / 2 ** 32), true);
  view.setUint32(at + 8, count, true);
  view.setUint32(at + 12, 0, true);
}

/**
 * Reads the runs of a PAGES or BLOCKS frame.
 *
 * @param length of the frame's payload, bytes
 * @param read the next bytes of it, as a view that is valid until the next call
 * @throws SvqError MIGRATION_PROTOCOL when runs, pages and length do not belong together
 */
export async function readRuns(length: number, read: (bytes: number) => Promise<DataView>): Promise<PageRange[]> {
  if (length < PAGES_HEADER_BYTES + RUN_HEADER_BYTES + PAGE_BYTES) throw violation(`a frame of pages has ${length} bytes`);
  const head = await read(PAGES_HEADER_BYTES);
  const [runs, pages] = [head.getUint32(0, true), head.getUint32(4, true)];
  if (
    runs === 0 || runs > pages || pages > MAX_FRAME_PAGES || length !== PAGES_HEADER_BYTES + runs * RUN_HEADER_BYTES + pages * PAGE_BYTES
  ) {
    throw violation(`a frame of ${runs} runs and ${pages} pages has ${length} bytes`);
  }
  const view = await read(runs * RUN_HEADER_BYTES);
  const ranges = Array.from({ length: runs }, (_, i) => decodeRange(view, i * RUN_HEADER_BYTES));
  if (ranges.reduce((sum, { count }) => sum + count, 0) !== pages) throw violation(`the runs of a frame are not its ${pages} pages`);
  return ranges;
}

/** ROUND (`pages`: how many are coming at most), ROUND_END and ROUND_ACK (what came). 24 bytes. */
export interface RoundMark {
  /** From 1. */
  round: number;
  /** The guest is stopped: this is the last round. */
  frozen: boolean;
  /** It has blocks of the disk, 4096 bytes each, and not pages of memory. Its rounds are counted apart. */
  disk: boolean;
  /** Pages, those that are zero included. */
  pages: number;
  /** Checksum over the checksums of the round's frames; 0 in ROUND. */
  checksum: number;
}

/** The payload of ROUND, ROUND_END and ROUND_ACK. */
export function encodeRound({ round, frozen, disk, pages, checksum }: RoundMark): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(24);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, round, true);
  view.setUint32(4, (frozen ? 1 : 0) | (disk ? 2 : 0), true);
  view.setBigUint64(8, BigInt(pages), true);
  view.setInt32(16, checksum, true);
  return bytes;
}

/** The inverse. @throws SvqError MIGRATION_PROTOCOL */
export function decodeRound(bytes: Uint8Array): RoundMark {
  if (bytes.length !== 24) throw violation(`a round's mark has ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const [round, flags, pages] = [view.getUint32(0, true), view.getUint32(4, true), view.getBigUint64(8, true)];
  if (round === 0 || round > MAX_ROUNDS || flags > 3 || pages > 2n ** 40n) {
    throw violation(`a round's mark says round ${round}, ${pages} pages`);
  }
  return { round, frozen: (flags & 1) !== 0, disk: (flags & 2) !== 0, pages: Number(pages), checksum: view.getInt32(16, true) };
}
