import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { createMemfd, mapFd, type OwnedFd, signalEventfd } from "../../src/ffi/mod.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { chooseFile, layoutOf, premap, premapRegions, sharedFiles } from "../../src/relay/premap.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { mapsStatus, memoryStatus } from "../../src/relay/status.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { waitUntil } from "../support/wait.ts";

const QUIET = { log: () => {}, error: (error: { message: string }) => assert.fail(error.message) };
const VERSION_1 = 1n << 32n;
const MIB = 1 << 20;
/** Where the VMM has it; the relay hears of it only from the VMM. */
const VMM_ADDRESS = 0x7f00_0000_0000;

/** A device that notes what it is told of memory, and a relay in front of it. */
async function start(): Promise<AsyncDisposable & { relay: Relay; told: string[] }> {
  const sim = await SimDevice.open({ kind: "loopback" });
  const told: string[] = [];
  const noting = new Proxy(sim, {
    get(target, name) {
      const value = Reflect.get(target, name, target);
      if (typeof value !== "function") return value;
      if (!["setMemTable", "addMemRegion", "removeMemRegion"].includes(String(name))) return value.bind(target);
      return (argument: MemoryRegion | MemoryRegion[]) => {
        // Without the relay's own rings.
        const guest = [argument].flat().filter(({ gpa }) => gpa < 2 ** 40);
        told.push(`${String(name)} ${guest.map(({ gpa, size }) => `${gpa / MIB}+${size / MIB}`).join(" ")}`.trim());
        return value.call(target, argument);
      };
    },
  }) as VhostBackend;
  const relay = new Relay(noting, { ...DEFAULT_RELAY_CONFIG, mode: "shadow" }, QUIET);
  await relay.setFeatures(VERSION_1);
  return {
    relay,
    told,
    [Symbol.asyncDispose]: async () => {
      await relay.close();
      await sim.close();
    },
  };
}

async function startRing(relay: Relay, ring: HandRing): Promise<void> {
  const { index, num, base, addresses, kick, call } = ring.start();
  await relay.setVringNum(index, num);
  await relay.setVringBase(index, base);
  await relay.setVringAddresses(index, addresses);
  await relay.setVringCall(index, call);
  await relay.setVringKick(index, kick);
  await relay.setVringEnable(index, true);
}

async function answers(ring: HandRing): Promise<void> {
  const { bytes } = ring.memory;
  bytes.fill(9, 0x8000, 0x8040);
  ring.offer([0x8000, 64, false], [0x9000, 64, true]);
  signalEventfd(ring.kick.fd);
  await waitUntil("the answer", () => ring.usedIdx === 1);
  assert.equal(bytes[0x9000], 9);
}

const early = ({ gpa, size, fd, fdOffset }: MemoryRegion) => ({ gpa, size, fd, fdOffset });
const given = (region: MemoryRegion): MemoryRegion => ({ ...region, uaddr: VMM_ADDRESS + region.gpa });

for (const message of ["SET_MEM_TABLE", "ADD_MEM_REG"]) {
  Deno.test(`memory that was taken early costs the device nothing when the VMM gives it with ${message}`, async () => {
    await using side = await start();
    const { relay, told } = side;
    using low = new HandMemory(MIB, 0);
    using high = new HandMemory(2 * MIB, 16 * MIB);
    await relay.placed.premap([early(low.region), early(high.region)]);
    assert.deepEqual(told.splice(0), ["setMemTable 0+1 16+2"]);
    assert.equal(mapsStatus(relay, undefined).waiting, 2);
    const table = [given(low.region), given(high.region)];
    if (message === "SET_MEM_TABLE") await relay.setMemTable(table);
    else for (const region of table) await relay.addMemRegion(region);
    using ring = new HandRing(low, 0, 0);
    await startRing(relay, ring);
    assert.deepEqual(told, [], "the device is told nothing inside the gap");
    const { waiting, early: first, adopted, at_start } = mapsStatus(relay, undefined);
    assert.deepEqual([waiting, first.regions, first.bytes, adopted, at_start.regions], [0, 2, 3 * MIB, 2, 0]);
    assert.equal(relay.memory.gpaOfUaddr(VMM_ADDRESS + 16 * MIB), 16 * MIB, "it lies where the VMM says");
    await answers(ring);
  });

  Deno.test(`memory of another file than what was taken early replaces that with ${message}, and counts as mapped at the start`, async () => {
    await using side = await start();
    const { relay, told } = side;
    using wrong = new HandMemory(MIB, 0);
    using right = new HandMemory(MIB, 0);
    using surplus = new HandMemory(MIB, 8 * MIB);
    await relay.placed.premap([early(wrong.region), early(surplus.region)]);
    told.splice(0);
    if (message === "SET_MEM_TABLE") await relay.setMemTable([given(right.region)]);
    else await relay.addMemRegion(given(right.region));
    using ring = new HandRing(right, 0, 0);
    await startRing(relay, ring);
    assert.deepEqual(
      told,
      message === "SET_MEM_TABLE" ? ["setMemTable 0+1"] : ["removeMemRegion 0+1", "addMemRegion 0+1", "removeMemRegion 8+1"],
    );
    assert.equal(relay.memory.regions.length, 1, "nothing stays that the VMM has not given");
    const { waiting, adopted, at_start } = mapsStatus(relay, undefined);
    assert.deepEqual([waiting, adopted, at_start.regions, at_start.bytes], [0, 0, 1, MIB]);
    await answers(ring);
  });
}

