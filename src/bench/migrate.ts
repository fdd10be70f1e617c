/**
 * What migrating costs on this machine: how fast pages go into a stream, and for how long a guest stands still.
 *
 * @module
 */
import { SimDevice } from "../devices/sim_device.ts";
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { connectUnix, createMemfd, dupFd, listenUnix, mapFd, type Mapping, unixPair, type UnixStream, WorkerLink } from "../ffi/mod.ts";
import { Channel } from "../migration/channel.ts";
import { Destination } from "../migration/destination.ts";
import { Guest } from "../migration/guest.ts";
import { PageSender } from "../migration/page_sender.ts";
import { PageMap } from "../migration/pages.ts";
import { PAGE_BYTES } from "../migration/protocol.ts";
import { DEFAULT_SOURCE_OPTIONS, Migration } from "../migration/source.ts";
import { SourceGuest } from "../migration/source_guest.ts";
import { DEFAULT_RELAY_CONFIG } from "../relay/relay.ts";
import { SvqError } from "../errors.ts";
import type { TakeCommand, TakeReply } from "./migrate_messages.ts";

/** What guest memory holds. */
export const CONTENTS = ["random", "half-zero", "zero"] as const;
/** One of {@linkcode CONTENTS}. */
export type Contents = typeof CONTENTS[number];

/** Where the stream ends: nowhere, or in a receiver that checks it and fills memory. */
export const SINKS = ["discard", "receiver"] as const;
/** One of {@linkcode SINKS}. */
export type Sink = typeof SINKS[number];

/** A stream that was measured. */
export interface StreamResult {
  /** What memory held. */
  contents: Contents;
  /** Where it went. */
  sink: Sink;
  /** Bytes of guest memory. */
  memoryBytes: number;
  /** Bytes on the stream. */
  streamBytes: number;
  /** The fastest run, milliseconds: from the first byte until the last one was taken. */
  ms: number;
  /** All runs, milliseconds. */
  allMs: number[];
}

/** Fills memory: every page random, or every other one zero, or all of them. */
export function fillMemory(words: Uint32Array, contents: Contents): void {
  words.fill(0);
  if (contents === "zero") return;
  let x = 0x2545_f491;
  const perPage = PAGE_BYTES / 4;
  for (let page = 0; page < words.length / perPage; page++) {
    if (contents === "half-zero" && page % 2 === 1) continue;
    for (let i = page * perPage; i < (page + 1) * perPage; i++) {
      x ^= x << 13;
      x ^= x >>> 17;
      x ^= x << 5;
      words[i] = x;
    }
  }
}

/** Takes streams in a thread of its own. */
export class Taker implements AsyncDisposable {
  readonly #link = new WorkerLink(new Worker(new URL("./migrate_worker.ts", import.meta.url), { type: "module", name: "sink" }));

  /** Takes a stream to its end. */
  take(command: TakeCommand): Promise<TakeReply> {
    return this.#link.call("take", command);
  }

  /** Takes a stream over and throws away what comes. @returns the bytes that came */
  async discard(stream: UnixStream): Promise<number> {
    return (await this.take({ fd: handOver(stream), memory: 0 })).bytes;
  }

