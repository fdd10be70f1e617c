import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { createEventfd, createMemfd, drainEventfd, mapFd, signalEventfd } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { SplitDriver } from "../../src/vring/split.ts";
import { waitUntil } from "../support/wait.ts";

const NUM = 16;
const SIZE = 1 << 20;
const GPA = 0x10_0000;
const DATA = 0x8_0000;
const INDIRECT = 1n << 28n;
const VERSION_1 = 1n << 32n;

/** A guest made by hand: RAM, and the rings of two queues in it. */
class Guest implements AsyncDisposable {
  readonly ram = createMemfd("hostile-guest", SIZE);
  readonly mapping = mapFd(this.ram.fd, { length: SIZE });
  readonly bytes = new Uint8Array(this.mapping.buffer());
  readonly view = new DataView(this.bytes.buffer);
  readonly fds = [0, 1].map(() => ({ kick: createEventfd(), call: createEventfd(), err: createEventfd() }));
  readonly errors: string[] = [];
  device!: SimDevice;
  relay!: Relay;

  static async start(config: Partial<RelayConfig> = {}): Promise<Guest> {
    const guest = new Guest();
    guest.device = await SimDevice.open({ kind: "loopback", queues: 2 });
    guest.relay = new Relay(guest.device, { ...DEFAULT_RELAY_CONFIG, mode: "shadow", ...config }, {
      log: () => {},
      error: (error) => guest.errors.push(error.message),
    });
    const { relay } = guest;
    await relay.setFeatures(VERSION_1 | INDIRECT);
    await relay.setMemTable([{ gpa: GPA, size: SIZE, uaddr: 0x7000_0000, fd: guest.ram.fd, fdOffset: 0 }]);
    await guest.startRing(0);
    await guest.startRing(1);
    return guest;
  }

  at(index: number): { desc: number; avail: number; used: number } {
    const layout = splitLayout(NUM);
    const base = index * 0x1_0000;
    return { desc: base, avail: base + layout.avail.offset, used: base + layout.used.offset };
  }

  async startRing(index: number): Promise<void> {
    const { relay } = this;
    const { desc, avail, used } = this.at(index);
    await relay.setVringNum(index, NUM);
    await relay.setVringBase(index, 0);
    await relay.setVringAddresses(index, { desc: GPA + desc, avail: GPA + avail, used: GPA + used });
    const { kick, call, err } = this.fds[index]!;
    await relay.setVringCall(index, call.fd);
    await relay.setVringErr(index, err.fd);
    await relay.setVringKick(index, kick.fd);
    await relay.setVringEnable(index, true);
  }

  driver(index: number): SplitDriver {
    const { desc, avail, used } = this.at(index);
    const part = (byteOffset: number) => ({ buffer: this.bytes.buffer, byteOffset });
    return new SplitDriver({ num: NUM, desc: part(desc), avail: part(avail), used: part(used), eventIdx: false });
  }

  desc(index: number, slot: number, address: bigint, length: number, flags: number, next: number): void {
    const at = this.at(index).desc + slot * 16;
    this.view.setBigUint64(at, address, true);
    this.view.setUint32(at + 8, length, true);
    this.view.setUint16(at + 12, flags, true);
    this.view.setUint16(at + 14, next, true);
  }

  /** Makes `head` available (or whatever `idx` says) and kicks. */
  offer(index: number, head: number, idx = 1): void {
    const { avail } = this.at(index);
    this.view.setUint16(avail + 4, head, true);
    Atomics.store(new Uint16Array(this.bytes.buffer, avail, 2), 1, idx);
    this.kick(index);
  }

  kick(index: number): void {
    signalEventfd(this.fds[index]!.kick.fd);
  }

  /** One chain through queue 1: it must work whatever happens to queue 0. */
  async echo(driver: SplitDriver, text: string): Promise<string> {
    const bytes = new TextEncoder().encode(text);
    this.bytes.set(bytes, DATA);
    driver.add([{ address: GPA + DATA, length: bytes.length }], [{ address: GPA + DATA + 4096, length: bytes.length }]);
    driver.publish();
    this.kick(1);
    await waitUntil("the echo", () => driver.take() >= 0);
    return new TextDecoder().decode(this.bytes.slice(DATA + 4096, DATA + 4096 + bytes.length));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.relay.close();
    await this.device.close();
    for (const { kick, call, err } of this.fds) for (const fd of [kick, call, err]) fd.close();
    this.mapping.close();
    this.ram.close();
  }
}

