import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startTestpmd } from "../support/vm.ts";
import { VirtioUser } from "../support/virtio_user.ts";
import { waitUntil } from "../support/wait.ts";

// The testpmd behind the relay sends every frame back. As many as one burst of either side and its ring take.
const FRAMES = Array.from({ length: 64 }, (_, number) => {
  const frame = new Uint8Array(60 + (number * 97) % 1440).map((_, i) => number * 31 + i * 7);
  // Local experimental EtherType, an address of one station.
  frame.set([2, 0, 0, 0, 0, number, 2, 0, 0, 0, 1, number, 0x88, 0xb5, 0, number]);
  return frame;
});

const RINGS = [
  { name: "split rings", packed: false, inOrder: false },
  { name: "packed rings", packed: true, inOrder: false },
  { name: "in-order split rings", packed: false, inOrder: true },
  { name: "in-order packed rings", packed: true, inOrder: true },
];

for (const { name, packed, inOrder } of RINGS) {
  for (const mergeable of [false, true]) {
    await labTest(
      `frames of DPDK virtio-user with ${name}${
        mergeable ? " and mergeable buffers" : ""
      } go through the relay to DPDK and come back byte for byte, in every mode`,
      ["dpdk"],
      async ({ folder }) => {
        const socket = folder.join("net.sock");
        await using _back = await startTestpmd({ folder: folder.path, socket, mode: "io" });
        await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
        await using front = await VirtioUser.start({
          ...{ folder: folder.path, socket: relay.front, packed, inOrder, mergeable, frames: FRAMES },
        });
        await relay.waitStatus("both queues run", (status) => status.queues.filter((queue) => queue.mode === "passthrough").length >= 2);
        let rounds = 0;
        for (const mode of ["passthrough", "shadow", "used", "notify", "shadow", "passthrough"] as const) {
          const status = await relay.setMode(mode);
          const expected = mode === "used" && packed ? "shadow" : mode;
          assert.deepEqual(status.queues.map((queue) => queue.mode), [expected, expected]);
          assert.deepEqual(status.queues.map((queue) => queue.guest_ring), Array(2).fill(packed ? "packed" : "split"));
          const before = status.queues.map((queue) => queue.chains);
          await front.replay();
          assert.deepEqual(await front.frames(FRAMES.length), FRAMES, `mode ${mode}`);
          const total = ++rounds * FRAMES.length;
          await waitUntil("the port's counters", async () => {
            const { received, sent } = await front.counters();
            assert.ok(received <= total && sent <= total, `received ${received} and sent ${sent} of ${total}`);
            return received === total && sent === total;
          });
          const relayed = (await relay.status()).queues.map((queue, i) => queue.chains - before[i]!);
          if (expected === "shadow" || expected === "used") {
            assert.deepEqual(relayed, [FRAMES.length, FRAMES.length], "each frame is one chain of either queue");
          }
        }
        const status = await relay.status();
        assert.deepEqual(status.queues.map((queue) => queue.errors), [0, 0]);
      },
    );
  }
}
