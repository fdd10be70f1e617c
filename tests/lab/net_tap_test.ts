/** A QEMU guest on sim:net behind the relay, with a tap on a bridge in a network namespace of the test's own. */
import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { gapText, NetProbe } from "../support/net_probe.ts";
import { BRIDGE_ADDRESS, NetSpace } from "../support/net_space.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { migrate, startVm, type Vm } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

const MODES = ["notify", "used", "shadow", "passthrough"] as const;
const TCP_SOURCE = new URL("../support/tcp_source.ts", import.meta.url).pathname;
const MAC = "52:54:00:00:00:01";

/** Frames that the guest has counted, received and sent. */
async function guestFrames(vm: Vm): Promise<[number, number]> {
  const since = vm.serial.lines.length;
  await vm.send("cd /sys/class/net/eth0/statistics; echo FRAMES $(cat rx_packets) $(cat tx_packets); cd /\n");
  const [, rx, tx] = await vm.waitSerial(/^FRAMES (\d+) (\d+)$/, { since });
  return [Number(rx), Number(tx)];
}

/** Frames that the devices behind the relays have counted. */
async function deviceFrames(relays: readonly RelayProcess[]): Promise<[number, number]> {
  const queues = (await Promise.all(relays.map((relay) => relay.status()))).flatMap((status) => status.queues);
  const sum = (index: number) => queues.reduce((sum, queue) => queue.index === index ? sum + queue.frames!.frames : sum, 0);
  return [sum(0), sum(1)];
}

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `a QEMU ${qemu} guest on a tap loses no ping while its modes change, and a TCP connection survives its migration unharmed`,
    [`qemu-${qemu}`, "guest", "root"],
    async ({ folder, step }) => {
      await using space = await NetSpace.start(3);
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

      const [guestBefore, deviceBefore] = [await guestFrames(source), await deviceFrames([a])];
      const probing = () => NetProbe.start("sim:net,tap=tap2,mac=52:54:00:00:00:09", "10.77.0.2", { within: space.enter });

      await step("pings while the modes change", async () => {
        await using probe = probing();
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
        const report = await probe.end();
        assert.deepEqual([report.missing, report.reordered, report.duplicated], [0, 0, 0], gapText(report));
        console.log(`  QEMU ${qemu}, modes change: ${gapText(report)}`);
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
        await using probe = probing();
        await using destination = await startVm({ ...common, name: "destination", nets: [{ socket: b.front, mac: MAC }], incoming: uri });
        const figures = await migrate(source, destination, uri, { stopGuest: qemu === "7.2" });
        await server.stdout.wait(/^sent$/, { timeoutMs: 120_000 });
        await destination.send("while ! grep -q done /tmp/sum; do sleep 1; done; cat /tmp/sum; echo SUM DONE\n");
        await destination.waitSerial(/^SUM DONE$/, { timeoutMs: 120_000 });
        assert.ok(destination.serial.lines.some(({ text }) => text.startsWith(digest!)), destination.serial.tail());
        for (const relay of [a, b]) assert.equal((await relay.status()).queues.reduce((sum, queue) => sum + queue.errors, 0), 0);
        const report = await probe.end();
        assert.deepEqual([report.reordered, report.duplicated], [0, 0], gapText(report));
        // What the guest has sent has left a device, and what a device put into its rings it has got: the relay lost none.
        const counted = async () => {
          const [device, guest] = [await deviceFrames([a, b]), await guestFrames(destination)];
          return device.map((count, i) => count - deviceBefore[i]! - (guest[i]! - guestBefore[i]!));
        };
        await waitUntil("guest and devices count the same frames", async () => (await counted()).every((lost) => lost === 0), 20_000)
          .catch(async () => assert.deepEqual(await counted(), [0, 0], "frames that devices have counted and the guest has not"));
        console.log(
          `  QEMU ${qemu}, migration: ${gapText(report)}; of ${(await guestFrames(destination)).join(" + ")} frames the relays lost 0`,
        );
        console.log(`  QEMU ${qemu}: total ${figures.totalMs} ms, downtime ${figures.downtimeMs} ms`);
      });
    },
  );
}
