/**
 * The checked block workload: random reads and writes that never overlap while they are out, so that what each sector must
 * hold is known exactly. Every sector written carries a stamp (stamp.ts) with the request's sequence number.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_REQUEST_BYTES, VIRTIO_BLK_S, VIRTIO_BLK_SECTOR_BYTES, VIRTIO_BLK_T } from "../uapi/virtio_blk.ts";
import type { Chain } from "../vring/queue.ts";
import { Random } from "./random.ts";
import { describeFound, hasStamp, isZero, writeStamp } from "./stamp.ts";
import { BlockPool, type GuestRam, logWrite, type Tally, visitPieces, type Workload, type WorkloadState } from "./workload.ts";

const SECTOR_WORDS = VIRTIO_BLK_SECTOR_BYTES / 4;
const MAX_SECTORS = 128;
const MAX_PIECES = 8;
const UNKNOWN = 0;
const ZEROS = 0xffff_ffff;
const STATUS_AT = 63;
const EXTRA_AT = 16;
const RECENT = 512;

/** What shapes a block workload. Plain data. */
export interface BlkWorkloadOptions {
  /** Sectors under test, from the disk's beginning. */
  sectors: number;
  /** Smallest unit of a request, sectors: the logical block size. */
  unit: number;
  /** Data segments in a request, at most. */
  segMax: number;
  /** 0 to 100: how many of the requests that move data read. */
  readPercent: number;
  /** The disk has a flush request. */
  flush: boolean;
  /** The disk has a write-zeroes request. */
  writeZeroes: boolean;
  /** Random numbers and stamps follow from it. */
  seed: number;
  /** Sectors of each request that moves data, at most 128; absent: random, mostly 8. */
  requestSectors?: number;
}

interface Request {
  type: number;
  sector: number;
  count: number;
  pieces: number;
  sequence: number;
  block: number;
}

/** Drives a disk. */
export class BlkWorkload implements Workload {
  readonly #ram: GuestRam;
  readonly #options: BlkWorkloadOptions;
  readonly #tally: Tally;
  readonly #random: Random;
  readonly #requests: Request[];
  readonly #out: boolean[];
  readonly #busy: Uint8Array;
  readonly #recent = new Uint32Array(RECENT);
  #recentCount = 0;
  #table: Uint32Array<ArrayBuffer>;
  #blocks: BlockPool;
  #sequence = 1;
  #held: { sector: number; count: number } | undefined;
  /** Where sectors are marked that a request has changed, a bit for each 4096 bytes of disk, while somebody asks for it. */
  written: DirtyBitmap | undefined;

  /** A workload at its beginning: nothing is known of the disk. */
  constructor(ram: GuestRam, options: BlkWorkloadOptions, tally: Tally) {
    this.#ram = ram;
    this.#options = options;
    this.#tally = tally;
    this.#random = new Random(options.seed);
    const { slots, blocks } = ram.layout;
    this.#requests = Array.from({ length: slots }, () => ({ type: 0, sector: 0, count: 0, pieces: 0, sequence: 0, block: 0 }));
    this.#out = Array.from({ length: slots }, () => false);
    this.#busy = new Uint8Array(options.sectors);
    this.#table = new Uint32Array(options.sectors);
    this.#blocks = new BlockPool(blocks, new Set());
  }

