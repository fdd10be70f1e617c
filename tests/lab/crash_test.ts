import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

const SOAKING = Deno.env.get("SVQ_SOAK") === "1";
const KILLS = SOAKING ? 100 : 2;
const WORKLOAD = { report: 100, blocks: 1024, hold: 64 } as const;

for (const [name, args] of Object.entries({ "--resilient": ["--resilient"], used: ["--mode", "used"] })) {
  await labTest(
    `kill -9 of a relay under a QEMU guest's checked disk load, again and again: ${name}`,
    ["qemu-10", "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const socket = folder.join("blk.sock");
      // Slow enough that requests are always in flight.
      await using _daemon = await storageDaemon({ version: "10", image, socket, iops: 300 });
      const start = () => RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args });
      let relay = await start();
      await using rest = new AsyncDisposableStack();
      rest.defer(() => relay[Symbol.asyncDispose]());
      await using vm = await startVm({
        ...{ qemu: "10", folder: folder.path, run: "workload", workload: WORKLOAD },
        disk: { socket: relay.front, reconnect: true },
      });
      await vm.waitReady();
      let redone = 0;
      for (let kill = 0; kill < KILLS; kill++) {
        await vm.nextHeartbeat();
        await new Promise((resolve) => setTimeout(resolve, Math.random() * 100));
        relay.process.kill("SIGKILL");
        await relay.process.status;
        relay = await start();
        const { queues } = await relay.waitStatus(
          "the guest's ring to run again",
          ({ queues: [queue] }) => queue?.mode === (args[1] ?? "shadow"),
        );
        redone += queues[0]!.redone;
      }
      await vm.nextHeartbeat();
      const status = await relay.status();
      assert.equal(status.inflight_region, true);
      assert.deepEqual(status.queues.map((queue) => queue.errors), [0]);
      const result = await vm.finishWorkload();
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, result.digest, "the image holds what the guest wrote");
      assert.ok(redone > 0, "no kill came with a request in hand that the next relay did again");
      console.log(`  ${KILLS} kills, ${redone} requests done again`);
    },
  );
}
