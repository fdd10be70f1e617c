/**
 * The new side of an upgrade: a process that goes on with the guest and the device of a relay that runs already.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import { connectUnix } from "../ffi/mod.ts";
import { VERSION } from "../version.ts";
import { ReceivedFds } from "./handover.ts";
import { UPGRADE_SCHEMA, type UpgradeState } from "./upgrade.ts";
import { UpgradeLink } from "./upgrade_link.ts";

/** A relay that is being taken over. */
export class Takeover implements Disposable {
  readonly #link: UpgradeLink;
  /** What it has handed over. */
  readonly state: UpgradeState;
  /** The descriptors that came along. */
  readonly fds: ReceivedFds;

  private constructor(link: UpgradeLink, state: UpgradeState, fds: ReceivedFds) {
    this.#link = link;
    this.state = state;
    this.fds = fds;
  }

  /** Tells the old process that this one is ready, and waits for the state. @throws SvqError UPGRADE_ENDED, UPGRADE_STATE */
  static async connect(path: string): Promise<Takeover> {
    const link = new UpgradeLink(connectUnix(path));
    try {
      await link.send({ type: "hello", schema: UPGRADE_SCHEMA, version: VERSION });
      const received = await link.receive();
      if (received === undefined) throw new SvqError("UPGRADE_ENDED", "The relay goes on itself");
      const fds = new ReceivedFds(received.fds);
      const { type, schema, state } = received.message;
      if (type !== "state" || schema !== UPGRADE_SCHEMA || typeof state !== "object" || state === null) {
        fds[Symbol.dispose]();
        throw new SvqError("UPGRADE_STATE", `The relay's state is not ${UPGRADE_SCHEMA}`);
      }
      return new Takeover(link, state as UpgradeState, fds);
    } catch (error) {
      link.close();
      throw error;
    }
  }

  /** From now on this process may take requests of the guest. */
  async touched(): Promise<void> {
    await this.#link.send({ type: "touched" });
  }

  /** The rings run: resolves when the old process has let go, or has ended. */
  async running(): Promise<void> {
    await this.#link.send({ type: "running" }).catch(() => {});
    const received = await this.#link.receive().catch(() => undefined);
    for (const fd of received?.fds ?? []) fd.close();
  }

  /**
   * It could not be done: nothing is used any more, and the rings stand at `bases`.
   *
   * @param clean is the connection to the device as it was handed over?
   */
  async failed(error: unknown, bases: readonly (readonly [index: number, base: number])[], clean: boolean): Promise<void> {
    await this.#link.send({ type: "failed", error: toErrorRecord(error), bases, clean }).catch(() => {});
  }

  /** Closes what was not taken. */
  [Symbol.dispose](): void {
    this.fds[Symbol.dispose]();
    this.#link.close();
  }
}
