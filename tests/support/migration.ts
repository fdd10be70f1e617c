/**
 * Both sides of a migration in one process, and a proxy between them that misbehaves at a given frame.
 *
 * @module
 */
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { SimOptions } from "../../src/devices/options.ts";
import { connectUnix, listenUnix, readable, type UnixListener, unixPair, type UnixStream } from "../../src/ffi/mod.ts";
import { checksumBytes } from "../../src/migration/digest.ts";
import { Destination, type DestinationOptions } from "../../src/migration/destination.ts";
import { isClean } from "../../src/migration/document.ts";
import { Guest } from "../../src/migration/guest.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, FRAME_HEADER_BYTES } from "../../src/migration/protocol.ts";
import { DEFAULT_SOURCE_OPTIONS, Migration, type MigrationResult, type SourceOptions } from "../../src/migration/source.ts";
import { SourceGuest } from "../../src/migration/source_guest.ts";
import type { StreamListener } from "../../src/migration/uri.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { DEFAULT_RELAY_CONFIG } from "../../src/relay/relay.ts";
import { TempDir } from "./temp.ts";
import { waitUntil } from "./wait.ts";

/** How a {@linkcode Hosts} is made. */
export interface HostsOptions {
  /** Added to the device's options, on both sides. */
  device?: Partial<SimOptions>;
  /** Bytes of guest RAM; default 8 MiB. */
  ramSize?: number;
  /** Requests in flight; default 8. */
  depth?: number;
  /** Queues; default 1. */
  queues?: number;
  /** Packed rings; default no. */
  packed?: boolean;
  /** Ring size of the guest. */
  num?: number;
  /** How a destination's device is opened, where it is not another of the same kind. */
  openDestination?: (hosts: Hosts) => Promise<VhostBackend>;
  /** How the source's device is opened, likewise. */
  openSource?: (hosts: Hosts) => Promise<VhostBackend>;
  /** Of the destination. */
  destination?: Partial<DestinationOptions>;
}

/** A disk, a guest at work on it, and destinations over the same disk. */
export class Hosts implements AsyncDisposable {
  readonly dir = new TempDir();
  readonly logged: string[] = [];
  readonly #options: HostsOptions;
  readonly #open: AsyncDisposable[] = [];
  #count = 0;

  constructor(options: HostsOptions = {}) {
    this.#options = options;
  }

  /** A device over the disk. */
  openDevice(more: Partial<SimOptions> = {}): Promise<SimDevice> {
    const { device = {}, queues = 1, packed = false } = this.#options;
    return SimDevice.open({ kind: "blk", file: this.dir.join("disk"), size: 16 << 20, queues, packed, ...device, ...more });
  }

  /** A guest whose workload runs and has completed requests. */
  async guest(): Promise<Guest> {
    const guest = await this.guestWithoutProgress();
    await progress(guest);
    return guest;
  }

  /** A guest whose workload has been started. */
  async guestWithoutProgress(): Promise<Guest> {
    const { ramSize = 8 << 20, depth = 8, queues = 1, packed = false, num = 256, openSource } = this.#options;
    const guest = await Guest.open(
      await (openSource?.(this) ?? this.openDevice()),
      { ...DEFAULT_RELAY_CONFIG, ...(packed ? { guestRing: "packed" } : {}) },
      { ramSize, depth, queues, packed, num, regionSize: 4 << 20 },
      (_level, message) => this.logged.push(message),
    );
    this.#open.push(guest);
    guest.driver.run({}).catch(() => {});
    return guest;
  }

  /** A destination; `path` is where it listens. */
  destination(): { destination: Destination; path: string } {
    return this.destinationWith(() => {});
  }

  /** A destination whose devices are changed before they are used. */
  destinationWith(change: (device: SimDevice) => void): { destination: Destination; path: string } {
    const path = this.dir.join(`d${this.#count++}`);
    return { destination: this.destinationOn(listenUnix(path), change), path };
  }

  /** A destination that accepts from `listener`. */
  destinationOn(listener: StreamListener, change: (device: SimDevice) => void = () => {}): Destination {
    const destination = new Destination(listener, {
      openDevice: async () => {
        const { openDestination } = this.#options;
        if (openDestination !== undefined) return await openDestination(this);
        const device = await this.openDevice();
        change(device);
        return device;
      },
      relay: { ...DEFAULT_RELAY_CONFIG },
      timeoutMs: 10_000,
      copyDisk: true,
      maxMemory: 1 << 30,
      log: (_level, message) => this.logged.push(message),
      ...this.#options.destination,
    });
    this.#open.push(destination);
    return destination;
  }

  /** Takes something over that is closed with the rest. */
  own<T extends AsyncDisposable>(part: T): T {
    this.#open.push(part);
    return part;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const part of this.#open.reverse()) await part[Symbol.asyncDispose]();
    this.dir[Symbol.dispose]();
  }
}

/** The same device behind vhost-user. */
export async function overVhostUser(hosts: Hosts, device: SimDevice): Promise<VhostBackend> {
  const [ours, theirs] = unixPair();
  const server = new BackendServer(theirs, device, {});
  const served = server.run();
  hosts.own({
    [Symbol.asyncDispose]: async () => {
      server.close();
      await served;
      await device.close();
    },
  });
  return await VhostUserFrontEnd.fromStream(ours, { address: "unix:(a pair)" });
}

