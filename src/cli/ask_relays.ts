/**
 * Questions to all relays of this user at once.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import { ControlClient } from "../relay/control.ts";
import { controlPath, relayNames } from "../relay/runtime_dir.ts";
import type { RelayStatus } from "../relay/status.ts";

/** Relays asked at the same time: each takes a descriptor, of which a process may have no more than 1024. */
const AT_ONCE = 400;
/** How long one may take to answer, ms. */
const ANSWER_MS = 2000;

/** A control socket without a relay that answers. */
export interface DeadRelay {
  /** Name of the relay. */
  name: string;
  /** An error code: NO_SUCH_RELAY where nobody listens, RELAY_SILENT, or what went wrong. */
  code: string;
  /** In words. */
  message: string;
}

/** What became of the question. */
export interface AllRelays {
  /** Relays that run, by name. */
  relays: RelayStatus[];
  /** Control sockets that nobody answers at, by name: a relay that was killed leaves one behind. */
  dead: DeadRelay[];
}

/** Asks every relay that has a control socket for its status. @param answerMs how long one may take to answer, ms */
export async function askAllRelays(answerMs: number = ANSWER_MS): Promise<AllRelays> {
  const names = relayNames();
  const answers: (RelayStatus | DeadRelay | undefined)[] = [];
  let next = 0;
  const askOn = async () => {
    while (next < names.length) {
      const at = next++;
      answers[at] = await askOne(names[at]!, answerMs);
    }
  };
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, names.length) }, askOn));
  const relays: RelayStatus[] = [];
  const dead: DeadRelay[] = [];
  for (const answer of answers) {
    if (answer === undefined) continue;
    if ("schema" in answer) relays.push(answer);
    else dead.push(answer);
  }
  return { relays, dead };
}

async function askOne(name: string, answerMs: number): Promise<RelayStatus | DeadRelay | undefined> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    using client = ControlClient.connect(name, controlPath(name));
    const answer = client.call("status");
    // Closing the connection may end it with an error that nobody waits for.
    answer.catch(() => {});
    const late = new Promise<never>((_, reject) => {
      const error = new SvqError("RELAY_SILENT", `The relay "${name}" does not answer within ${answerMs} ms`);
      timer = setTimeout(() => reject(error), answerMs);
    });
    return await Promise.race([answer, late]) as RelayStatus;
  } catch (error) {
    const { code, message } = toErrorRecord(error);
    // It has just been stopped.
    if (code === "NO_SUCH_RELAY" && !hasSocket(name)) return undefined;
    return { name, code, message };
  } finally {
    clearTimeout(timer);
  }
}

function hasSocket(name: string): boolean {
  try {
    Deno.lstatSync(controlPath(name));
    return true;
  } catch {
    return false;
  }
}
