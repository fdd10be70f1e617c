/**
 * The errors of the WebAssembly core, which returns them as numbers (src/wasm/assembly/state.ts).
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { VringError, type VringRule } from "../vring/rules.ts";

/** What the core noted when it stopped. */
export interface ErrorFacts {
  /** Descriptor index, ring position or id that it is about. */
  index: number;
  /** What was found there, where that says more. */
  value: number;
  /** Size of the guest's ring. */
  num: number;
  /** Size of the device's ring. */
  deviceNum: number;
  /** Longest chain, in segments. */
  limit: number;
  /** Avail index of the device's ring. */
  published: number;
}

type Rule = readonly [VringRule, (facts: ErrorFacts) => string];

/** By number from 1. */
const RULES: readonly Rule[] = [
  ["AVAIL_INDEX_JUMP", ({ index, value, num }) => `The avail index is ${index} where ${value} was reached, with a queue of ${num}`],
  ["HEAD_OUT_OF_RANGE", ({ index, value, num }) => `Avail entry ${index} holds ${value} in a queue of ${num}`],
  ["HEAD_IN_FLIGHT", ({ index }) => `Descriptor ${index} is made available and is in flight`],
  ["CHAIN_LOOP", ({ index }) => `The chain at ${index} has more descriptors than its table, or than the ring has room`],
  ["ADDRESS_LIMIT", ({ index }) => `Descriptor ${index} of a chain ends above 2^52`],
  ["INDIRECT_NOT_NEGOTIATED", ({ index }) => `Descriptor ${index} is indirect`],
  ["INDIRECT_NESTED", ({ index }) => `Entry ${index} in the table of a chain is indirect`],
  ["INDIRECT_WITH_NEXT", ({ index }) => `Indirect descriptor ${index} goes on`],
  ["NEXT_OUT_OF_RANGE", ({ index }) => `A chain goes on at ${index}, beyond its table`],
  ["CHAIN_BYTES", ({ index }) => `The chain at ${index} has more than 2^32 bytes`],
  ["DESCRIPTOR_EMPTY", ({ index }) => `Descriptor ${index} of a chain has no bytes`],
  ["CHAIN_TOO_LONG", ({ index }) => `A chain has more segments than the queue takes (${index})`],
  ["OUTSIDE_MEMORY", ({ index }) => `Descriptor ${index} of a chain (or its indirect table) is not in memory`],
  ["READABLE_AFTER_WRITABLE", ({ index }) => `Descriptor ${index} of a chain is readable after a writable one`],
  ["INDIRECT_SIZE", ({ index }) => `The size of the indirect table of chain ${index} is no multiple of 16, or 0`],
  [
    "INDIRECT_TOO_LONG",
    ({ index, value, limit }) => `The indirect table of chain ${index} has ${value} descriptors, the limit is ${limit}`,
  ],
  ["PACKED_ID_OUT_OF_RANGE", ({ index, value, num }) => `The chain in slot ${index} has id ${value} in a queue of ${num}`],
  ["PACKED_ID_IN_FLIGHT", ({ index }) => `A chain has id ${index}, which is in flight`],
  ["PACKED_LIST_BROKEN", ({ index }) => `A chain goes on in slot ${index}, which is not available`],
  ["PACKED_INDIRECT_MIXED", ({ index }) => `A chain ends in an indirect table, in slot ${index}`],
  [
    "USED_INDEX_JUMP",
    ({ index, value, published }) => `The used index is ${index} where ${value} was reached and the avail index is ${published}`,
  ],
  ["USED_ID_OUT_OF_RANGE", ({ index, value, deviceNum }) => `Used entry ${index} holds ${value} in a queue of ${deviceNum}`],
  ["USED_NOT_IN_FLIGHT", ({ index }) => `A used entry holds ${index}, which the device does not have`],
];

/** The error that a negative result stands for. */
export function errorOf(result: number, facts: ErrorFacts): SvqError {
  const rule = RULES[-result - 1];
  if (rule !== undefined) return new VringError(rule[0], facts.index, rule[1](facts));
  switch (-result) {
    case 24:
      return new SvqError("LOG_TOO_SMALL", "Guest memory was written that lies outside the dirty log");
    case 25:
      return new SvqError("OUTSIDE_MEMORY", "A segment of a chain has no place in the device's address space");
    case 26:
      return new SvqError("CHAIN_TOO_LONG", `A chain has more than ${facts.index} segments for the device`);
    case 27:
      return new VringError(
        "IN_ORDER",
        facts.index,
        `A used entry ends a batch at chain ${facts.index}, beyond used index ${facts.value}`,
      );
    default:
      return new SvqError("INTERNAL", `The WebAssembly core says ${result}`);
  }
}
