import assert from "node:assert/strict";
import { QmpClient } from "../../src/migration/qmp.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startVm, storageDaemon, verifyImage, type Vm } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

const WORKLOAD = { report: 100, blocks: 1024, hold: 64 } as const;
/** From `notify`, too, the log turns the queue to `used`. */
const MODES = { used: ["--mode", "notify"], shadow: ["--force-shadow"] } as const;

async function migrationStatus(vm: Vm): Promise<string> {
  return (await vm.qmp.execute<{ status: string }>("query-migrate")).status;
}

/** Starts a migration that does not end by itself. */
async function beginSlowly(source: Vm, relay: RelayProcess, uri: string): Promise<void> {
  await source.qmp.execute("migrate-set-parameters", { "max-bandwidth": 2 << 20, "downtime-limit": 1 });
  await source.qmp.execute("migrate", { uri });
  await relay.waitStatus("logs", (status) => status.logging);
}

async function endQuickly(source: Vm, destination: Vm): Promise<void> {
  const now = await migrationStatus(source);
  assert.ok(["setup", "active", "completed"].includes(now), now);
  await source.qmp.execute("migrate-set-parameters", { "max-bandwidth": 1 << 30, "downtime-limit": 300 });
  await waitUntil("the migration's end", async () => {
    const status = await migrationStatus(source);
    if (status === "failed" || status === "cancelled") throw new Error(`The migration is ${status}`);
    return status === "completed";
  }, 120_000);
  await waitUntil("the destination to have taken over", async () => {
    return (await destination.qmp.execute<{ status: string }>("query-status")).status === "running";
  });
}

for (const [mode, args] of Object.entries(MODES)) {
  await labTest(
    `in the middle of a migration a disk is resized, its daemon dies, the guest is reset, and all arrives: ${mode}`,
    ["qemu-10", "guest"],
    async ({ folder, step }) => {
      const image = await makeImage(folder.join("disk.img"));
      const [socketA, socketB, monitor] = [folder.join("a.device"), folder.join("b.device"), folder.join("qsd.qmp")];
      let daemon = await storageDaemon({ version: "10", image, socket: socketA, qmpSocket: monitor });
      try {
        await using _b = await storageDaemon({ version: "10", image, socket: socketB });
        await using relayA = await RelayProcess.start({ folder: folder.path, name: "a", device: `unix:${socketA}`, args: [...args] });
        await using relayB = await RelayProcess.start({ folder: folder.path, name: "b", device: `unix:${socketB}`, args: [...args] });
        const uri = `unix:${folder.join("migrate")}`;
        const common = { qemu: "10", folder: folder.path, reboot: true, run: "workload", workload: WORKLOAD } as const;
        await using source = await startVm({ ...common, name: "source", disk: { socket: relayA.front } });
        await using destination = await startVm({ ...common, name: "destination", incoming: uri, disk: { socket: relayB.front } });
        await source.waitReady();

        await step("the log is on", async () => {
          await beginSlowly(source, relayA, uri);
          const status = await relayA.waitStatus("relays", (status) => status.queues[0]!.mode === mode);
          assert.equal(status.queues[0]!.errors, 0);
          await source.nextHeartbeat();
        });

        await step("block_resize", async () => {
          const after = (await relayA.messages()).at(-1)!.seq;
          const qsd = await QmpClient.connect(monitor);
          try {
            await qsd.execute("block_resize", { "node-name": "file0", size: 96 << 20 });
          } finally {
            await qsd.close();
          }
          await waitUntil("the VMM to read the new size", async () => {
            const messages = await relayA.messages(after);
            return messages.some(({ from, request }) => from === "vmm" && request === "GET_CONFIG");
          });
          await source.nextHeartbeat();
        });

        await step("the daemon dies and comes back", async () => {
          await daemon[Symbol.asyncDispose]();
          await relayA.waitStatus("lost", (status) => status.state === "device-lost");
          daemon = await storageDaemon({ version: "10", image, socket: socketA, qmpSocket: monitor });
          await relayA.waitStatus("back", (status) => status.state === "running");
          await source.progress(await source.nextHeartbeat());
        });

        await step("system_reset", async () => {
          const after = (await relayA.messages()).at(-1)!.seq;
          const since = source.serial.lines.length;
          await source.qmp.execute("system_reset");
          await source.waitReady(120_000, since);
          const names = (await relayA.messages(after)).filter(({ from, reply }) => from === "vmm" && !reply).map(({ request }) => request);
          assert.ok(
            names.lastIndexOf("SET_LOG_BASE") > names.lastIndexOf("SET_VRING_KICK"),
            `the log comes after the kick: ${names.join(" ")}`,
          );
          assert.equal((await relayA.status()).queues[0]!.mode, mode);
        });

        await step("the migration ends and the guest goes on", async () => {
          await endQuickly(source, destination);
          const before = await destination.nextHeartbeat();
          await destination.progress(before);
          for (const relay of [relayA, relayB]) assert.deepEqual((await relay.status()).queues.map((queue) => queue.errors), [0]);
          const result = await destination.finishWorkload();
          assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
          assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, result.digest);
        });
      } finally {
        await daemon[Symbol.asyncDispose]();
      }
    },
  );
}

