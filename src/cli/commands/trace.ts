/** `svq trace`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { SvqError } from "../../errors.ts";
import { ControlClient } from "../../relay/control.ts";
import type { TracedMessage } from "../../relay/message_log.ts";
import { controlPath } from "../../relay/runtime_dir.ts";
import { fieldsText } from "../../vhost_user/describe.ts";
import type { CliContext } from "../context.ts";
import { captureFrames } from "../capture_frames.ts";
import { durationFlag, integerFlag, pathFlag, relayArgument } from "../parameters.ts";

interface Flags {
  readonly messages: boolean;
  readonly follow: boolean;
  readonly side?: "front" | "device";
  readonly pcapng?: string;
  readonly snaplen: number;
  readonly duration?: number;
}

/** How long one question to the relay waits for news, ms. */
const WAIT_MS = 1000;

interface Answer {
  messages: TracedMessage[];
  last: number;
}

const SENDERS = {
  front: { vmm: "vmm > relay", relay: "vmm < relay", device: "" },
  device: { relay: "relay > device", device: "relay < device", vmm: "" },
} as const;

function clock(timeUs: number): string {
  const iso = new Date(Math.floor(timeUs / 1000)).toISOString();
  return `${iso.slice(11, 23)}${String(timeUs % 1000).padStart(3, "0")}`;
}

function describe(message: TracedMessage): string {
  const { side, from, channel, request, reply, need_reply, fds, fields } = message;
  const words = [
    clock(message.time_us),
    SENDERS[side][from].padEnd(14),
    `${reply ? "  = " : ""}${request}${channel === "back-end" ? " (back-end channel)" : ""}`,
    fieldsText(fields),
    fds > 0 ? `fds=${fds}` : "",
    need_reply ? "need-reply" : "",
  ];
  return words.filter((part) => part !== "").join("  ");
}

/** `svq trace`. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Show what a VMM, a relay and a device say to each other",
    fullDescription:
      "Prints the vhost-user messages of a running relay, decoded: what the VMM asks of the relay and what the relay asks of the device. A relay always keeps its last 8192 messages, so what led to a problem is still there. Under -j each message is a line of JSON.\n\nExample:\n  svq trace vm1-disk --messages --follow\n\nWith --pcapng the frames of a network device go into a file for Wireshark instead, with their queue and direction; what the relay\nhas no room to keep is counted and not captured. Meanwhile all queues are behind shadow rings.\n\nExample:\n  svq trace vm1-net --pcapng - | tcpdump -r -",
  },
  parameters: {
    flags: {
      messages: { kind: "boolean", brief: "vhost-user messages (the default)", default: true },
      follow: { kind: "boolean", brief: "Go on with new messages until interrupted", default: false },
      pcapng: pathFlag("Capture the frames of a network device into this file, or to stdout (-), until interrupted", { optional: true }),
      snaplen: integerFlag("With --pcapng: most bytes kept of a frame", { default: "65535", min: 1, max: 65535 }),
      duration: durationFlag("With --pcapng: end after this time", { optional: true }),
      side: { kind: "enum", values: ["front", "device"], brief: "Only the VMM's side, or only the device's", optional: true },
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
    aliases: { f: "follow" },
  },
  async func(this: CliContext, { follow, side, pcapng, snaplen, duration }: Flags, name: string): Promise<void> {
    if (pcapng !== undefined) return await captureFrames(this, name, { path: pcapng, snapLength: snaplen, durationNs: duration });
    using client = ControlClient.connect(name, controlPath(name));
    const { signal } = this;
    let after = 0;
    do {
      let answer: Answer;
      try {
        answer = await client.call("messages", { after, wait_ms: follow && after > 0 ? WAIT_MS : 0 }) as Answer;
      } catch (error) {
        // The relay has ended, and with it the stream.
        if (follow && error instanceof SvqError && error.code === "CONTROL_CLOSED") return;
        throw error;
      }
      const { messages, last } = answer;
      for (const message of messages) {
        if (side !== undefined && message.side !== side) continue;
        this.output.record({ schema: "svq.trace.message/1", ...message }, () => describe(message));
      }
      after = last;
    } while (follow && !signal.aborted);
  },
});
