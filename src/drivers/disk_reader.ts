/**
 * Requests of whoever copies a running guest's disk, among the guest's own, in the driver's worker: whatever the device is, its
 * disk can be read through the rings that the guest has. The buffers are blocks of guest RAM that the workload lends.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { VIRTIO_BLK_REQUEST_BYTES, VIRTIO_BLK_S, VIRTIO_BLK_SECTOR_BYTES, VIRTIO_BLK_T } from "../uapi/virtio_blk.ts";
import { Chain } from "../vring/queue.ts";
import type { GuestQueue } from "./guest_queue.ts";
import { BLOCK_BYTES, SLOT_BYTES } from "./layout.ts";
import type { DiskRequest } from "./messages.ts";
import { type GuestRam, logWrite } from "./workload.ts";

const STATUS_AT = SLOT_BYTES - 1;

interface Batch {
  left: number;
  error: SvqError | undefined;
  done: (error: SvqError | undefined) => void;
}

/** Most buffers: as many heads and statuses fit into the first block. */
export const MAX_DISK_BUFFERS = BLOCK_BYTES / SLOT_BYTES;

/** Does such requests on one queue. */
export class DiskReader {
  readonly #ram: GuestRam;
  readonly #queue: GuestQueue;
  readonly #offsets: readonly number[];
  readonly #waiting: { request: DiskRequest; batch: Batch }[] = [];
  readonly #chain = new Chain(4);
  #out = 0;

  /** @param offsets where the buffers lie in RAM, bytes, each as long as a block; the first one is for heads and statuses */
  constructor(ram: GuestRam, queue: GuestQueue, offsets: readonly number[]) {
    this.#ram = ram;
    this.#queue = queue;
    this.#offsets = offsets;
  }

  /** Something is out, or waits for room in the ring. */
  get busy(): boolean {
    return this.#out + this.#waiting.length > 0;
  }

  /** Does requests, each in a buffer of its own; `done` is told when the last one is back. @throws RangeError */
  request(requests: readonly DiskRequest[], done: (error: SvqError | undefined) => void): void {
    for (const { sector, count, buffer } of requests) {
      const whole = [sector, count, buffer].every((value) => Number.isInteger(value) && value >= 0);
      if (!whole || count * VIRTIO_BLK_SECTOR_BYTES > BLOCK_BYTES || buffer + 1 >= this.#offsets.length) {
        throw new RangeError(`No disk request of ${count} sectors at ${sector} in buffer ${buffer}`);
      }
    }
    if (requests.length === 0) return done(undefined);
    const batch: Batch = { left: requests.length, error: undefined, done };
    for (const request of requests) this.#waiting.push({ request, batch });
    this.pump();
  }

  /** Offers what waits, as far as the ring has room. */
  pump(): void {
    let added = 0;
    while (this.#waiting.length > 0) {
      const { request, batch } = this.#waiting[0]!;
      this.#build(request);
      if (!this.#queue.addForeign(this.#chain, () => this.#finish(request, batch))) break;
      this.#waiting.shift();
      this.#out++;
      added++;
    }
    if (added > 0) this.#queue.publish();
  }

  #headOffset(buffer: number): number {
    return this.#offsets[0]! + buffer * SLOT_BYTES;
  }

  #build({ type, sector, count, buffer }: DiskRequest): void {
    const { layout, words, bytes } = this.#ram;
    const head = this.#headOffset(buffer);
    const word = head >> 2;
    words[word] = type;
    words[word + 1] = 0;
    words[word + 2] = sector % 2 ** 32;
    words[word + 3] = Math.floor(sector / 2 ** 32);
    bytes[head + STATUS_AT] = 0xff;
    logWrite(this.#ram, head, SLOT_BYTES);
    const chain = this.#chain;
    chain.clear();
    chain.addReadable(layout.gpa(head), VIRTIO_BLK_REQUEST_BYTES);
    if (count > 0) {
      const data = layout.gpa(this.#offsets[buffer + 1]!);
      if (type === VIRTIO_BLK_T.OUT) chain.addReadable(data, count * VIRTIO_BLK_SECTOR_BYTES);
      else chain.addWritable(data, count * VIRTIO_BLK_SECTOR_BYTES);
    }
    chain.addWritable(layout.gpa(head + STATUS_AT), 1);
  }

  #finish({ type, sector, count, buffer }: DiskRequest, batch: Batch): void {
    this.#out--;
    const status = this.#ram.bytes[this.#headOffset(buffer) + STATUS_AT]!;
    if (status !== VIRTIO_BLK_S.OK) batch.error ??= diskIoError(type, sector, count, status);
    if (--batch.left === 0) batch.done(batch.error);
  }
}

/** A request of the copy that the device did not do. */
export function diskIoError(type: number, sector: number, count: number, status: number): SvqError {
  const name = Object.entries(VIRTIO_BLK_T).find(([, number]) => number === type)?.[0] ?? `type ${type}`;
  return new SvqError("DISK_IO", `The disk failed a request of the copy: ${name} of ${count} sectors at ${sector}, status ${status}`, {
    hint: "a full or broken medium under the device; its own log says which",
  });
}