for (const [mode, args] of Object.entries(MODES)) {
  await labTest(
    `memory is plugged into a guest under load, and it migrates with the larger log: ${mode}`,
    ["qemu-10", "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const [socketA, socketB] = [folder.join("a.device"), folder.join("b.device")];
      await using _a = await storageDaemon({ version: "10", image, socket: socketA });
      await using _b = await storageDaemon({ version: "10", image, socket: socketB });
      await using relayA = await RelayProcess.start({ folder: folder.path, name: "a", device: `unix:${socketA}`, args: [...args] });
      await using relayB = await RelayProcess.start({ folder: folder.path, name: "b", device: `unix:${socketB}`, args: [...args] });
      const uri = `unix:${folder.join("migrate")}`;
      const common = { qemu: "10", folder: folder.path, run: "workload", workload: WORKLOAD } as const;
      const slots = ["-m", "size=256M,slots=2,maxmem=1G"];
      const dimm = ["-object", "memory-backend-memfd,id=extra,size=128M,share=on", "-device", "pc-dimm,id=dimm,memdev=extra"];
      await using source = await startVm({ ...common, name: "source", disk: { socket: relayA.front }, extraArgs: slots });
      await using destination = await startVm({
        ...{ ...common, name: "destination", incoming: uri, disk: { socket: relayB.front } },
        extraArgs: [...slots, ...dimm],
      });
      await source.waitReady();
      const before = (await relayA.status()).maps.guest;
      await source.qmp.execute("object-add", { "qom-type": "memory-backend-memfd", id: "extra", size: 128 << 20, share: true });
      await source.qmp.execute("device_add", { driver: "pc-dimm", id: "dimm", memdev: "extra" });
      await relayA.waitStatus("has the region", (status) => status.maps.guest === before + 1);
      await source.nextHeartbeat();
      await source.qmp.execute("migrate", { uri });
      await relayA.waitStatus("logs", (status) => status.logging);
      await endQuickly(source, destination);
      const log = (await relayA.messages()).find(({ from, request, reply }) => from === "vmm" && request === "SET_LOG_BASE" && !reply);
      assert.ok(Number(log!.fields.size) >= (2 ** 32 + (128 << 20)) / 4096 / 8, `a log of ${log!.fields.size} bytes`);
      await destination.progress(await destination.nextHeartbeat());
      for (const relay of [relayA, relayB]) assert.deepEqual((await relay.status()).queues.map((queue) => queue.errors), [0]);
      const result = await destination.finishWorkload();
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, result.digest);
    },
  );
}
