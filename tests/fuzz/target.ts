/**
 * What is fuzzed: a target makes inputs from random numbers and from earlier inputs that showed something new, and runs them.
 *
 * @module
 */
import type { Random } from "./random.ts";

/** What one input has shown. */
export interface Outcome {
  /** Messages or mutations that it counted for. */
  count: number;
  /** How it ended, in a few words: an input with words that were not seen before goes to the pool. */
  signs: string[];
}

/** A target that is ready. `I` is plain JSON. */
export interface FuzzSession<I> extends AsyncDisposable {
  generate(random: Random, pool: readonly I[]): I;
  /** @param step to be called where a long run has got on: who watches for hangs counts from there @throws whatever must never happen */
  run(input: I, step: () => void): Promise<Outcome>;
}

/** One kind of hostile peer. */
export interface FuzzTarget {
  /** What is counted. */
  unit: "messages" | "mutations";
  /** How many make a full run. */
  full: number;
  /** How many the default test run takes. */
  quick: number;
  // deno-lint-ignore no-explicit-any
  open(): Promise<FuzzSession<any>>;
}

/** An error's text without its numbers: what it says, not of what. */
export function signOf(error: unknown): string {
  const { name, code, message } = error as { name?: string; code?: string; message?: string };
  return `${name} ${code}: ${message}`.replaceAll(/0x[0-9a-f]+|\d+/g, "#").slice(0, 160);
}

/** Throws where a sign tells of a fault of svq's own, instead of a peer's that was noticed. */
export function refuseFaults(signs: Iterable<string>): void {
  for (const sign of signs) {
    if (/^(Type|Range|Reference|Syntax|Assertion)Error|INTERNAL|WORKER_DIED/.test(sign)) throw new Error(`A fault of svq's own: ${sign}`);
  }
}

/** Bytes as JSON takes them. */
export const toText = (bytes: Uint8Array<ArrayBuffer>): string => bytes.toBase64();
/** The inverse of {@linkcode toText}. */
export const toBytes = (text: string): Uint8Array<ArrayBuffer> => Uint8Array.fromBase64(text) as Uint8Array<ArrayBuffer>;
