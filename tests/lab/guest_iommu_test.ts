import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startTestpmd, startVm, type Vm } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

const IOMMU_NET = "iommu_platform=on,disable-legacy=on,ats=on";
const IOMMU = ["-device", "intel-iommu,intremap=off,device-iotlb=on"];

/**
 * Pings, and waits until the guest's kernel has had every answer: on a busy machine the program that counts them may find its
 * socket's buffer overflown.
 */
async function ping(vm: Vm, count: number, options: string): Promise<void> {
  const answers = async () => {
    const [names, values] = (await vm.shell("grep Icmp: /proc/net/snmp")).trim().split("\n").map((line) => line.trim().split(/ +/));
    return Number(values![names!.indexOf("InEchoReps")]);
  };
  const before = await answers();
  const output = await vm.shell(`ping -c ${count} ${options} -W 5 -q 10.77.0.1`, 120_000);
  assert.match(output, new RegExp(`^${count} packets transmitted`, "m"));
  await waitUntil(`${count} answers`, async () => await answers() - before >= count, 10_000);
}

await labTest(
  "a guest with an IOMMU (ats=on, device-iotlb=on) pings DPDK, which knows of none, through the relay",
  ["qemu-10", "guest", "dpdk"],
  async ({ folder, step }) => {
    const socket = folder.join("net.device");
    await using _testpmd = await startTestpmd({ folder: folder.path, socket });
    await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--guest-iommu"] });
    await using vm = await startVm({
      qemu: "10",
      folder: folder.path,
      nets: [{ socket: relay.front, properties: IOMMU_NET }],
      run: "shell",
      append: "intel_iommu=on iommu.strict=1",
      extraArgs: IOMMU,
    });
    await vm.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0", 240_000);

    await step("pings, with every page unmapped after its use", async () => {
      assert.match(await vm.shell("cat /sys/class/net/eth0/device/../iommu_group/type 2>/dev/null || echo DMA"), /DMA/);
      await ping(vm, 20, "-A");
      const status = await relay.status();
      assert.deepEqual(status.queues.map((queue) => [queue.mode, queue.errors]), status.queues.map(() => ["shadow", 0]));
      assert.ok(status.iommu!.misses > 0 && status.iommu!.invalidations > 0, JSON.stringify(status.iommu));
      assert.equal(BigInt(status.features) >> 33n & 1n, 1n, "the guest has ACCESS_PLATFORM");
      console.log(`  IOMMU: ${JSON.stringify(status.iommu)}`);
    });

    // Mappings come and go so fast that they end before the answers to the questions for them are read.
    await step("a stream of pings, of small and of large packets", async () => {
      await ping(vm, 300, "-i 0.01");
      await ping(vm, 100, "-i 0.01 -s 1400");
    });

    // The new driver finds the IOVAs of the old one free, and puts its rings there in other memory.
    await step("a driver that is unbound and bound again pings", async () => {
      await vm.shell("cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 > unbind && echo virtio0 > bind; cd /");
      await vm.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0");
      await ping(vm, 50, "-i 0.02");
      assert.deepEqual((await relay.status()).queues.map((queue) => [queue.mode, queue.errors]), [["shadow", 0], ["shadow", 0]]);
    });
  },
);