const NEXT = 1;
const WRITE = 2;
const IND = 4;
const INSIDE = BigInt(GPA + DATA);

const ATTACKS: [name: string, code: RegExp, attack: (guest: Guest) => void][] = [
  ["an avail index that jumps", /avail index is 1000/, (guest) => guest.offer(0, 0, 1000)],
  ["a head outside the table", /holds 16 in a queue of 16/, (guest) => guest.offer(0, NUM)],
  ["a chain that loops", /more descriptors than its table/, (guest) => {
    guest.desc(0, 0, INSIDE, 16, NEXT, 1);
    guest.desc(0, 1, INSIDE, 16, NEXT, 0);
    guest.offer(0, 0);
  }],
  ["a buffer outside memory", /is not in memory/, (guest) => {
    guest.desc(0, 0, BigInt(GPA + SIZE - 8), 16, WRITE, 0);
    guest.offer(0, 0);
  }],
  ["an address above 2^52", /above 2\^52/, (guest) => {
    guest.desc(0, 0, 0xffff_ffff_ffff_fff0n, 16, WRITE, 0);
    guest.offer(0, 0);
  }],
  ["a readable descriptor behind a writable one", /readable after a writable/, (guest) => {
    guest.desc(0, 0, INSIDE, 16, WRITE | NEXT, 1);
    guest.desc(0, 1, INSIDE, 16, 0, 0);
    guest.offer(0, 0);
  }],
  ["an indirect table that is not in memory", /indirect table/, (guest) => {
    guest.desc(0, 0, 0x10n, 32, IND, 0);
    guest.offer(0, 0);
  }],
  ["an indirect table inside an indirect table", /is indirect/, (guest) => {
    guest.desc(0, 0, INSIDE, 16, IND, 0);
    guest.view.setBigUint64(DATA, INSIDE, true);
    guest.view.setUint32(DATA + 8, 16, true);
    guest.view.setUint16(DATA + 12, IND, true);
    guest.offer(0, 0);
  }],
  ["the arena's own address", /is not in memory/, (guest) => {
    guest.desc(0, 0, BigInt(guest.relay.arena!.iova), 16, WRITE, 0);
    guest.offer(0, 0);
  }],
];

// A table of ten buffers in the guest's data area, as the only descriptor of a chain.
function offerTable(guest: Guest): void {
  const table = DATA + 0x1000;
  for (let i = 0; i < 10; i++) {
    const at = table + 16 * i;
    guest.view.setBigUint64(at, INSIDE + BigInt(64 * i), true);
    guest.view.setUint32(at + 8, 8, true);
    guest.view.setUint16(at + 12, i < 9 ? NEXT : WRITE, true);
    guest.view.setUint16(at + 14, i + 1, true);
  }
  guest.desc(0, 0, BigInt(GPA + table), 160, IND, 0);
  guest.offer(0, 0);
}

for (const indirect of ["copy", "pass", "flatten"] as const) {
  Deno.test(`a chain that is longer than the device's ring is ${indirect === "flatten" ? "refused by name" : "relayed in a table"}, and the other queue goes on: --indirect ${indirect}`, async () => {
    await using guest = await Guest.start({ deviceRingSize: 8, indirect });
    const driver = guest.driver(1);
    assert.equal(await guest.echo(driver, "before"), "before");
    offerTable(guest);
    const queue = guest.relay.queues[0]!;
    if (indirect === "flatten") {
      await waitUntil("the queue to fail", () => queue.state === "failed");
      assert.match(queue.error!.code, /TOO_LONG/);
      assert.match(queue.error!.message, /10 descriptors, the limit is 8/);
    } else {
      const used = new Uint16Array(guest.bytes.buffer, guest.at(0).used, 2);
      await waitUntil("the chain to come back", () => Atomics.load(used, 1) === 1);
      // The shadow ring still shows where the device found the table.
      const slot = new DataView(guest.relay.arena!.slot(0));
      assert.equal(slot.getBigUint64(0, true) === BigInt(GPA + DATA + 0x1000), indirect === "pass");
      assert.equal(slot.getUint32(8, true), 160);
    }
    assert.equal(await guest.echo(driver, "after"), "after");
  });
}

