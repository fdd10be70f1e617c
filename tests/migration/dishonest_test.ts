import assert from "node:assert/strict";
import { connectUnix, IoVector, mapAnonymous } from "../../src/ffi/mod.ts";
import { Channel } from "../../src/migration/channel.ts";
import { foldDigest, newDigest } from "../../src/migration/digest.ts";
import { greet } from "../../src/migration/handshake.ts";
import { encodeOffer, type Offer } from "../../src/migration/offer.ts";
import {
  encodeHello,
  encodeRange,
  encodeRound,
  FRAME,
  FRAME_HEADER_BYTES,
  type FrameType,
  PAGE_BYTES,
} from "../../src/migration/protocol.ts";
import { RamLayout } from "../../src/drivers/layout.ts";
import { Hosts, migrationTo } from "../support/migration.ts";

const RAM = { ramSize: 8 << 20, queues: 1, num: 256, depth: 8, packed: false };
const VERSION_1 = 1n << 32n;
const FIRST_PAGE = 256;

function offerOf(session: string): Offer {
  return {
    session,
    features: VERSION_1,
    ram: RAM,
    regions: new RamLayout(RAM).regions(-1).map(({ gpa, size }) => ({ gpa, size })),
    workload: { kind: "blk", options: { sectors: 2048, unit: 1, segMax: 1, readPercent: 50, flush: false, writeZeroes: false, seed: 1 } },
    verify: true,
    follow: false,
    dryRun: false,
    disk: null,
  };
}

/** A source that says what the test wants, to one destination, again and again. */
class Liar implements AsyncDisposable {
  readonly hosts = new Hosts();
  readonly #path = this.hosts.destination().path;

  /** What the destination said last. */
  reason = "";

