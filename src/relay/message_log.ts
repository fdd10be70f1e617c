/**
 * The last vhost-user messages of a relay, of both its sides. Messages are rare (none belongs to the data path), so they
 * are always kept: when something has gone wrong, what led to it is still there. They are put into words when asked for.
 *
 * @module
 */
import type { Channel } from "../uapi/vhost_user.ts";
import type { MessageHook } from "../vhost_user/connection.ts";
import { describeMessage, type MessageFields } from "../vhost_user/describe.ts";

/** Messages kept. */
const CAPACITY = 8192;
/** Bytes kept of each; a table of 8 regions has 264, what QEMU reads of a configuration 268. */
const PAYLOAD_LIMIT = 512;

/** Which connection: the VMM's or the device's. */
export type RelaySide = "front" | "device";

/** One message, decoded. */
export interface TracedMessage {
  /** Number of the message, from 1. */
  seq: number;
  /** When, microseconds since 1970. */
  time_us: number;
  /** Which connection of the relay. */
  side: RelaySide;
  /** Who sent it. */
  from: "vmm" | "relay" | "device";
  /** Whose requests travel on this socket. */
  channel: Channel;
  /** Name of the request, `SET_VRING_ADDR`. */
  request: string;
  /** Is it the answer? */
  reply: boolean;
  /** Was an answer asked for with NEED_REPLY? */
  need_reply: boolean;
  /** Descriptors that came along. */
  fds: number;
  /** What it says. */
  fields: MessageFields;
}

interface Kept {
  seq: number;
  timeUs: number;
  side: RelaySide;
  direction: "in" | "out";
  channel: Channel;
  request: number;
  flags: number;
  payload: Uint8Array<ArrayBuffer>;
  fds: number;
}

/** Keeps messages and hands them out. */
export class MessageLog {
  readonly #kept: Kept[] = [];
  #seq = 0;
  #waiting: (() => void)[] = [];

  /** Number of the newest message; 0 before the first. */
  get last(): number {
    return this.#seq;
  }

  /** A hook for the connections of one side. */
  hook(side: RelaySide): MessageHook {
    return (direction, request, flags, payload, fds, channel) => {
      const timeUs = Math.round((performance.timeOrigin + performance.now()) * 1000);
      const copy = payload.slice(0, PAYLOAD_LIMIT);
      const message = { seq: ++this.#seq, timeUs, side, direction, channel, request, flags, payload: copy, fds };
      // A ring once it is full: the slot of a message is its number.
      this.#kept[(message.seq - 1) % CAPACITY] = message;
      if (this.#waiting.length > 0) { for (const wake of this.#waiting.splice(0)) wake(); }
    };
  }

  /** Messages with numbers above `after` that are still there, oldest first. @param limit at most so many */
  since(after: number, limit: number = CAPACITY): TracedMessage[] {
    const first = Math.max(after + 1, this.#seq - CAPACITY + 1, 1);
    const messages: TracedMessage[] = [];
    for (let seq = first; seq <= this.#seq && messages.length < limit; seq++) messages.push(decode(this.#kept[(seq - 1) % CAPACITY]!));
    return messages;
  }

  /** Resolves when there is a message above `after`, or after `timeoutMs`. */
  async wait(after: number, timeoutMs: number): Promise<void> {
    if (this.#seq > after || timeoutMs <= 0) return;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const woken = new Promise<void>((resolve) => this.#waiting.push(resolve));
    const late = new Promise<void>((resolve) => timer = setTimeout(resolve, timeoutMs));
    await Promise.race([woken, late]);
    clearTimeout(timer);
  }
}

function decode(kept: Kept): TracedMessage {
  const { seq, timeUs, side, direction, channel, fds } = kept;
  const { name, reply, needReply, fields } = describeMessage(channel, kept.request, kept.flags, kept.payload);
  const peer = side === "front" ? "vmm" : "device";
  return {
    seq,
    time_us: timeUs,
    side,
    from: direction === "in" ? peer : "relay",
    channel,
    request: name,
    reply,
    need_reply: needReply,
    fds,
    fields,
  };
}
