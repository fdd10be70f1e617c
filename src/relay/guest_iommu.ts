/**
 * A guest with an IOMMU (ACCESS_PLATFORM): its rings and descriptors name IOVAs, and the VMM tells what they are mapped to.
 * The relay keeps a table of what it was told, asks for what it lacks, and gives the device guest memory only: the device
 * needs no support for any of this, and the dirty log is kept by GPA.
 *
 * Source: vhost-user protocol, "IOMMU support".
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { Iotlb, type IotlbEntry, IotlbMiss } from "../iova/iotlb.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import { ACCESS } from "../uapi/vhost.ts";
import type { VringAddresses } from "../vhost/backend.ts";
import type { RingMemory } from "../vring/queue.ts";
import { pause } from "./ring_rest.ts";
import type { WorkerCommand } from "./messages.ts";
import { RingWindow } from "./ring_window.ts";

/** How long a VMM may take to say what an address is mapped to, ms. */
const ANSWER_MS = 10_000;
/** How long an invalidation waits for the buffers in its range, ms: a correct driver unmaps none that the device holds. */
const USERS_MS = 5_000;
/** An invalidation of so much is a flush of the whole cache, not the end of single mappings. */
const FLUSH_BYTES = 2 ** 36;

/** The VMM is asked for an address. */
interface Question {
  iova: number;
  perm: number;
  /** A mapping of it has come since, and the Workers have heard of it: perhaps it has been taken back since, too. */
  told: Promise<void>;
  tell: () => void;
  hasBeenTold: boolean;
  /** Resolves when it has been told. @throws SvqError IOTLB_FAULT */
  settled: Promise<void>;
}

/** What a {@linkcode GuestIommu} asks its relay. */
export interface IommuContext {
  /** Tells all Workers, and resolves when they have heard it; the sum of the counts in their answers. */
  tell: (command: WorkerCommand) => Promise<number>;
  /** Asks the VMM. @throws SvqError when it says that nothing is mapped there */
  ask: (iova: number, perm: number) => Promise<void>;
  /** Something has become known: rings may start. */
  known: () => void;
  /** Forgets where rings in `[iova, iova + size)` lie; those that run are taken away from the device, unless it is a mere `flush`. */
  unmapRings: (iova: number, size: number, flush: boolean) => Promise<void>;
  /** A line for the log. */
  log: (message: string) => void;
}

/** Counters for the status. */
export interface IommuStatus {
  /** Ranges in the table. */
  entries: number;
  /** Times that the VMM was asked. */
  misses: number;
  /** Ranges that it told. */
  updates: number;
  /** Ranges that it took back. */
  invalidations: number;
}

/** The main thread's part. */
export class GuestIommu {
  /** What is known. */
  readonly table: Iotlb = new Iotlb();
  readonly #context: IommuContext;
  readonly #questions = new Map<string, Question>();
  #misses = 0;
  #updates = 0;
  #invalidations = 0;

  /** Nothing is known. */
  constructor(context: IommuContext) {
    this.#context = context;
  }

  /** Counters. */
  get status(): IommuStatus {
    return { entries: this.table.count, misses: this.#misses, updates: this.#updates, invalidations: this.#invalidations };
  }

  /** The VMM tells a mapping; resolves when the Workers know it. */
  async update(entry: IotlbEntry): Promise<void> {
    this.#updates++;
    this.table.update(entry);
    await this.#context.tell({ type: "iotlb", update: entry });
    for (const question of this.#questions.values()) {
      const { iova, perm } = question;
      if (iova >= entry.iova && iova < entry.iova + entry.size && (entry.perm & perm) === perm) question.tell();
    }
    this.#context.known();
  }

  /**
   * The VMM takes mappings back. Resolves when no chain at the device uses them any more. A flush of everything waits for none:
   * what the device holds is still mapped then, and stays translated until it comes back.
   */
  async invalidate(iova: number, size: number): Promise<void> {
    this.#invalidations++;
    const whole = size === 0 || size >= FLUSH_BYTES;
    const range = whole ? { iova: 0, size: 2 ** 52 } : { iova, size };
    this.table.invalidate(range.iova, range.size);
    await this.#context.tell({ type: "iotlb", invalidate: range });
    await this.#context.unmapRings(range.iova, range.size, whole);
    if (whole) return;
    const deadline = performance.now() + USERS_MS;
    for (let wait = 0; await this.#context.tell({ type: "usesIova", iova, size }) > 0; wait = Math.min(wait + 1, 10)) {
      if (performance.now() > deadline) {
        this.#context.log(
          `the guest unmaps 0x${iova.toString(16)}+${size} although the device holds a buffer there: it is not waited for any longer`,
        );
        return;
      }
      await pause(wait);
    }
  }