  /** Makes a request; see {@linkcode Workload.prepare}. */
  prepare(slot: number, chain: Chain): boolean {
    const request = this.#requests[slot]!;
    this.#chooseType(request);
    if (!this.#choosePlace(request)) return false;
    // Unknown and zeros have numbers of their own.
    if (this.#sequence >= ZEROS) this.#sequence = 1;
    request.sequence = this.#sequence++;
    request.block = this.#blocks.take();
    this.#out[slot] = true;
    this.#busy.fill(1, request.sector, request.sector + request.count);
    this.#build(slot, request, chain);
    return true;
  }

  #chooseType(request: Request): void {
    const { readPercent, flush, writeZeroes } = this.#options;
    const dice = this.#random.below(1000);
    if (dice < 5) request.type = VIRTIO_BLK_T.GET_ID;
    else if (dice < 15 && flush) request.type = VIRTIO_BLK_T.FLUSH;
    else if (dice < 25 && writeZeroes && readPercent < 100) request.type = VIRTIO_BLK_T.WRITE_ZEROES;
    else request.type = this.#random.below(100) < readPercent ? VIRTIO_BLK_T.IN : VIRTIO_BLK_T.OUT;
  }

  // Finds sectors that no other request has. Most reads go where something was written lately.
  #choosePlace(request: Request): boolean {
    request.sector = request.count = request.pieces = 0;
    if (request.type === VIRTIO_BLK_T.GET_ID || request.type === VIRTIO_BLK_T.FLUSH) return true;
    const { sectors, unit, segMax } = this.#options;
    for (let attempt = 0; attempt < 16; attempt++) {
      const count = Math.min(this.#chooseCount(), Math.floor(sectors / unit)) * unit;
      let sector = this.#random.below(Math.floor((sectors - count) / unit) + 1) * unit;
      if (request.type === VIRTIO_BLK_T.IN && this.#recentCount > 0 && this.#random.below(10) < 8) {
        const known = this.#recent[this.#random.below(Math.min(RECENT, this.#recentCount))]!;
        sector = Math.min(known, sectors - count);
        sector -= sector % unit;
      }
      if (!this.#isFree(sector, count)) continue;
      request.sector = sector;
      request.count = count;
      request.pieces = 1 + this.#random.below(Math.min(MAX_PIECES, segMax, count / unit));
      return true;
    }
    return false;
  }

  #chooseCount(): number {
    const { unit, requestSectors } = this.#options;
    if (requestSectors !== undefined) return Math.max(1, Math.floor(Math.min(requestSectors, MAX_SECTORS) / unit));
    const dice = this.#random.below(10);
    const sectors = dice < 5 ? 8 : dice < 9 ? 1 + this.#random.below(64) : 1 + this.#random.below(MAX_SECTORS);
    return Math.max(1, Math.floor(sectors / unit));
  }

  #isFree(sector: number, count: number): boolean {
    for (let i = 0; i < count; i++) if (this.#busy[sector + i] !== 0) return false;
    return true;
  }

  #build(slot: number, request: Request, chain: Chain): void {
    const { layout, words, bytes } = this.#ram;
    const at = layout.slotOffset(slot);
    const word = at >> 2;
    const hasSector = request.type !== VIRTIO_BLK_T.WRITE_ZEROES;
    words[word] = request.type;
    words[word + 1] = 0;
    words[word + 2] = hasSector ? request.sector : 0;
    words[word + 3] = 0;
    bytes[at + STATUS_AT] = 0xff;
    chain.clear();
    chain.addReadable(layout.gpa(at), VIRTIO_BLK_REQUEST_BYTES);
    switch (request.type) {
      case VIRTIO_BLK_T.IN:
      case VIRTIO_BLK_T.OUT:
        this.#buildData(request, chain);
        break;
      case VIRTIO_BLK_T.GET_ID:
        chain.addWritable(layout.gpa(at + EXTRA_AT), VIRTIO_BLK_ID_BYTES);
        break;
      case VIRTIO_BLK_T.WRITE_ZEROES:
        words[word + 4] = request.sector;
        words[word + 5] = 0;
        words[word + 6] = request.count;
        words[word + 7] = 0;
        chain.addReadable(layout.gpa(at + EXTRA_AT), 16);
        break;
    }
    chain.addWritable(layout.gpa(at + STATUS_AT), 1);
    logWrite(this.#ram, at, STATUS_AT + 1);
  }

  #buildData(request: Request, chain: Chain): void {
    const { layout, words } = this.#ram;
    const block = layout.blockOffset(request.block);
    const write = request.type === VIRTIO_BLK_T.OUT;
    const { unit, seed } = this.#options;
    visitPieces(request.count / unit, request.pieces, (first, units, place) => {
      const at = block + place * unit * VIRTIO_BLK_SECTOR_BYTES;
      const length = units * unit * VIRTIO_BLK_SECTOR_BYTES;
      if (!write) {
        // An answer that was never written must not look like the last one.
        words.fill(0x55aa55aa, at >> 2, (at + length) >> 2);
        chain.addWritable(layout.gpa(at), length);
      } else {
        for (let i = 0; i < units * unit; i++) {
          const sector = request.sector + first * unit + i;
          writeStamp(words, (at >> 2) + i * SECTOR_WORDS, SECTOR_WORDS, sector, request.sequence, seed);
        }
        chain.addReadable(layout.gpa(at), length);
      }
      logWrite(this.#ram, at, length);
    });
  }

  /** Takes a request back that never went out. */
  cancel(slot: number): void {
    this.#sequence = this.#requests[slot]!.sequence;
    this.#release(slot);
  }

  #release(slot: number): void {
    const { sector, count, block } = this.#requests[slot]!;
    this.#busy.fill(0, sector, sector + count);
    this.#blocks.put(block);
    this.#out[slot] = false;
  }

