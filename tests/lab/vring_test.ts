import assert from "node:assert/strict";
import { decodeImage } from "../../src/vring/image.ts";
import { dumpRing, type RingDump } from "../../src/vring/dump.ts";
import type { RingSnapshot } from "../../src/vring/snapshot.ts";
import { verifyRing } from "../../src/vring/verify.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startVm, type Vm } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

interface QueueElement {
  index: number;
  descs: { addr: number; len: number; flags: string[] }[];
  avail: { flags: number; idx: number; ring: number };
  used: { flags: number; idx: number };
}

interface QueueStatus {
  "vring-num": number;
  "vring-desc": number;
  "vring-avail": number;
  "vring-used": number;
  "used-idx": number;
  "last-avail-idx": number;
}

async function guestRing(relay: RelayProcess): Promise<{ snapshot: RingSnapshot; dump: RingDump }> {
  const image = decodeImage(await relay.call("vrings", { side: "guest", queues: [0] }), "the relay");
  const snapshot = image.queues[0]!.ring!;
  return { snapshot, dump: dumpRing(snapshot, { all: true })! };
}

async function devicePath(vm: Vm): Promise<string> {
  const devices = await vm.qmp.execute<{ name: string; path: string }[]>("x-query-virtio");
  return devices[0]!.path;
}

/** The buffers of a chain as the dump's descriptors and copied tables have them. */
function buffersOf(snapshot: RingSnapshot, dump: RingDump, position: number): { addr: number; len: number; write: boolean }[] {
  const chain = dump.chains.find((candidate) => candidate.position === position)!;
  if (chain.indirect === null) {
    return chain.descriptors.map((index) => {
      const { address, length, flags } = dump.descriptors[index]!;
      return { addr: Number(address), len: length, write: flags.includes("write") };
    });
  }
  const { bytes } = snapshot.tables.find(({ address }) => address === Number(chain.indirect!.address))!;
  const view = new DataView(bytes.buffer);
  return Array.from({ length: chain.indirect.entries }, (_, i) => ({
    addr: Number(view.getBigUint64(16 * i, true)),
    len: view.getUint32(16 * i + 8, true),
    write: (view.getUint16(16 * i + 12, true) & 2) !== 0,
  }));
}

for (const mode of ["passthrough", "shadow"]) {
  await labTest(
    `svq's dump of a QEMU 10 guest's ring agrees with what QEMU says of it, in mode ${mode}`,
    ["qemu-10", "guest"],
    async ({ folder, step }) => {
      // Requests take long: they can be looked at while nothing moves.
      const device = "sim:blk,size=64MiB,latency=1500ms";
      await using relay = await RelayProcess.start({ folder: folder.path, device, args: ["--mode", mode] });
      await using vm = await startVm({ qemu: "10", folder: folder.path, disk: { socket: relay.front } });
      await vm.shell("true");
      for (let i = 1; i <= 4; i++) await vm.shell(`(dd if=/dev/vda of=/dev/null bs=64k count=500 skip=${i * 200} >/dev/null 2>&1 &)`);
      const path = await devicePath(vm);

      await step("chains in flight", async () => {
        const compared = await waitUntil("requests that rest", async () => {
          const before = await guestRing(relay);
          const flying = before.dump.chains.filter(({ in_flight }) => in_flight);
          if (flying.length === 0) return undefined;
          const elements: QueueElement[] = [];
          for (const { position: index } of flying) {
            elements.push(await vm.qmp.execute<QueueElement>("x-query-virtio-queue-element", { path, queue: 0, index }));
          }
          const { dump } = await guestRing(relay);
          if (dump.avail_idx !== before.dump.avail_idx || dump.used_idx !== before.dump.used_idx) return undefined;
          return { ...before, flying, elements };
        });
        const { snapshot, dump, flying, elements } = compared;
        assert.deepEqual(verifyRing(snapshot), []);
        assert.equal(flying.length, dump.in_flight);
        for (const [i, element] of elements.entries()) {
          const chain = flying[i]!;
          assert.equal(element.avail.idx, dump.avail_idx);
          assert.equal(element.used.idx, dump.used_idx);
          assert.equal(element.avail.ring, chain.head);
          // QEMU lists the last descriptor first.
          assert.deepEqual(
            element.descs.toReversed().map(({ addr, len, flags }) => ({ addr, len, write: flags.includes("write") })),
            buffersOf(snapshot, dump, chain.position),
          );
        }
      });

      await step("indices and places, with the guest stopped", async () => {
        await vm.qmp.execute("stop");
        const status = await vm.qmp.execute<QueueStatus>("x-query-virtio-queue-status", { path, queue: 0 });
        const { dump, snapshot } = await guestRing(relay);
        assert.equal(dump.num, status["vring-num"]);
        const { desc, avail, used } = dump.addresses!;
        assert.deepEqual([desc, avail, used].map(Number), [status["vring-desc"], status["vring-avail"], status["vring-used"]]);
        assert.equal(dump.used_idx, status["used-idx"]);
        assert.equal(dump.last_avail_idx, status["last-avail-idx"]);
        assert.deepEqual(verifyRing(snapshot), []);
      });
    },
  );
}
