import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startTestpmd, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

const WORKLOAD = { report: 100, blocks: 1024, hold: 64 } as const;

await labTest("one VMM after the other is served, also after one was killed under load", ["qemu-10", "guest"], async ({ folder }) => {
  const image = await makeImage(folder.join("disk.img"));
  const socket = folder.join("blk.device");
  await using _daemon = await storageDaemon({ version: "10", image, socket });
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
  const common = { qemu: "10", folder: folder.path, run: "workload", workload: WORKLOAD, disk: { socket: relay.front } } as const;
  assert.equal((await relay.status()).state, "waiting");
  {
    await using vm = await startVm({ ...common, name: "first" });
    await vm.waitReady();
    assert.equal((await relay.status()).state, "running");
    await vm.nextHeartbeat();
    vm.kill();
  }
  await relay.waitStatus("waits again", (status) => status.state === "waiting" && !status.front_connected);
  await using vm = await startVm({ ...common, name: "second" });
  await vm.waitReady();
  assert.equal((await relay.status()).device_connections, 2);
  const result = await vm.finishWorkload();
  assert.equal(result.ok, true, result.line);
  assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, result.digest);
});

await labTest(
  "the relay connects to a VMM that listens and to one that comes after it, and a device connects to the relay, twice",
  ["qemu-10", "guest", "dpdk"],
  async ({ folder }) => {
    const [front, device] = [folder.join("vmm.sock"), folder.join("net.device")];
    await using relay = await RelayProcess.start({ folder: folder.path, device: `listen:${device}`, connect: front });
    assert.equal((await relay.status()).state, "waiting-device");
    let testpmd = await startTestpmd({ folder: folder.path, socket: device, client: true });
    try {
      await relay.waitStatus("the device came", (status) => status.state === "waiting");
      for (let round = 0; round < 2; round++) {
        const net = { socket: front, server: true };
        await using vm = await startVm({ qemu: "10", folder: folder.path, name: `vm${round}`, nets: [net], run: "shell" });
        await vm.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0", 120_000);
        await relay.waitStatus("runs", (status) => status.state === "running");
        await vm.shell("ping -c 3 -W 5 -A 10.77.0.1");
        if (round === 1) {
          await testpmd[Symbol.asyncDispose]();
          await relay.waitStatus("lost", (status) => status.state === "device-lost" && status.front_connected);
          testpmd = await startTestpmd({ folder: folder.path, socket: device, client: true });
          await relay.waitStatus("back", (status) => status.state === "running");
          await vm.shell("ping -c 3 -W 5 -A 10.77.0.1");
        }
      }
    } finally {
      await testpmd[Symbol.asyncDispose]();
    }
  },
);