Deno.test("memory is taken early once however often it is asked for, given back on request, and not behind the VMM's back", async () => {
  await using side = await start();
  const { relay, told } = side;
  using memory = new HandMemory(MIB, 0);
  await relay.placed.premap([early(memory.region)]);
  await relay.placed.premap([early(memory.region)]);
  assert.deepEqual(told.splice(0), ["setMemTable 0+1"]);
  const own = { name: "r", front: Deno.pid, sealed: false };
  assert.equal((await premap(relay, { drop: true }, own)).dropped, 1);
  assert.deepEqual(told.splice(0), ["removeMemRegion 0+1"]);
  await relay.setMemTable([given(memory.region)]);
  await assert.rejects(relay.placed.premap([early(memory.region)]), { code: "PREMAP_TOO_LATE" });
  assert.equal(relay.memory.regions.length, 1);
  // What the VMM gave has the layout that another relay takes.
  assert.deepEqual(layoutOf(memoryStatus(relay)).map(({ gpa, size, offset, file_size }) => [gpa, size, offset, file_size]), [[
    0,
    MIB,
    0,
    MIB,
  ]]);
});

Deno.test("a device that refuses the memory leaves the relay without it, and the VMM's start as it would have been", async () => {
  await using side = await start();
  const { relay } = side;
  using memory = new HandMemory(MIB, 0);
  const tooLong = { ...early(memory.region), size: 2 * MIB };
  await assert.rejects(relay.placed.premap([early({ ...memory.region, gpa: 4 * MIB }), tooLong]), { code: "REGION_TRUNCATED" });
  assert.deepEqual([relay.memory.regions.length, relay.placed.waiting.length], [0, 0]);
  await relay.setMemTable([given(memory.region)]);
  using ring = new HandRing(memory, 0, 0);
  await startRing(relay, ring);
  await answers(ring);
});

Deno.test("the memory of a process is found among the files that it has mapped, and never guessed", async () => {
  const size = 3 * MIB + 8192;
  const files: OwnedFd[] = [];
  const mapped: Disposable[] = [];
  try {
    const make = (length: number) => {
      const file = createMemfd("premap-test", length);
      files.push(file);
      return file;
    };
    const one = make(size);
    make(size); // Not mapped.
    mapped.push(mapFd(one.fd, { length: size }));
    const region = { gpa: 0, size: MIB, offset: 8192, file_size: size };
    const found = chooseFile(sharedFiles(Deno.pid), [region], Deno.pid);
    assert.equal(found.file, `${Deno.statSync(`/proc/self/fd/${one.fd}`).dev}:${Deno.statSync(`/proc/self/fd/${one.fd}`).ino}`);
    {
      await using side = await start();
      const report = await premap(side.relay, { regions: [region] }, { name: "r", front: Deno.pid, sealed: false });
      assert.deepEqual([report.pid, report.regions, report.waiting, report.bytes], [Deno.pid, 1, 1, MIB]);
      await assert.rejects(
        premap(side.relay, { regions: [region] }, { name: "r", front: undefined, sealed: false }),
        { code: "NO_FRONT_END" },
      );
      const path = Deno.makeTempFileSync();
      Deno.truncateSync(path, size);
      const unsealed = premap(side.relay, { regions: [region], path }, { name: "r", front: undefined, sealed: true });
      await assert.rejects(unsealed, { code: "FILE_UNSEALED" });
      Deno.removeSync(path);
    }
    const other = make(size);
    mapped.push(mapFd(other.fd, { length: size }));
    assert.throws(() => chooseFile(sharedFiles(Deno.pid), [region], Deno.pid), { code: "MEMORY_AMBIGUOUS" });
    assert.throws(() => chooseFile(sharedFiles(Deno.pid), [{ ...region, file_size: 123 * 4096 }], Deno.pid), { code: "MEMORY_NOT_FOUND" });
    assert.throws(() => sharedFiles(2 ** 30), { code: "NO_SUCH_PROCESS" });
  } finally {
    for (const mapping of mapped) mapping[Symbol.dispose]();
    for (const file of files) file.close();
  }
});

Deno.test("a layout from the control socket is checked before anything is mapped", () => {
  const sound = { gpa: 0, size: 4096, offset: 0 };
  assert.equal(premapRegions([sound]).length, 1);
  for (
    const wrong of [undefined, [], [1], [{ ...sound, gpa: -1 }], [{ ...sound, size: 0 }], [{ ...sound, size: 5000 }], [{
      ...sound,
      gpa: 2 ** 52,
    }], [{
      ...sound,
      uaddr: 1,
    }], [{ ...sound, offset: "0" }]]
  ) {
    assert.throws(() => premapRegions(wrong), { code: "BAD_PARAMETER" }, JSON.stringify(wrong));
  }
});
