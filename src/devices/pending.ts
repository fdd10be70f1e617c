/**
 * Requests whose time has not come: a binary min-heap by due time, first come first served among equals.
 *
 * @module
 */
import { Chain } from "../vring/queue.ts";

/** A request in flight. Reused: a free one keeps its chain record. */
export class PendingRequest {
  /** Milliseconds of performance.now(). */
  due = 0;
  /** Order of arrival. */
  order = 0;
  /** What was asked. */
  readonly chain: Chain;

  /** A record for chains of up to `capacity` segments of queue `queue`. */
  constructor(readonly queue: number, capacity: number) {
    this.chain = new Chain(capacity);
  }
}

function before(a: PendingRequest, b: PendingRequest): boolean {
  return a.due < b.due || (a.due === b.due && a.order < b.order);
}

/** The heap. */
export class PendingHeap {
  #heap: PendingRequest[] = [];
  #order = 0;

  /** Requests in it. */
  get size(): number {
    return this.#heap.length;
  }

  /** When the next one is due; Infinity when it is empty. */
  get nextDue(): number {
    return this.#heap[0]?.due ?? Infinity;
  }

  /** Adds a request whose `due` is set. */
  push(request: PendingRequest): void {
    request.order = this.#order++;
    const heap = this.#heap;
    let at = heap.push(request) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!before(request, heap[parent]!)) break;
      heap[at] = heap[parent]!;
      at = parent;
    }
    heap[at] = request;
  }

  /** Takes the next one that is due at `now`. */
  popDue(now: number): PendingRequest | undefined {
    const first = this.#heap[0];
    if (first === undefined || first.due > now) return undefined;
    const last = this.#heap.pop()!;
    if (last !== first) this.#sink(last);
    return first;
  }

  #sink(request: PendingRequest): void {
    const heap = this.#heap;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && before(heap[child + 1]!, heap[child]!)) child++;
      if (!before(heap[child]!, request)) break;
      heap[at] = heap[child]!;
      at = child;
    }
    heap[at] = request;
  }

  /** Takes out the requests of one queue, due or not. */
  remove(queue: number): PendingRequest[] {
    const gone = this.#heap.filter((request) => request.queue === queue);
    const rest = this.#heap.filter((request) => request.queue !== queue);
    this.#heap = [];
    for (const request of rest.sort((a, b) => a.order - b.order)) this.push(request);
    return gone;
  }
}