  /** Judges an answer; see {@linkcode Workload.finish}. */
  finish(slot: number, written: number): boolean {
    const request = this.#requests[slot]!;
    const { sector, count, sequence, type } = request;
    const { layout, bytes } = this.#ram;
    const status = bytes[layout.slotOffset(slot) + STATUS_AT]!;
    const length = type === VIRTIO_BLK_T.IN ? count * VIRTIO_BLK_SECTOR_BYTES + 1 : 1;
    let right = status === VIRTIO_BLK_S.OK;
    if (!right) this.#tally.fault(`${this.describe(slot)}: status ${status}`);
    if (right && type === VIRTIO_BLK_T.IN) {
      right = this.#verify(slot, request);
      if (right && written !== length) {
        right = false;
        this.#tally.fault(`${this.describe(slot)}: the device says that it wrote ${written} bytes, ${length} are right`);
      }
    }
    // A write that failed may have reached some sectors.
    if (type === VIRTIO_BLK_T.OUT) this.#expect(sector, count, right ? sequence : UNKNOWN);
    if (type === VIRTIO_BLK_T.WRITE_ZEROES) this.#expect(sector, count, right ? ZEROS : UNKNOWN);
    if (type === VIRTIO_BLK_T.IN || type === VIRTIO_BLK_T.OUT) this.#tally.counters.bytes += count * VIRTIO_BLK_SECTOR_BYTES;
    // Marked when the device is done with it, whatever it says: a copy that reads the sectors now reads what it left.
    if (isWrite(type)) this.#mark(sector, count);
    this.#release(slot);
    return right;
  }