  /** Connects, lies, and returns the code of the error that the destination answers with. */
  async tell(lie: (channel: Channel) => Promise<void>): Promise<string> {
    using channel = new Channel(connectUnix(this.#path), 30_000);
    try {
      await lie(channel);
      await channel.receiveHead([]);
    } catch (error) {
      this.reason = (error as Error).message;
      return (error as { name: string; code: string }).name === "RemoteError" ? (error as { code: string }).code : String(error);
    }
    return "no answer";
  }

  /** The same behind an honest beginning. */
  tellLater(lie: (channel: Channel) => Promise<void>): Promise<string> {
    return this.tell(async (channel) => {
      await channel.sendJson(FRAME.OFFER, encodeOffer(offerOf(await greet(channel))));
      await channel.receive(FRAME.ACCEPT, 1 << 20);
      await lie(channel);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // After all of that it takes an honest guest.
    const guest = await this.hosts.guest();
    const { migration } = migrationTo(this.#path, guest);
    assert.equal((await migration.run()).outcome, "completed", "the destination still works");
    migration.close();
    await this.hosts[Symbol.asyncDispose]();
  }
}

/** Sends a frame's head with nothing behind it. */
async function sendHead(channel: Channel, type: FrameType, length: number): Promise<void> {
  using memory = mapAnonymous(4096);
  channel.putHead(new DataView(memory.buffer()), 0, type, length, 0);
  const vector = new IoVector(1);
  vector.push(memory.address, FRAME_HEADER_BYTES);
  await channel.sendVector(vector);
}

function range(page: number, count: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(16);
  encodeRange(new DataView(bytes.buffer), 0, { page, count });
  return bytes;
}

// A frame of one run; `said` pages it says that it has.
function pages(page: number, count: number, said = count): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(24 + count * PAGE_BYTES);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, 1, true);
  view.setUint32(4, said, true);
  bytes.set(range(page, count), 8);
  return bytes;
}

const EMPTY = foldDigest(newDigest());
const round = (number: number, pages: number, frozen = false) => encodeRound({ round: number, frozen, disk: false, pages, checksum: 0 });

Deno.test("A source that lies in its greeting or its offer is refused with a clear reason", async () => {
  await using liar = new Liar();
  const session = new Uint8Array(16);
  const hello = (version: number, versionMin: number) => encodeHello({ version, versionMin, session });
  assert.equal(await liar.tell(async (channel) => void await channel.send(FRAME.HELLO, new Uint8Array(32))), "MIGRATION_PROTOCOL");
  assert.equal(await liar.tell(async (channel) => void await channel.send(FRAME.HELLO, hello(9, 8))), "MIGRATION_VERSION");
  assert.equal(await liar.tell(async (channel) => void await channel.send(FRAME.OFFER, hello(1, 1))), "MIGRATION_PROTOCOL");
  assert.equal(await liar.tell((channel) => sendHead(channel, FRAME.HELLO, 0xffff_ffff)), "MIGRATION_PROTOCOL");
  const offered = (change: (offer: Record<string, unknown>) => void) =>
    liar.tell(async (channel) => {
      const offer = structuredClone(encodeOffer(offerOf(await greet(channel))));
      change(offer);
      await channel.sendJson(FRAME.OFFER, offer);
    });
  const replayed = await offered((offer) => offer.session = "00".repeat(16));
  assert.equal(replayed, "MIGRATION_SESSION", "a recorded stream");
  const changes: ((offer: Record<string, unknown>) => void)[] = [
    (offer) => offer.features = "0x",
    (offer) => offer.features = "12",
    (offer) => offer.ram = { ...RAM, ramSize: 2 ** 60 },
    (offer) => offer.ram = { ...RAM, num: 1e9 },
    (offer) => offer.ram = null,
    (offer) => offer.regions = [{ gpa: 0, size: 8 << 20 }],
    (offer) => offer.regions = [],
    (offer) => offer.workload = { kind: "blk", options: { ...offerOf("").workload.options, sectors: 2 ** 40 } },
    (offer) => offer.workload = { kind: "net", options: { seed: 1 } },
    (offer) => offer.verify = "yes",
  ];
  for (const change of changes) assert.equal(await offered(change), "MIGRATION_PROTOCOL", change.toString());
  assert.equal(await offered((offer) => offer.features = `0x${(VERSION_1 | 1n << 61n).toString(16)}`), "MISSING_FEATURE");
  assert.equal(await offered((offer) => offer.ram = { ...RAM, queues: 2 }), "TOO_FEW_QUEUES");
  const huge = { ...RAM, ramSize: 2 ** 40 };
  const regions = new RamLayout(huge).regions(-1).map(({ gpa, size }) => ({ gpa, size }));
  assert.equal(await offered((offer) => Object.assign(offer, { ram: huge, regions })), "NO_MEMORY");
});

Deno.test("Pages outside of memory, wrong lengths, wrong checksums and frames out of order end a migration", async () => {
  await using liar = new Liar();
  const lies: [string, RegExp, (channel: Channel) => Promise<unknown>][] = [
    ["pages before memory", /outside of guest memory/, (channel) => channel.send(FRAME.PAGES, pages(0, 1))],
    ["pages across the end of a region", /outside of guest memory/, (channel) => channel.send(FRAME.PAGES, pages(FIRST_PAGE + 1023, 2))],
    ["pages far away", /outside of guest memory/, (channel) => channel.send(FRAME.PAGES, pages(2 ** 39, 1))],
    ["a run of no pages", /has \d+ bytes/, (channel) => channel.send(FRAME.PAGES, pages(FIRST_PAGE, 0))],
    ["a run that is not the frame's pages", /runs of a frame are not its 2 pages/, (channel) => {
      const frame = pages(FIRST_PAGE, 2);
      frame.set(range(FIRST_PAGE, 1), 8);
      return channel.send(FRAME.PAGES, frame);
    }],
    ["a frame that says more pages than it has", /1 runs and 3 pages has/, (channel) => channel.send(FRAME.PAGES, pages(FIRST_PAGE, 2, 3))],
    ["blocks of a disk in a round of memory", /BLOCKS came where/, (channel) => channel.send(FRAME.BLOCKS, pages(0, 1))],
    [
      "a run that is shorter than it says",
      /2 pages has 4120 bytes/,
      (channel) => channel.send(FRAME.PAGES, pages(FIRST_PAGE, 2).subarray(0, 24 + PAGE_BYTES)),
    ],
    ["a run that is too long", /has 2097152 bytes/, (channel) => sendHead(channel, FRAME.PAGES, 2 << 20)],
    ["more pages than announced", /more pages than the 2/, (channel) => channel.send(FRAME.ZERO, range(FIRST_PAGE, 3))],
    ["a wrong checksum", /checksum of a frame/, (channel) => channel.send(FRAME.PAGES, pages(FIRST_PAGE, 1))],
    ["zero pages outside of memory", /outside of guest memory/, (channel) => channel.send(FRAME.ZERO, range(1, 1))],
    ["half a zero range", /zero pages has 8 bytes/, (channel) => channel.send(FRAME.ZERO, new Uint8Array(8))],
    ["a list of zero pages without end", /at most 65536/, (channel) => sendHead(channel, FRAME.ZERO, 0x7fff_ffff)],
    ["an end that counts other pages", /0 came/, (channel) => channel.send(FRAME.ROUND_END, round(1, 2))],
    ["a state in the middle of a round", /STATE came where/, (channel) => channel.send(FRAME.STATE)],
  ];
  for (const [name, reason, lie] of lies) {
    const code = await liar.tellLater(async (channel) => {
      await channel.send(FRAME.ROUND, round(1, 2));
      await lie(channel);
    });
    assert.equal(code, "MIGRATION_PROTOCOL", name);
    assert.match(liar.reason, reason, name);
  }
});

Deno.test("Rounds that do not follow each other, a state too early or too long, and a COMMIT for nobody are refused", async () => {
  await using liar = new Liar();
  const last = async (channel: Channel) => {
    await channel.send(FRAME.ROUND, round(1, 0, true));
    await channel.send(FRAME.ROUND_END, encodeRound({ round: 1, frozen: true, disk: false, pages: 0, checksum: EMPTY }));
    await channel.receive(FRAME.ROUND_ACK, 24);
  };
  assert.equal(await liar.tellLater(async (channel) => void await channel.send(FRAME.ROUND, round(2, 1))), "MIGRATION_PROTOCOL");
  assert.equal(await liar.tellLater(async (channel) => void await channel.send(FRAME.ROUND, round(1, 2 ** 30))), "MIGRATION_PROTOCOL");
  const disk = encodeRound({ round: 1, frozen: false, disk: true, pages: 1, checksum: 0 });
  assert.equal(await liar.tellLater(async (channel) => void await channel.send(FRAME.ROUND, disk)), "MIGRATION_PROTOCOL", "not agreed on");
  assert.equal(await liar.tellLater(async (channel) => void await channel.send(FRAME.STATE)), "MIGRATION_PROTOCOL");
  assert.equal(await liar.tellLater(async (channel) => void await channel.send(FRAME.COMMIT, new Uint8Array(16))), "MIGRATION_PROTOCOL");
  const after = (lie: (channel: Channel) => Promise<unknown>) =>
    liar.tellLater(async (channel) => {
      await last(channel);
      await lie(channel);
    });
  assert.equal(await after((channel) => channel.send(FRAME.ROUND, round(2, 1))), "MIGRATION_PROTOCOL", "a round after the last one");
  assert.equal(await after((channel) => sendHead(channel, FRAME.STATE, 0x7fff_ffff)), "MIGRATION_PROTOCOL", "a state without end");
  assert.equal(await after((channel) => channel.send(FRAME.STATE, new Uint8Array(4096))), "STATE_INVALID");
  assert.equal(await after((channel) => channel.send(FRAME.STATE)), "STATE_INVALID");
});

Deno.test("A frame that comes twice is noticed by its number", async () => {
  await using liar = new Liar();
  const code = await liar.tellLater(async (channel) => {
    await channel.send(FRAME.ROUND, round(1, 2));
    using memory = mapAnonymous(4096);
    const view = new DataView(memory.buffer());
    channel.putHead(view, 0, FRAME.ROUND_END, 0, 0);
    view.setUint32(4, view.getUint32(4, true) - 1, true);
    const vector = new IoVector(1);
    vector.push(memory.address, FRAME_HEADER_BYTES);
    await channel.sendVector(vector);
  });
  assert.equal(code, "MIGRATION_PROTOCOL");
  assert.match(liar.reason, /frame \d+ came where \d+ was due/);
});
