/**
 * What a front-end and a relay say to each other (`svq trace --messages`), as text that is the same in every run, and its
 * comparison with what was recorded: tests/vhost_user/golden/NAME.txt. With `SVQ_RECORD=1` it is recorded instead.
 *
 * @module
 */
import assert from "node:assert/strict";
import type { TracedMessage } from "../../src/relay/message_log.ts";
import { fieldsText, type MessageFields } from "../../src/vhost_user/describe.ts";

/** Addresses in a ring's message: where the guest's kernel happened to put it. */
const RING_ADDRESSES = ["desc", "used", "avail", "log"];

// The front-end's own addresses differ from run to run; which region is which does not.
class Names {
  readonly #known = new Map<unknown, string>();

  of(uaddr: unknown): string {
    let name = this.#known.get(uaddr);
    if (name === undefined) this.#known.set(uaddr, name = `memory${this.#known.size}`);
    return name;
  }
}

function steady(fields: MessageFields, names: Names): MessageFields {
  const result = { ...fields };
  if ("uaddr" in result) result.uaddr = names.of(result.uaddr);
  // An application in place of a guest has no other addresses than its own.
  if (result.gpa !== undefined && fields.gpa === fields.uaddr) result.gpa = result.uaddr;
  if (Array.isArray(result.regions)) result.regions = result.regions.map((region: MessageFields) => steady(region, names));
  for (const name of RING_ADDRESSES) if (name in result) result[name] = result[name] === "0x0" ? "0x0" : "address";
  return result;
}

/** The front-end's side of a trace, one line for each message: who, what, its fields, descriptors, and `?` where an answer is wanted. */
export function conversation(messages: readonly TracedMessage[]): string[] {
  const names = new Names();
  return messages.filter(({ side }) => side === "front").map(({ from, request, reply, need_reply, fds, channel, fields }) => {
    // How large the relay makes an in-flight region is its own affair.
    const shown = request.endsWith("_INFLIGHT_FD") ? {} : steady(fields, names);
    // How far a ring has come is the guest's doing.
    if (request.endsWith("_VRING_BASE") && typeof shown.value === "number" && shown.value > 0) shown.value = "n";
    const words = [from, channel === "back-end" ? "(back-end channel)" : "", reply ? `= ${request}` : request, fieldsText(shown)];
    if (fds > 0) words.push(`fds=${fds}`);
    if (need_reply) words.push("?");
    return words.filter((word) => word !== "").join(" ");
  });
}

/** Compares a conversation with the recorded one of that name. */
export async function assertConversation(name: string, messages: readonly TracedMessage[]): Promise<void> {
  const url = new URL(`../vhost_user/golden/${name}.txt`, import.meta.url);
  const lines = conversation(messages);
  if (Deno.env.get("SVQ_RECORD") === "1") return await Deno.writeTextFile(url, `${lines.join("\n")}\n`);
  assert.deepEqual(lines, (await Deno.readTextFile(url)).trimEnd().split("\n"), `${name}: see tests/support/conversation.ts`);
}