  #mark(sector: number, count: number): void {
    this.written?.markRange(sector * VIRTIO_BLK_SECTOR_BYTES, count * VIRTIO_BLK_SECTOR_BYTES);
  }

  /** Marks what the writes that are out may have changed, or may still change. */
  markOutstanding(): void {
    this.#requests.forEach(({ type, sector, count }, slot) => {
      if (this.#out[slot] && isWrite(type)) this.#mark(sector, count);
    });
  }

  /** Lends data blocks of the RAM, as many as can be spared and at most `count`. @returns their numbers */
  lend(count: number): number[] {
    const spare = Math.max(0, this.#blocks.free - this.#ram.layout.slots + this.#out.filter((out) => out).length);
    return Array.from({ length: Math.min(count, spare) }, () => this.#blocks.take());
  }

  /** Takes lent blocks back. */
  giveBack(blocks: readonly number[]): void {
    for (const block of blocks) this.#blocks.put(block);
  }

  /** Keeps a unit of the disk free of requests, until {@linkcode unhold}. @returns its first sector; undefined when all are in use */
  hold(): { sector: number; count: number } | undefined {
    const { sectors, unit } = this.#options;
    for (let sector = 0; this.#held === undefined && sector + unit <= sectors; sector += unit) {
      if (!this.#isFree(sector, unit)) continue;
      this.#held = { sector, count: unit };
      this.#busy.fill(1, sector, sector + unit);
    }
    return this.#held;
  }

  /** Lets requests use it again. */
  unhold(): void {
    if (this.#held === undefined) return;
    this.#busy.fill(0, this.#held.sector, this.#held.sector + this.#held.count);
    this.#held = undefined;
  }

  #expect(sector: number, count: number, sequence: number): void {
    this.#table.fill(sequence, sector, sector + count);
    this.#recent[this.#recentCount++ % RECENT] = sector;
  }

  #verify(slot: number, request: Request): boolean {
    const block = this.#ram.layout.blockOffset(request.block);
    const { unit } = this.#options;
    let right = true;
    visitPieces(request.count / unit, request.pieces, (first, units, place) => {
      const at = (block + place * unit * VIRTIO_BLK_SECTOR_BYTES) >> 2;
      for (let i = 0; i < units * unit && right; i++) {
        right = this.#verifySector(slot, request.sector + first * unit + i, at + i * SECTOR_WORDS);
      }
    });
    return right;
  }

  #verifySector(slot: number, sector: number, at: number): boolean {
    const expected = this.#table[sector]!;
    if (expected === UNKNOWN) return true;
    const { words } = this.#ram;
    const { seed } = this.#options;
    this.#tally.counters.verified++;
    const right = expected === ZEROS ? isZero(words, at, SECTOR_WORDS) : hasStamp(words, at, SECTOR_WORDS, sector, expected, seed);
    if (right) return true;
    const wanted = expected === ZEROS ? "zeros" : `write ${expected}`;
    this.#tally.fault(
      `${this.describe(slot)}: sector ${sector} must hold ${wanted} and holds ${describeFound(words, at, SECTOR_WORDS, seed)}`,
    );
    return false;
  }

  /** In words. */
  describe(slot: number): string {
    const { type, sector, count, sequence } = this.#requests[slot]!;
    const name = Object.entries(VIRTIO_BLK_T).find(([, number]) => number === type)?.[0] ?? `type ${type}`;
    return `request ${sequence} (${name}${count === 0 ? "" : `, sectors ${sector} to ${sector + count - 1}`})`;
  }

  /** The state; the table is a copy. */
  save(): WorkloadState {
    const slots = this.#requests.map(({ type, sector, count, pieces, sequence, block }, slot) =>
      this.#out[slot] ? [type, sector, count, pieces, sequence, block] : null
    );
    return { kind: "blk", random: this.#random.state, sequence: this.#sequence, slots, table: this.#table.slice() };
  }

  /** Takes over a state. @throws SvqError STATE_INVALID */
  restore(state: WorkloadState): void {
    const { sectors, unit } = this.#options;
    const { slots, blocks } = this.#ram.layout;
    const taken = new Set<number>();
    if (state.kind !== "blk" || state.table.length !== sectors || state.slots.length !== slots) throw invalid("it is of another workload");
    this.#busy.fill(0);
    state.slots.forEach((values, slot) => {
      this.#out[slot] = values !== null;
      if (values === null) return;
      const [type = -1, sector = -1, count = -1, pieces = -1, sequence = -1, block = -1] = values;
      const numbers = [type, sector, count, pieces, sequence, block];
      if (values.length !== 6 || numbers.some((value) => !Number.isInteger(value) || value < 0)) throw invalid(`slot ${slot} is damaged`);
      if (sector + count > sectors || count > MAX_SECTORS || count % unit !== 0 || (count > 0) !== (pieces > 0)) {
        throw invalid(`slot ${slot} names sectors ${sector}+${count}`);
      }
      if (!this.#isFree(sector, count)) throw invalid(`slot ${slot} overlaps another request`);
      if (block >= blocks || taken.has(block)) throw invalid(`slot ${slot} has block ${block}`);
      taken.add(block);
      this.#requests[slot] = { type, sector, count, pieces, sequence, block };
      this.#busy.fill(1, sector, sector + count);
    });
    this.#blocks = new BlockPool(blocks, taken);
    this.#random.state = state.random | 0;
    this.#sequence = state.sequence;
    this.#table = state.table.slice();
  }
}

function isWrite(type: number): boolean {
  return type === VIRTIO_BLK_T.OUT || type === VIRTIO_BLK_T.WRITE_ZEROES;
}

function invalid(reason: string): SvqError {
  return new SvqError("STATE_INVALID", `The workload's state cannot be used: ${reason}`);
}
