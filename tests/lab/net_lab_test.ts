import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { startTestpmd, startVm } from "../support/vm.ts";

for (const qemu of ["7.2", "10"] as const) {
  await labTest(`a QEMU ${qemu} guest pings a DPDK back-end over vhost-user-net`, [`qemu-${qemu}`, "guest", "dpdk"], async ({ folder }) => {
    const socket = folder.join("net.sock");
    await using _testpmd = await startTestpmd({ folder: folder.path, socket });
    await using vm = await startVm({ qemu, folder: folder.path, nets: [{ socket }], run: "shell" });
    await vm.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0");
    const output = await vm.shell("ping -c 3 -W 5 -A 10.77.0.1");
    assert.match(output, /3 packets transmitted, 3 packets received/);
  });
}
