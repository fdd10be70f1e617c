/**
 * An ordered set of disjoint extents [start, end), each with a value: a balanced (AVL) tree in which every node also knows
 * the longest extent below it, so that "the highest extent of at least n units" takes O(log n) like everything else.
 *
 * Units are the caller's (pages in the allocator, bytes in the plan); all bounds are integers of at most 2^52, which numbers
 * hold exactly. The caller keeps extents disjoint: {@linkcode ExtentTree.firstOverlap} tells.
 *
 * @module
 */

/** One extent, `start` inclusive and `end` exclusive. */
export interface Extent<V> {
  /** First unit. */
  readonly start: number;
  /** One past the last unit. */
  readonly end: number;
  /** What the caller keeps with it. */
  readonly value: V;
}

interface Node<V> {
  start: number;
  end: number;
  value: V;
  left: Node<V> | null;
  right: Node<V> | null;
  height: number;
  /** Length of the longest extent in this subtree. */
  longest: number;
}

/** Which end of the space, and of the extent, a fit is taken from. */
export type FitEnd = "highest" | "lowest";

/** See the module text. */
export class ExtentTree<V> {
  /** Nodes looked at since the tree was made: what tests and benchmarks count instead of time. */
  visits = 0;
  #root: Node<V> | null = null;
  #size = 0;
  #units = 0;

  /** Number of extents. */
  get size(): number {
    return this.#size;
  }

  /** Sum of all lengths. */
  get units(): number {
    return this.#units;
  }

  /** Length of the longest extent, 0 when there is none. */
  get longest(): number {
    return this.#root?.longest ?? 0;
  }

  /** Levels of the tree: at most 1.45 log2(size + 2). */
  get height(): number {
    return this.#root?.height ?? 0;
  }

  /** The extent that holds `unit`. */
  at(unit: number): Extent<V> | undefined {
    let node = this.#root;
    while (node !== null) {
      this.visits++;
      if (unit < node.start) node = node.left;
      else if (unit >= node.end) node = node.right;
      else return node;
    }
    return undefined;
  }

  /** The lowest extent that shares a unit with [start, end). */
  firstOverlap(start: number, end: number): Extent<V> | undefined {
    let node = this.#root;
    let found: Node<V> | undefined;
    while (node !== null) {
      this.visits++;
      if (node.end > start) {
        if (node.start < end) found = node;
        node = node.left;
      } else {
        node = node.right;
      }
    }
    return found;
  }

  /**
   * Where `length` units fit at one end of the space, in one extent, at a position congruent to `phase` modulo `align`.
   *
   * O(log n) for `align` 1; otherwise plus the extents that are long enough and yet hold no such position.
   *
   * @returns the position, or -1 when there is none
   */
  fit(length: number, { end, align = 1, phase = 0 }: { end: FitEnd; align?: number; phase?: number }): number {
    return end === "highest" ? this.#highest(this.#root, length, align, phase) : this.#lowest(this.#root, length, align, phase);
  }

  /** Adds an extent that overlaps no other. */
  insert(start: number, end: number, value: V): void {
    this.#root = this.#insert(this.#root, start, end, value);
    this.#size++;
    this.#units += end - start;
  }

  /** Removes the extent that begins at `start`. @returns whether there was one */
  remove(start: number): boolean {
    const before = this.#size;
    this.#root = this.#remove(this.#root, start);
    return this.#size < before;
  }

  /** Gives the extent that begins at `start` new bounds, which must not reach or cross a neighbour. */
  resize(start: number, newStart: number, newEnd: number): void {
    this.#resize(this.#root, start, newStart, newEnd);
  }

  /** All extents in order. */
  *[Symbol.iterator](): IterableIterator<Extent<V>> {
    const path: Node<V>[] = [];
    let node = this.#root;
    while (node !== null || path.length > 0) {
      for (; node !== null; node = node.left) path.push(node);
      const next: Node<V> = path.pop()!;
      yield next;
      node = next.right;
    }
  }

