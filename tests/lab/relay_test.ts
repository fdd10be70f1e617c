import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

const MODES = ["passthrough", "shadow", "notify", "used"] as const;

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `a QEMU ${qemu} guest works through the relay in every mode, switching every 100 ms`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder, step }) => {
      const image = await makeImage(folder.join("disk.img"));
      const socket = folder.join("blk.sock");
      await using _daemon = await storageDaemon({ version: qemu, image, socket });
      await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
      await using vm = await startVm({
        qemu,
        folder: folder.path,
        disk: { socket: relay.front },
        run: "workload",
        workload: { report: 100 },
      });
      await vm.waitReady();

      await step("passthrough", async () => {
        const status = await relay.waitStatus("runs", (status) => status.state === "running");
        assert.equal(status.queues[0]!.mode, "passthrough");
        await vm.nextHeartbeat();
        assert.equal((await relay.status()).queues[0]!.chains, 0, "the relay touches no chain");
      });

      await step("shadow", async () => {
        const status = await relay.setMode("shadow");
        assert.equal(status.queues[0]!.mode, "shadow");
        const before = await vm.nextHeartbeat();
        await vm.progress(before);
        assert.ok((await relay.status()).queues[0]!.chains > 0);
      });

      await step("switching every 100 ms", async () => {
        for (let i = 0; i < 40; i++) {
          await relay.setMode(MODES[i % MODES.length]!);
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
        const status = await relay.status();
        assert.ok(status.queues[0]!.switches.count >= 40);
        assert.equal(status.queues[0]!.errors, 0);
        console.log(
          `  QEMU ${qemu}: ${status.queues[0]!.switches.count} switches, longest stall ${status.queues[0]!.switches.longest_stall_us} us`,
        );
      });

      await step("upgraded under the guest's load", async () => {
        await relay.setMode(qemu === "10" ? "shadow" : "auto");
        const { pid, stall_ms } = await relay.upgrade();
        const before = await vm.nextHeartbeat();
        await vm.progress(before);
        const status = await relay.status();
        assert.deepEqual([status.pid, status.state, status.device_connections], [pid, "running", 1]);
        assert.equal(status.queues[0]!.mode, qemu === "10" ? "shadow" : "passthrough", "the mode that was set while it ran");
        console.log(`  QEMU ${qemu}: its rings stood still for ${stall_ms} ms`);
      });

      const result = await vm.finishWorkload();
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image)).digest, result.digest);
    },
  );
}