  /** Ends the thread. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.#link.close();
  }
}

/** Sends memory of each kind into each sink, `runs` times. */
export async function benchStream(memoryBytes: number, runs: number, onResult?: (result: StreamResult) => void): Promise<StreamResult[]> {
  using ram = createMemfd("svq-bench", memoryBytes);
  using mapping = mapFd(ram.fd, { length: memoryBytes, what: "bench memory" });
  await using taker = new Taker();
  const results: StreamResult[] = [];
  for (const contents of CONTENTS) {
    fillMemory(new Uint32Array(mapping.buffer()), contents);
    for (const sink of SINKS) {
      const allMs: number[] = [];
      let streamBytes = 0;
      for (let run = 0; run < runs; run++) {
        const { ms, bytes } = await streamInto(taker, mapping, sink);
        allMs.push(ms);
        streamBytes = bytes;
      }
      const result = { contents, sink, memoryBytes, streamBytes, ms: Math.min(...allMs), allMs };
      results.push(result);
      onResult?.(result);
    }
  }
  return results;
}

/** Sends all of `memory` once. @returns how long it took until all was taken, and the bytes on the stream */
export async function streamInto(taker: Taker, source: Mapping, sink: Sink): Promise<{ ms: number; bytes: number }> {
  const map = new PageMap([{ gpa: 0, size: source.length, uaddr: 0, address: source.address }]);
  const memory = sink === "discard" ? 0 : source.length;
  const [ours, theirs] = unixPair();
  const taking = taker.take({ fd: handOver(theirs), memory });
  taking.catch(() => {});
  using channel = new Channel(ours, 60_000);
  using sender = new PageSender(channel, map, { maxBandwidth: Infinity });
  const dirty = DirtyBitmap.covering(map.endGpa);
  map.markAll(dirty);
  const begun = performance.now();
  const result = await sender.sendUnconfirmed(1, dirty, false);
  if (memory > 0) await sender.confirm(result);
  channel.close();
  await taking;
  return { ms: performance.now() - begun, bytes: result.bytes };
}

// The worker closes it.
function handOver(stream: UnixStream): number {
  const copy = dupFd(stream.fd);
  stream.close();
  return copy.release();
}

/** How long a guest stood still. */
export interface DowntimeResult {
  /** Migrations that were done. */
  migrations: number;
  /** Bytes of guest memory. */
  memoryBytes: number;
  /** Downtimes in the order in which they came, microseconds. */
  allUs: number[];
  /** The middle one. */
  p50: number;
  /** 9 of 10 were no longer. */
  p90: number;
  /** 99 of 100. */
  p99: number;
  /** The longest. */
  max: number;
}

/** The value that a share of the values does not exceed. */
export function percentile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))] ?? 0;
}

/**
 * Migrates a guest under load back and forth between two embedded devices over the same disk; memory is not compared.
 *
 * @throws SvqError of the first migration that fails, and BENCH_FAILED when a request was lost, duplicated or corrupted
 */
export async function benchDowntime(
  memoryBytes: number,
  migrations: number,
  onMigration?: (done: number) => void,
): Promise<DowntimeResult> {
  const dir = await Deno.makeTempDir({ prefix: "svq-bench-" });
  const device = () => SimDevice.open({ kind: "blk", file: `${dir}/disk`, size: 32 << 20, latencyUs: 100 });
  const log = () => {};
  const allUs: number[] = [];
  let guest: Guest | undefined;
  try {
    guest = await Guest.open(await device(), { ...DEFAULT_RELAY_CONFIG }, { ramSize: memoryBytes, depth: 16, regionSize: 16 << 20 }, log);
    guest.driver.run({}).catch(() => {});
    for (let done = 0; done < migrations; done++) {
      const path = `${dir}/m${done}`;
      await using destination = new Destination(listenUnix(path), {
        ...{ openDevice: device, relay: { ...DEFAULT_RELAY_CONFIG }, timeoutMs: 60_000, copyDisk: false, maxMemory: 2 * memoryBytes, log },
      });
      using source = new SourceGuest(guest.driver, guest.relay);
      using migration = new Migration(source, {
        ...DEFAULT_SOURCE_OPTIONS,
        ...{ connect: () => Promise.resolve(connectUnix(path)), timeoutMs: 60_000, verify: false, follow: false, downtimeLimitMs: 20 },
        maxIterations: 10,
      });
      const { outcome, downtimeUs, error } = await migration.run();
      if (outcome !== "completed" || downtimeUs === null) {
        throw new SvqError("BENCH_FAILED", `Migration ${done + 1} ended as ${outcome}: ${error?.message}`);
      }
      allUs.push(downtimeUs.total);
      await guest.close();
      guest = undefined;
      guest = await destination.arrived();
      onMigration?.(done + 1);
    }
    const { lost, duplicated, corrupted } = await guest.driver.stop(30_000);
    if (lost + duplicated + corrupted > 0) {
      throw new SvqError("BENCH_FAILED", `${lost} requests were lost, ${duplicated} duplicated, ${corrupted} corrupted`);
    }
  } finally {
    await guest?.close();
    await Deno.remove(dir, { recursive: true });
  }
  const [p50, p90, p99] = [0.5, 0.9, 0.99].map((share) => percentile(allUs, share)) as [number, number, number];
  return { migrations, memoryBytes, allUs, p50, p90, p99, max: Math.max(...allUs) };
}
