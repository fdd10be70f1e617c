import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startTestpmd } from "../support/vm.ts";
import { VirtioUser } from "../support/virtio_user.ts";
import { waitUntil } from "../support/wait.ts";

// Frames bounce between the two testpmd: each one that the front-end receives it had sent before.
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
      } go through the relay to DPDK and back, in every mode`,
      ["dpdk"],
      async ({ folder }) => {
        const socket = folder.join("net.sock");
        await using _back = await startTestpmd({ folder: folder.path, socket, mode: "io" });
        await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
        await using front = await VirtioUser.start({ folder: folder.path, socket: relay.front, packed, inOrder, mergeable });
        await front.command("start tx_first");
        await relay.waitStatus("both queues run", (status) => status.queues.filter((queue) => queue.mode === "passthrough").length >= 2);
        for (const mode of ["passthrough", "shadow", "used", "notify", "shadow", "passthrough"] as const) {
          const status = await relay.setMode(mode);
          const expected = mode === "used" && packed ? "shadow" : mode;
          assert.deepEqual(status.queues.map((queue) => queue.mode), [expected, expected]);
          assert.deepEqual(status.queues.map((queue) => queue.guest_ring), Array(2).fill(packed ? "packed" : "split"));
          const before = await front.counters();
          await waitUntil(`frames in mode ${mode}`, async () => {
            const { received, sent } = await front.counters();
            return received > before.received + 100 && sent > before.sent + 100;
          });
        }
        const status = await relay.status();
        assert.deepEqual(status.queues.map((queue) => queue.errors), [0, 0]);
      },
      "four busy polling threads need more than a busy machine of two cores: not seen to finish there",
    );
  }
}
