import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { SvqError } from "../../src/errors.ts";
import { signalEventfd } from "../../src/ffi/mod.ts";
import { allocationRequest, RelayIova } from "../../src/relay/iova_control.ts";
import { Relay } from "../../src/relay/relay.ts";
import { DEFAULT_RELAY_CONFIG } from "../../src/relay/relay_config.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import { FakeVdpa } from "../vhost/fake_vdpa.ts";
import { countFds } from "../support/fds.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { waitUntil } from "../support/wait.ts";

const MIB = 1 << 20;
const NAMES = { name: "r", device: "d" };
const QUIET = { log: () => {}, error: (error: { message: string }) => assert.fail(error.message) };

function overVdpa(fake: FakeVdpa): { relay: Relay; device: VhostVdpa } & AsyncDisposable {
  const device = new VhostVdpa(fake, {});
  const relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode: "shadow" }, QUIET);
  return {
    relay,
    device,
    [Symbol.asyncDispose]: async () => {
      await relay.close();
      await device.close();
    },
  };
}

const spans = (fake: FakeVdpa) => [...fake.table.values()].map(({ iova, size }) => [iova, size]);

Deno.test("what is allocated with memory is mapped at the device, stays when the VMM changes its table, and is unmapped when it is freed", async () => {
  const fake = new FakeVdpa({ range: [0n, 2n ** 39n - 1n] });
  await using over = overVdpa(fake);
  const iova = new RelayIova(NAMES);
  const made = await iova.alloc(over.relay, { size: 2 * MIB, tag: "mine", map: true });
  const place = 2 ** 39 - 2 * MIB;
  assert.deepEqual(made.allocated, { iova: `0x${place.toString(16)}`, size_bytes: 2 * MIB, asid: 0, perm: "rw", tag: "mine" });
  assert.deepEqual(spans(fake), [[place, 2 * MIB]]);
  using memory = new HandMemory(MIB, 0);
  await over.relay.setMemTable([memory.region]);
  assert.ok(spans(fake).some(([at]) => at === place) && spans(fake).some(([at]) => at === 0), "both are mapped");
  assert.equal(fake.table.size, 3, "guest, shadow rings, and this");
  await over.relay.setMemTable([]);
  assert.ok(spans(fake).some(([at]) => at === place), "it does not go with the guest's memory");
  await iova.free(over.relay, { iova: place });
  assert.ok(!spans(fake).some(([at]) => at === place));
  assert.ok(!iova.show(over.relay).allocations.some(({ tag }) => tag === "mine"));
});

Deno.test("what the device refuses to map is not allocated, and no descriptor stays open", async () => {
  const fake = new FakeVdpa({ range: [0n, 2n ** 39n - 1n], pinLimit: MIB });
  await using over = overVdpa(fake);
  const iova = new RelayIova(NAMES);
  // The Worker has opened all that it opens.
  await over.relay.setMemTable([]);
  const before = countFds();
  await assert.rejects(iova.alloc(over.relay, { size: 2 * MIB, map: true }), (error: SvqError) => /IOTLB_REFUSED|MEMLOCK/.test(error.code));
  assert.deepEqual(iova.show(over.relay).allocations.map(({ tag }) => tag), ["arena shadow rings"]);
  assert.equal(countFds(), before);
});

Deno.test("memory is only put behind ranges where that can work", async () => {
  const fake = new FakeVdpa({ range: [0n, 2n ** 39n - 1n] });
  await using over = overVdpa(fake);
  const iova = new RelayIova(NAMES);
  for (const extra of [{ asid: 1 }, { perm: "ro" }]) {
    await assert.rejects(iova.alloc(over.relay, { size: MIB, map: true, ...extra }), { code: "CANNOT_MAP" });
  }
  assert.equal(fake.table.size, 0);
});

Deno.test("a next relay gets what was allocated at the same addresses, before its first guest memory; what it cannot hold is told", async () => {
  const iova = new RelayIova(NAMES);
  const warnings: string[] = [];
  let place: string;
  {
    await using first = overVdpa(new FakeVdpa({ range: [0n, 2n ** 39n - 1n] }));
    await iova.alloc(first.relay, { size: MIB, tag: "low", iova: MIB });
    place = ((await iova.alloc(first.relay, { size: MIB, tag: "high", map: true })).allocated as { iova: string }).iova;
  }
  {
    const fake = new FakeVdpa({ range: [0n, 2n ** 39n - 1n] });
    await using second = overVdpa(fake);
    const restored = iova.restore(second.relay, (message) => warnings.push(message));
    using memory = new HandMemory(4 * MIB, 0);
    await second.relay.setMemTable([memory.region]);
    await restored;
    const { allocations, regions } = iova.show(second.relay);
    assert.deepEqual(
      allocations.filter(({ tag }) => tag === "low" || tag === "high").map(({ tag, iova }) => [tag, iova]).sort(),
      [["high", place], ["low", "0x100000"]],
    );
    assert.equal(regions[0]!.identity, false, "guest memory keeps clear of it");
    assert.equal(warnings.length, 0);
  }
  {
    await using third = overVdpa(new FakeVdpa({ range: [0n, 2n ** 32n - 1n] }));
    await iova.restore(third.relay, (message) => warnings.push(message));
    assert.match(warnings.join(), /high at .* outside the usable range/);
    assert.deepEqual(iova.show(third.relay).allocations.map(({ tag }) => tag), ["low"]);
  }
});

Deno.test("requests go on while ranges are allocated and freed beside them", async () => {
  await using sim = await SimDevice.open({ kind: "loopback" });
  await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode: "shadow" }, QUIET);
  const iova = new RelayIova(NAMES);
  using memory = new HandMemory(MIB, 0);
  using ring = new HandRing(memory, 0, 0);
  await relay.setFeatures(1n << 32n);
  await relay.addMemRegion(memory.region);
  const { index, num, base, addresses, kick, call } = ring.start();
  await relay.setVringNum(index, num);
  await relay.setVringBase(index, base);
  await relay.setVringAddresses(index, addresses);
  await relay.setVringCall(index, call);
  await relay.setVringKick(index, kick);
  await relay.setVringEnable(index, true);
  for (let round = 1; round <= 20; round++) {
    ring.offer([0x8000, 64, false], [0x9000, 64, true]);
    signalEventfd(ring.kick.fd);
    const { allocated } = await iova.alloc(relay, { size: 4096 * round, map: round % 2 === 0 });
    await waitUntil("the answer", () => ring.usedIdx === round);
    if (round % 3 !== 0) await iova.free(relay, { iova: Number((allocated as { iova: string }).iova) });
  }
  assert.equal(iova.show(relay).allocations.filter(({ tag }) => tag === "operator").length, 6);
});

Deno.test("nothing that comes through the control socket is believed", () => {
  for (
    const params of [
      {},
      { size: -1 },
      { size: 1.5 },
      { size: "4096" },
      { size: 4096, iova: "0x0" },
      { size: 4096, iova: 2 ** 60 },
      { size: 4096, perm: "x" },
      { size: 4096, perm: "toString" },
      { size: 4096, tag: "\u001b[2J" },
      { size: 4096, tag: "" },
      { size: 4096, map: 1 },
      { size: 4096, other: 1 },
    ]
  ) {
    assert.throws(() => allocationRequest(params), { code: "BAD_PARAMETER" }, JSON.stringify(params));
  }
});
