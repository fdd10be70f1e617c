/**
 * The control methods `iova`, `iova_alloc` and `iova_free`: the layout of a relay's address spaces, and what the operator takes
 * out of it. What was allocated stays when a front-end leaves and another one comes.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { IOTLB_PERM, type IovaAllocation, type IovaPermission } from "../iova/allocation.ts";
import { allocationDocument, type IovaDocument, iovaDocument } from "../iova/document.ts";
import type { ManualAllocation } from "./placed_memory.ts";
import type { Relay } from "./relay.ts";

/** Ranges that the operator can hold at a time: each may be a file of its own. */
const MAX_ALLOCATIONS = 256;

/** An allocation that a new relay gets again, where it was. */
export type KeptAllocation = ManualAllocation & { iova: number };

/** The layout of a relay, with its owner. */
export type RelayIovaDocument = IovaDocument & { relay: string; device: string };

function bad(message: string): SvqError {
  return new SvqError("BAD_PARAMETER", message, { exitCode: EXIT.usage });
}

function whole(params: Record<string, unknown>, name: string): number | undefined {
  const value = params[name];
  if (value === undefined) return undefined;
  if (typeof value !== "number" || !Number.isSafeInteger(value) || value < 0) throw bad(`${name} is a whole number of 0 or more`);
  return value;
}

function needed(params: Record<string, unknown>, name: string): number {
  const value = whole(params, name);
  if (value === undefined) throw bad(`${name} is missing`);
  return value;
}

function only(params: Record<string, unknown>, known: readonly string[]): void {
  for (const name of Object.keys(params)) if (!known.includes(name)) throw bad(`There is no parameter "${name}"`);
}

/** Checks what a client asks to allocate. Nothing that came through the socket is trusted. @throws SvqError BAD_PARAMETER */
export function allocationRequest(params: Record<string, unknown>): ManualAllocation {
  only(params, ["size", "iova", "align", "asid", "perm", "tag", "map"]);
  const { perm = "rw", tag = "operator", map = false } = params;
  if (typeof perm !== "string" || !Object.hasOwn(IOTLB_PERM, perm)) throw bad("perm is ro, wo or rw");
  if (typeof tag !== "string" || !/^[\x20-\x7e]{1,64}$/.test(tag)) throw bad("tag is 1 to 64 printable ASCII characters");
  if (typeof map !== "boolean") throw bad("map is true or false");
  return {
    size: needed(params, "size"),
    iova: whole(params, "iova"),
    align: whole(params, "align"),
    asid: whole(params, "asid"),
    perm: perm as IovaPermission,
    tag,
    map,
  };
}

/** What the operator has allocated in a relay, over the lives of its front-ends. */
export class RelayIova {
  readonly #kept: KeptAllocation[] = [];
  readonly #names: { name: string; device: string };

  /** Nothing is allocated. */
  constructor(names: { name: string; device: string }) {
    this.#names = names;
  }

  /** The document `svq.iova/1`. */
  show(relay: Relay): RelayIovaDocument {
    return { ...iovaDocument(relay.plan), relay: this.#names.name, device: this.#names.device };
  }

  /** Allocates; the layout as it is then, with what was allocated under `allocated`. */
  async alloc(relay: Relay, params: Record<string, unknown>): Promise<RelayIovaDocument & { allocated: unknown }> {
    const request = allocationRequest(params);
    if (this.#kept.length >= MAX_ALLOCATIONS) {
      throw new SvqError("TOO_MANY_ALLOCATIONS", `${MAX_ALLOCATIONS} ranges are allocated already`, {
        hint: "svq iova free gives them back",
      });
    }
    const made = await relay.placed.allocRange(request);
    this.#kept.push({ ...request, ...place(made) });
    return { ...this.show(relay), allocated: allocationDocument(made) };
  }

  /** Frees; the layout as it is then, with what was freed under `freed`. */
  async free(relay: Relay, params: Record<string, unknown>): Promise<RelayIovaDocument & { freed: unknown }> {
    only(params, ["iova", "size", "asid"]);
    const request = { iova: needed(params, "iova"), size: whole(params, "size"), asid: whole(params, "asid") };
    const freed = await relay.placed.freeRange(request);
    const { iova, asid } = place(freed);
    const index = this.#kept.findIndex((one) => one.iova === iova && one.asid === asid);
    if (index >= 0) this.#kept.splice(index, 1);
    return { ...this.show(relay), freed: allocationDocument(freed) };
  }

  /** What is allocated, as plain data: for a relay in another process. */
  get kept(): readonly KeptAllocation[] {
    return this.#kept;
  }

  /** Takes over what a relay in another process has {@linkcode kept}; to be called before {@linkcode restore}. */
  adopt(kept: readonly KeptAllocation[]): void {
    this.#kept.push(...kept);
  }

  /** Allocates everything again in a new relay. What its device cannot hold any more is forgotten, and `warn` is told. */
  async restore(relay: Relay, warn: (message: string) => void): Promise<void> {
    // All at once: what the front-end sets up comes behind the last of them.
    await Promise.all(this.#kept.map(async (request) => {
      try {
        await relay.placed.allocRange(request);
      } catch (error) {
        this.#kept.splice(this.#kept.indexOf(request), 1);
        warn(`${request.tag} at 0x${request.iova.toString(16)} cannot be allocated any more: ${toErrorRecord(error).message}`);
      }
    }));
  }
}

function place({ iova, size, asid }: IovaAllocation): { iova: number; size: number; asid: number } {
  return { iova: Number(iova), size: Number(size), asid };
}
