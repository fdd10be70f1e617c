/** A QEMU guest on sim:net behind the relay, with a tap on a bridge in a network namespace of the test's own. */
import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { BRIDGE_ADDRESS, NetSpace } from "../support/net_space.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { migrate, startVm } from "../support/vm.ts";

const MODES = ["notify", "used", "shadow", "passthrough"] as const;
const TCP_SOURCE = new URL("../support/tcp_source.ts", import.meta.url).pathname;
const MAC = "52:54:00:00:00:01";

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `a QEMU ${qemu} guest on a tap loses no ping while its modes change, and a TCP connection survives its migration unharmed`,
    [`qemu-${qemu}`, "guest", "root"],
    async ({ folder, step }) => {
      await using space = await NetSpace.start(2);
      const relayOn = (tap: string) =>
        RelayProcess.start({
          folder: folder.path,
          name: tap,
          device: `sim:net,tap=${tap},mac=${MAC}`,
          within: space.enter,
          args: ["--mode", "auto"],
        });
      await using a = await relayOn("tap0");
      await using b = await relayOn("tap1");
      const uri = `unix:${folder.join("migrate")}`;
      const common = { qemu, folder: folder.path, run: "shell" } as const;
      await using source = await startVm({ ...common, name: "source", nets: [{ socket: a.front, mac: MAC }] });
      await source.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0");
      await source.shell(`ping -c 1 -w 30 ${BRIDGE_ADDRESS}`);

      await step("pings while the modes change", async () => {
        const ping = source.shell(`ping -c 60 -i 0.1 -W 5 ${BRIDGE_ADDRESS}`, 120_000);
        let pinging = true;
        const ended = ping.finally(() => pinging = false);
        ended.catch(() => {});
        for (let i = 0; pinging && i < 40; i++) {
          await a.setMode(MODES[i % MODES.length]!);
          await Promise.race([ended.catch(() => {}), new Promise((resolve) => setTimeout(resolve, 150))]);
        }
        assert.match(await ping, /60 packets transmitted, 60 packets received/);
        await ended;
        await a.setMode("auto");
      });

      await step("TCP over a migration", async () => {
        await using server = space.run("TCP source", [
          Deno.execPath(),
          "run",
          "-A",
          "--quiet",
          TCP_SOURCE,
          BRIDGE_ADDRESS,
          "7000",
          "4096",
          "12000",
        ]);
        const [, digest] = await server.stdout.wait(/^digest (\w+)$/);
        await server.stdout.wait(/^listening$/);
        await source.shell(`(nc ${BRIDGE_ADDRESS} 7000 </dev/null | sha256sum > /tmp/sum; echo done >> /tmp/sum) & true`);
        await server.stdout.wait(/^quarter$/);
        await using destination = await startVm({ ...common, name: "destination", nets: [{ socket: b.front, mac: MAC }], incoming: uri });
        const figures = await migrate(source, destination, uri, { stopGuest: qemu === "7.2" });
        await server.stdout.wait(/^sent$/, { timeoutMs: 120_000 });
        await destination.send("while ! grep -q done /tmp/sum; do sleep 1; done; cat /tmp/sum; echo SUM DONE\n");
        await destination.waitSerial(/^SUM DONE$/, { timeoutMs: 120_000 });
        assert.ok(destination.serial.lines.some(({ text }) => text.startsWith(digest!)), destination.serial.tail());
        for (const relay of [a, b]) assert.equal((await relay.status()).queues.reduce((sum, queue) => sum + queue.errors, 0), 0);
        console.log(`  QEMU ${qemu}: total ${figures.totalMs} ms, downtime ${figures.downtimeMs} ms`);
      });
    },
  );
}