Deno.test("a chain of direct descriptors that is longer than the device's ring and its tables is refused by name", async () => {
  await using guest = await Guest.start({ deviceRingSize: 8, indirect: "flatten" });
  for (let slot = 0; slot < 12; slot++) guest.desc(0, slot, INSIDE, 8, slot < 11 ? NEXT : 0, slot + 1);
  guest.offer(0, 0);
  await waitUntil("the queue to fail", () => guest.relay.queues[0]!.state === "failed");
  assert.equal(guest.relay.queues[0]!.error!.code, "CHAIN_TOO_LONG");
  assert.equal(await guest.echo(guest.driver(1), "fine"), "fine");
});

for (const [name, message, attack] of ATTACKS) {
  Deno.test(`a queue with ${name} stops with a clear error; the other queue goes on, and the queue can be set up anew`, async () => {
    await using guest = await Guest.start();
    const driver = guest.driver(1);
    assert.equal(await guest.echo(driver, "before"), "before");
    attack(guest);
    await waitUntil("the queue to fail", () => guest.relay.queues[0]!.state === "failed");
    assert.match(guest.relay.queues[0]!.error!.message, message);
    assert.equal(guest.errors.length, 1);
    assert.equal(drainEventfd(guest.fds[0]!.err.fd), 1, "the err eventfd was signalled");
    assert.equal(await guest.echo(driver, "after"), "after");
    assert.equal(guest.relay.queues[1]!.state, "shadow");

    // The front-end resets the queue: it works again.
    await guest.relay.getVringBase(0);
    const { desc } = guest.at(0);
    guest.bytes.fill(0, desc, desc + splitLayout(NUM).total);
    await guest.startRing(0);
    const again = guest.driver(0);
    again.add([{ address: GPA + DATA, length: 4 }], []);
    again.publish();
    guest.kick(0);
    await waitUntil("the queue to work again", () => again.take() >= 0);
  });
}

Deno.test("a ring that does not lie in guest memory is refused when it would start, and nothing else suffers", async () => {
  await using guest = await Guest.start();
  await guest.relay.getVringBase(0);
  for (
    const addresses of [
      { desc: GPA + SIZE - 16, avail: GPA, used: GPA + 0x1000 },
      { desc: GPA, avail: GPA + SIZE, used: GPA + 0x1000 },
      { desc: GPA + 8, avail: GPA + 0x1000, used: GPA + 0x2000 },
      { desc: 0, avail: GPA + 0x1000, used: GPA + 0x2000 },
    ]
  ) {
    await guest.relay.setVringNum(0, NUM);
    await guest.relay.setVringAddresses(0, addresses);
    await assert.rejects(guest.relay.setVringKick(0, guest.fds[0]!.kick.fd), /does not lie in guest memory|is not aligned/);
    assert.equal(guest.relay.queues[0]!.state, "failed");
  }
  assert.equal(await guest.echo(guest.driver(1), "fine"), "fine");
});

Deno.test("memory that overlaps, or is larger than its file, is refused and the old table stays", async () => {
  await using guest = await Guest.start();
  const { relay, ram } = guest;
  const region = { gpa: GPA + SIZE, size: SIZE, uaddr: 0x7100_0000, fd: ram.fd, fdOffset: 0 };
  await assert.rejects(relay.addMemRegion({ ...region, gpa: GPA + 4096 }), /overlaps/);
  await assert.rejects(relay.addMemRegion({ ...region, size: SIZE * 2 }), /ends before/);
  await assert.rejects(relay.removeMemRegion({ ...region }), /No memory region/);
  assert.equal(relay.memory.regions.length, 1);
  assert.equal(await guest.echo(guest.driver(1), "fine"), "fine");
});