  /**
   * A ring has stopped, or a driver starts: mappings may end from now on without a word, since a VMM does not listen to the guest's
   * IOMMU for a device that is stopped. Whatever still runs asks again.
   */
  async flush(): Promise<void> {
    this.table.clear();
    await this.#context.tell({ type: "iotlb", forget: true });
    await this.#context.unmapRings(0, 2 ** 52, true);
  }

  /** Guest memory under the IOVAs that are known, for dumps. */
  memory(memory: GuestMemory): RingMemory {
    return {
      contains: (iova, length) => this.table.run(iova, length, ACCESS.RO) === length,
      buffer: (iova, length) => memory.buffer(this.table.gpaOf(iova, ACCESS.RO), length),
    };
  }

  /** Forgets everything: the device is reset. */
  async forget(): Promise<void> {
    this.table.clear();
    for (const question of this.#questions.values()) question.tell();
    await this.#context.tell({ type: "iotlb", forget: true });
  }

  /**
   * A Worker, or a ring that is to start, needs an address. Resolves when it has been told since, which does not mean that it is
   * known still: a mapping may end before the answer to the question is read, which comes on another socket. Whoever misses it
   * then asks anew, and is not taken for the one before.
   *
   * @throws SvqError IOTLB_FAULT
   */
  miss(iova: number, perm: number): Promise<void> {
    const key = `${iova} ${perm}`;
    const asked = this.#questions.get(key);
    if (asked !== undefined && !asked.hasBeenTold) return asked.settled;
    const { promise: told, resolve } = Promise.withResolvers<void>();
    const question: Question = {
      ...{ iova, perm, told, hasBeenTold: false },
      tell: () => {
        question.hasBeenTold = true;
        resolve();
      },
      settled: Promise.resolve(),
    };
    this.#questions.set(key, question);
    question.settled = this.#resolve(question).finally(() => {
      if (this.#questions.get(key) === question) this.#questions.delete(key);
    });
    return question.settled;
  }

  async #resolve(question: Question): Promise<void> {
    const { iova, perm, told } = question;
    if (this.#known(iova, perm)) {
      question.tell();
      // A Worker's table may have been emptied since.
      await this.#context.tell({ type: "iotlb", update: this.table.entryAt(iova)! });
      return;
    }
    this.#misses++;
    try {
      await this.#context.ask(iova, perm);
    } catch (cause) {
      // It was told to others meanwhile, and has been unmapped since.
      if (question.hasBeenTold) return;
      throw fault(iova, perm, cause);
    }
    if (question.hasBeenTold) return;
    // The answer and the mapping come on two sockets.
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<never>((_, reject) => timer = setTimeout(() => reject(fault(iova, perm, undefined)), ANSWER_MS));
    await Promise.race([told, late]).finally(() => clearTimeout(timer));
  }

  #known(iova: number, perm: number): boolean {
    return this.table.run(iova, 1, perm) === 1;
  }

  /**
   * Maps a ring.
   *
   * @param at IOVAs
   * @param failed called when the VMM knows of no mapping
   * @returns undefined when something is not known yet: the VMM has been asked
   * @throws SvqError RING_OUTSIDE_MEMORY, RING_UNALIGNED
   */
  ring(memory: GuestMemory, at: VringAddresses, num: number, packed: boolean, failed: (error: unknown) => void): RingWindow | undefined {
    try {
      return RingWindow.map(this.table, memory, at, num, packed);
    } catch (error) {
      if (!(error instanceof IotlbMiss)) throw error;
      this.miss(error.iova, error.perm).catch(failed);
      return undefined;
    }
  }
}

function fault(iova: number, perm: number, cause: unknown): SvqError {
  const use = perm === ACCESS.RO ? "reading" : perm === ACCESS.WO ? "writing" : "reading and writing";
  return new SvqError("IOTLB_FAULT", `The guest's IOMMU maps nothing at 0x${iova.toString(16)} for ${use}`, { cause });
}
