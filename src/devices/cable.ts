/**
 * Cables between embedded network devices of one process: two ends, by name. The one named `loop` has one device at both
 * ends, which gets its own frames back; each device has one of its own.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { dupFd, type OwnedFd, packetPair } from "../ffi/mod.ts";

/** Name of the cable that has one device at both ends. */
export const LOOP = "loop";

/** Called when the other end was plugged in or pulled out. */
export type LinkListener = (up: boolean) => void;

interface Cable {
  fds: [OwnedFd, OwnedFd];
  ends: [LinkListener | undefined, LinkListener | undefined];
}

const cables = new Map<string, Cable>();

// The cables of that name are never shared: each has a key of its own.
let loops = 0;

/** One device's end of a cable. */
export class CableEnd implements Disposable {
  readonly #name: string;
  readonly #side: 0 | 1;
  readonly #fd: OwnedFd;
  // Where this device's own frames come back.
  readonly #back: OwnedFd | undefined;
  #closed = false;

  private constructor(name: string, side: 0 | 1, fd: OwnedFd, back: OwnedFd | undefined) {
    this.#name = name;
    this.#back = back;
    this.#side = side;
    this.#fd = fd;
  }

  /**
   * Plugs in.
   *
   * @param listener told of changes; not of how it is at the beginning
   * @throws SvqError CABLE_IN_USE (exit code 2) when both ends are taken
   */
  static plug(name: string, listener: LinkListener): CableEnd {
    const loop = name === LOOP;
    if (loop) name = `${LOOP} ${loops++}`;
    let cable = cables.get(name);
    if (cable === undefined) cables.set(name, cable = { fds: packetPair(), ends: [undefined, undefined] });
    const side = cable.ends[0] === undefined ? 0 : 1;
    if (cable.ends[side] !== undefined) {
      throw new SvqError("CABLE_IN_USE", `Two devices are connected by cable ${name} already`, {
        exitCode: EXIT.usage,
        hint: "Name another cable",
      });
    }
    const fd = dupFd(cable.fds[side].fd);
    cable.ends[side] = listener;
    cable.ends[1 - side]?.(true);
    return new CableEnd(name, side, fd, loop ? dupFd(cable.fds[1].fd) : undefined);
  }

  /** What frames are read from, borrowed. */
  get fd(): number {
    return this.#back?.fd ?? this.#fd.fd;
  }

  /** What frames are written to, borrowed. */
  get out(): number {
    return this.#fd.fd;
  }

  /** Is somebody at the other end? */
  get up(): boolean {
    return this.#back !== undefined || cables.get(this.#name)?.ends[1 - this.#side] !== undefined;
  }

  /** Pulls it out; harmless when repeated. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#fd.close();
    this.#back?.close();
    const cable = cables.get(this.#name)!;
    cable.ends[this.#side] = undefined;
    const other = cable.ends[1 - this.#side];
    if (other !== undefined) {
      other(false);
      return;
    }
    for (const fd of cable.fds) fd.close();
    cables.delete(this.#name);
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