  #highest(node: Node<V> | null, length: number, align: number, phase: number): number {
    if (node === null || node.longest < length) return -1;
    this.visits++;
    const right = this.#highest(node.right, length, align, phase);
    if (right >= 0) return right;
    const position = lowerTo(node.end - length, align, phase);
    if (position >= node.start) return position;
    return this.#highest(node.left, length, align, phase);
  }

  #lowest(node: Node<V> | null, length: number, align: number, phase: number): number {
    if (node === null || node.longest < length) return -1;
    this.visits++;
    const left = this.#lowest(node.left, length, align, phase);
    if (left >= 0) return left;
    const position = raiseTo(node.start, align, phase);
    if (position + length <= node.end) return position;
    return this.#lowest(node.right, length, align, phase);
  }

  #insert(node: Node<V> | null, start: number, end: number, value: V): Node<V> {
    if (node === null) return { start, end, value, left: null, right: null, height: 1, longest: end - start };
    this.visits++;
    if (start < node.start) node.left = this.#insert(node.left, start, end, value);
    else node.right = this.#insert(node.right, start, end, value);
    return balance(node);
  }

  #remove(node: Node<V> | null, start: number): Node<V> | null {
    if (node === null) return null;
    this.visits++;
    if (start < node.start) {
      node.left = this.#remove(node.left, start);
    } else if (start > node.start) {
      node.right = this.#remove(node.right, start);
    } else {
      this.#size--;
      this.#units -= node.end - node.start;
      if (node.left === null) return node.right;
      if (node.right === null) return node.left;
      let successor = node.right;
      while (successor.left !== null) successor = successor.left;
      // The nodes are relinked, not copied: an extent that somebody holds stays the same extent.
      successor.right = this.#removeLowest(node.right);
      successor.left = node.left;
      return balance(successor);
    }
    return balance(node);
  }

  #removeLowest(node: Node<V>): Node<V> | null {
    this.visits++;
    if (node.left === null) return node.right;
    node.left = this.#removeLowest(node.left);
    return balance(node);
  }

  #resize(node: Node<V> | null, start: number, newStart: number, newEnd: number): void {
    if (node === null) return;
    this.visits++;
    if (start === node.start) {
      this.#units += (newEnd - newStart) - (node.end - node.start);
      node.start = newStart;
      node.end = newEnd;
    } else {
      this.#resize(start < node.start ? node.left : node.right, start, newStart, newEnd);
    }
    update(node);
  }
}

/** The highest position of at most `value` that is congruent to `phase` modulo `align`; may be negative. */
function lowerTo(value: number, align: number, phase: number): number {
  if (align === 1) return value;
  const rest = (value - phase) % align;
  return value - (rest < 0 ? rest + align : rest);
}

/** The lowest position of at least `value` that is congruent to `phase` modulo `align`. */
function raiseTo(value: number, align: number, phase: number): number {
  const low = lowerTo(value, align, phase);
  return low === value ? value : low + align;
}

function update<V>(node: Node<V>): void {
  const { left, right } = node;
  node.height = 1 + Math.max(left === null ? 0 : left.height, right === null ? 0 : right.height);
  node.longest = Math.max(node.end - node.start, left === null ? 0 : left.longest, right === null ? 0 : right.longest);
}

/** Height of the left subtree minus that of the right. */
function lean<V>(node: Node<V>): number {
  return (node.left === null ? 0 : node.left.height) - (node.right === null ? 0 : node.right.height);
}

function balance<V>(node: Node<V>): Node<V> {
  const side = lean(node);
  if (side > 1) {
    if (lean(node.left!) < 0) node.left = rotateLeft(node.left!);
    return rotateRight(node);
  }
  if (side < -1) {
    if (lean(node.right!) > 0) node.right = rotateRight(node.right!);
    return rotateLeft(node);
  }
  update(node);
  return node;
}

function rotateLeft<V>(node: Node<V>): Node<V> {
  const top = node.right!;
  node.right = top.left;
  top.left = node;
  update(node);
  update(top);
  return top;
}

function rotateRight<V>(node: Node<V>): Node<V> {
  const top = node.left!;
  node.left = top.right;
  top.right = node;
  update(node);
  update(top);
  return top;
}
