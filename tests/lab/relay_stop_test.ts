import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `SIGTERM ends a relay under load with exit code 0, and a new one of that name serves the QEMU ${qemu} guest on`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const device = folder.join("device");
      await using _daemon = await storageDaemon({ version: qemu, image, socket: device });
      const options = { folder: folder.path, device: `unix:${device}` };
      for (const [i, mode] of ["passthrough", "shadow"].entries()) {
        await using relay = await RelayProcess.start({ ...options, args: ["--mode", mode] });
        await using vm = await startVm({
          qemu,
          folder: folder.path,
          name: `vm${i}`,
          disk: { socket: relay.front, reconnect: true },
          run: "workload",
          workload: { report: 100 },
        });
        await vm.waitReady();
        await vm.nextHeartbeat();
        await relay.stop();
        const stopped = vm.heartbeats().at(-1)!;
        await using again = await RelayProcess.start({ ...options, args: ["--mode", mode] });
        const begun = performance.now();
        const status = await again.waitStatus("serves the guest", (status) => status.state === "running");
        assert.equal(status.queues[0]!.mode, mode);
        while ((await vm.nextHeartbeat()).ops <= stopped.ops + 100);
        console.log(`  QEMU ${qemu}, ${mode}: the guest's I/O goes on ${Math.round(performance.now() - begun)} ms after the relay is back`);
        const result = await vm.finishWorkload();
        assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
        assert.equal((await verifyImage(image)).digest, result.digest);
      }
    },
  );
}
