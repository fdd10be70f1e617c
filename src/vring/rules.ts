/**
 * The rules that a vring can break, each with its place in the virtio 1.3 specification, and the error that names one.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** A rule of the virtio specification, or of this program, about the contents of a vring. */
export interface VringRuleInfo {
  /** Section of virtio 1.3; `svq` for a limit of this program. */
  readonly spec: string;
  /** The rule in one sentence. */
  readonly text: string;
}

/** Every rule, keyed by its code; {@linkcode VringError.code} and `svq vring verify` use the same codes. */
export const VRING_RULES = {
  RING_SIZE: { spec: "2.6", text: "The queue size is a number from 1 to 32768, a power of two for split rings" },
  RING_ALIGNMENT: { spec: "2.7", text: "Each part of the ring is aligned and as long as its layout says" },
  BASE_INVALID: { spec: "2.7.8", text: "At most queue-size chains lie between the used index and the avail index" },
  AVAIL_INDEX_JUMP: { spec: "2.7.13.3.1", text: "The avail index moves ahead by at most the queue size" },
  USED_INDEX_JUMP: { spec: "2.7.8", text: "The used index moves ahead by at most the number of outstanding chains" },
  HEAD_OUT_OF_RANGE: { spec: "2.7.6", text: "An entry of the avail ring is the index of a descriptor" },
  HEAD_IN_FLIGHT: { spec: "2.7.13", text: "A chain is not made available again before the device has used it" },
  NEXT_OUT_OF_RANGE: { spec: "2.7.5", text: "The next field of a descriptor is the index of a descriptor of the same table" },
  CHAIN_LOOP: { spec: "2.7.5.2", text: "A descriptor chain has no loop" },
  CHAIN_TOO_LONG: { spec: "2.7.5.3.1", text: "A descriptor chain is no longer than the device allows" },
  CHAIN_BYTES: { spec: "2.7.5.2", text: "A descriptor chain describes at most 2^32 bytes" },
  READABLE_AFTER_WRITABLE: { spec: "2.7.4.2", text: "Device-readable descriptors come before device-writable ones" },
  DESCRIPTOR_EMPTY: { spec: "2.7.5", text: "A descriptor describes at least one byte" },
  DESCRIPTOR_FLAGS: { spec: "2.7.5", text: "Only defined bits are set in the flags of a descriptor" },
  ADDRESS_LIMIT: { spec: "svq", text: "A buffer ends at or below 2^52" },
  OUTSIDE_MEMORY: { spec: "2.7.5", text: "A buffer lies in the guest's memory" },
  INDIRECT_NOT_NEGOTIATED: { spec: "2.7.5.3.1", text: "Indirect tables are used only where INDIRECT_DESC was negotiated" },
  INDIRECT_NESTED: { spec: "2.7.5.3.1", text: "An indirect table holds no descriptor that refers to another one" },
  INDIRECT_WITH_NEXT: { spec: "2.7.5.3.1", text: "A descriptor that refers to an indirect table ends its chain" },
  INDIRECT_SIZE: { spec: "2.7.5.3", text: "An indirect table is a multiple of 16 bytes and not empty" },
  INDIRECT_TOO_LONG: { spec: "2.7.5.3.1", text: "An indirect table is no longer than the device allows" },
  USED_ID_OUT_OF_RANGE: { spec: "2.7.8", text: "A used element names the head of a chain" },
  USED_NOT_IN_FLIGHT: { spec: "2.7.8.2", text: "The device uses a chain that it was given, and once" },
  USED_LENGTH: { spec: "2.7.8.2", text: "The used length is at most what the device may write" },
  IN_ORDER: { spec: "2.7.9", text: "With IN_ORDER chains are used in the order in which they were made available" },
  IN_ORDER_NEXT: { spec: "2.7.5.2", text: "With IN_ORDER a chain takes descriptors in table order" },
  SUPPRESSION_FLAGS: { spec: "2.7.7.1", text: "Suppression flags are 0 or 1, and 0 with EVENT_IDX" },
  DESCRIPTOR_SHARED: { spec: "2.7.13.1", text: "A descriptor belongs to one outstanding chain" },
  PACKED_LIST_BROKEN: { spec: "2.8.17", text: "Every descriptor of a list is available when its first one is" },
  PACKED_ID_OUT_OF_RANGE: { spec: "2.8.13", text: "A buffer id is below the queue size" },
  PACKED_ID_IN_FLIGHT: { spec: "2.8.21.1", text: "A buffer id belongs to one outstanding buffer" },
  PACKED_INDIRECT_FLAGS: { spec: "2.8.19", text: "Only WRITE is set in the flags inside an indirect table" },
  PACKED_INDIRECT_MIXED: { spec: "2.8.19", text: "A list is either linked or one indirect table" },
  PACKED_EVENT_FLAGS: { spec: "2.8.10", text: "Event flags are 0, 1, or with EVENT_IDX 2; 3 is reserved" },
  PACKED_EVENT_OFFSET: { spec: "2.8.10", text: "The event offset lies in the ring" },
  PACKED_WRAP_COUNTER: { spec: "2.8.1", text: "The descriptors of one lap through the ring carry one wrap counter" },
  STATE_INVALID: { spec: "svq", text: "A saved state fits the ring that it is loaded into" },
} as const satisfies Record<string, VringRuleInfo>;

/** Code of a rule. */
export type VringRule = keyof typeof VRING_RULES;

/** A broken rule that a look at a ring has found, as `svq vring verify` reports it. */
export interface Anomaly {
  /** Code of the rule. */
  rule: VringRule;
  /** Section of virtio 1.3; `svq` for a limit of this program. */
  spec: string;
  /** Descriptor index, ring position or id that it is about; null when there is none. */
  index: number | null;
  /** What was found, for a reader. */
  detail: string;
}

/** A finding about `rule`. @param index descriptor index, ring position or id; null for none */
export function anomaly(rule: VringRule, index: number | null, detail: string): Anomaly {
  return { rule, spec: VRING_RULES[rule].spec, index, detail };
}

/** A ring broke a rule. The queue must not be used any further; other queues can. */
export class VringError extends SvqError {
  /** The class, for logs. */
  override readonly name: string = "VringError";
  /** The rule, also the error's `code`. */
  readonly rule: VringRule;
  /** Section of virtio 1.3 that has the rule; `svq` for a limit of this program. */
  readonly spec: string;
  /** Descriptor index, ring position or id that the error is about; -1 when there is none. */
  readonly index: number;

  /**
   * Names the rule; the message carries its section and text.
   *
   * @param rule what was broken
   * @param index descriptor index, ring position or id; -1 for none
   * @param detail what was found, for a reader
   */
  constructor(rule: VringRule, index: number, detail: string) {
    const { spec, text } = VRING_RULES[rule];
    super(rule, `${detail} (${spec === "svq" ? "" : `virtio 1.3, ${spec}: `}${text})`);
    this.rule = rule;
    this.spec = spec;
    this.index = index;
  }
}