/** Waits until the guest has completed at least `count` further requests. */
export async function progress(guest: Guest, count = 50): Promise<void> {
  const { completed } = await guest.driver.report();
  await waitUntil(`${count} requests`, async () => (await guest.driver.report()).completed >= completed + count);
}

/** A migration of `guest` to the destination at `path`. */
export function migrationTo(
  path: string,
  guest: Guest,
  options: Partial<SourceOptions> = {},
): { source: SourceGuest; migration: Migration } {
  const source = new SourceGuest(guest.driver, guest.relay);
  const migration = new Migration(source, {
    ...DEFAULT_SOURCE_OPTIONS,
    connect: () => Promise.resolve().then(() => connectUnix(path)),
    timeoutMs: 10_000,
    downtimeLimitMs: 20,
    maxIterations: 3,
    follow: false,
    ...options,
  });
  return { source, migration };
}

/** Migrates a guest under load; the migration completes, and at the destination it works on to its end without a fault. */
export async function assertMoves(
  hosts: Hosts,
  { destination, path }: { destination: Destination; path: string },
  options: Partial<SourceOptions> = {},
): Promise<MigrationResult> {
  const guest = await hosts.guest();
  const { source, migration } = migrationTo(path, guest, options);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  assert.equal(result.memoryIdentical, true);
  await guest.close();
  const there = hosts.own(await destination.arrived());
  await progress(there);
  const report = reportOf(await there.driver.stop(10_000));
  assert.ok(isClean(report), JSON.stringify(report));
  return result;
}

/**
 * What a proxy does when a frame comes that its rule names. `reset-next`: resets the link when the next frame has come, unread.
 * `refuse`: ERROR takes the frame's place, and then the link ends. `pass`: nothing; what the rule has done is all.
 */
export type Fault = "cut" | "stall" | "flip" | "reset-next" | "refuse" | "pass";

/** A proxy between source and destination that does something bad, once, on its first connection. */
export class FrameProxy implements AsyncDisposable {
  readonly #listener: UnixListener;
  readonly #target: string;
  readonly #rule: (from: "source" | "destination", type: number, payload: Uint8Array) => Fault | undefined;
  readonly #streams: UnixStream[] = [];
  readonly #refuseLater: boolean;
  #connections = 0;
  #stalled = false;
  /** The rule has matched. */
  fired = false;

  /** @param rule asked for each frame of the first connection @param refuseLater connections after the first are closed at once */
  constructor(
    readonly path: string,
    target: string,
    rule: (from: "source" | "destination", type: number, payload: Uint8Array) => Fault | undefined,
    refuseLater = false,
  ) {
    this.#listener = listenUnix(path);
    this.#target = target;
    this.#rule = rule;
    this.#refuseLater = refuseLater;
    this.#accept();
  }

  async #accept(): Promise<void> {
    for (;;) {
      let source: UnixStream;
      try {
        source = await this.#listener.accept();
      } catch {
        return;
      }
      const first = this.#connections++ === 0;
      if (!first && this.#refuseLater) {
        source.close();
        continue;
      }
      let destination: UnixStream;
      try {
        destination = connectUnix(this.#target);
      } catch {
        // Nobody is there any more.
        source.close();
        continue;
      }
      this.#streams.push(source, destination);
      this.#pump(source, destination, "source", first);
      this.#pump(destination, source, "destination", first);
    }
  }

  async #pump(from: UnixStream, to: UnixStream, side: "source" | "destination", first: boolean): Promise<void> {
    try {
      for (;;) {
        const head = await readExactly(from, FRAME_HEADER_BYTES);
        const view = new DataView(head.buffer);
        const payload = await readExactly(from, view.getUint32(8, true));
        const fault = first && !this.fired ? this.#rule(side, view.getUint32(0, true), payload) : undefined;
        if (fault !== undefined) this.fired = true;
        if (fault === "cut") break;
        if (fault === "stall") this.#stalled = true;
        // Nothing passes any more, in neither direction, and nobody hears of it.
        if (first && this.#stalled) return;
        if (fault === "flip") (payload.length > 0 ? payload : head)[(payload.length || 16) - 1]! ^= 0x10;
        if (fault === "refuse") {
          await to.send(refusal(view.getUint32(4, true)));
          break;
        }
        await to.send(head);
        if (payload.length > 0) await to.send(payload);
        if (fault === "reset-next") {
          await readable(from.fd);
          if (this.#refuseLater) this.#listener.close();
          break;
        }
      }
    } catch { /* one side is gone */ }
    if (first && this.#stalled) return;
    from.close();
    to.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    for (const stream of this.#streams) stream.close();
    await Promise.resolve();
  }
}

// An ERROR that takes a frame's number.
function refusal(number: number): Uint8Array<ArrayBuffer> {
  const payload = new TextEncoder().encode(JSON.stringify({ code: "MIGRATION_REFUSED", message: "no" }));
  const bytes = new Uint8Array(FRAME_HEADER_BYTES + payload.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, FRAME.ERROR, true);
  view.setUint32(4, number, true);
  view.setUint32(8, payload.length, true);
  view.setInt32(12, checksumBytes(payload), true);
  bytes.set(payload, FRAME_HEADER_BYTES);
  return bytes;
}

async function readExactly(stream: UnixStream, length: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length;) {
    const { bytes: count } = await stream.receive(bytes.subarray(at));
    if (count === 0) throw new Error("end");
    at += count;
  }
  return bytes;
}
