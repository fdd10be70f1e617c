/** A QEMU guest with two queue pairs on sim:net, whose control queue QEMU keeps to itself: the relay drives it. */
import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { BRIDGE_ADDRESS, NetSpace } from "../support/net_space.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { migrate, startVm } from "../support/vm.ts";

const MODES = ["notify", "used", "shadow", "passthrough"] as const;
const MAC = "52:54:00:00:00:01";
const PAIRS = 2;

await labTest(
  "a QEMU guest with two processors uses both queue pairs of sim:net, in every mode and after its migration",
  ["qemu-10", "guest", "root"],
  async ({ folder, step }) => {
    await using space = await NetSpace.start(2);
    const relayOn = (tap: string) =>
      RelayProcess.start({
        folder: folder.path,
        name: tap,
        device: `sim:net,tap=${tap},mac=${MAC},queues=${PAIRS * 2 + 1}`,
        within: space.enter,
        args: ["--mac", MAC],
      });
    await using a = await relayOn("tap0");
    await using b = await relayOn("tap1");
    const uri = `unix:${folder.join("migrate")}`;
    const nets = (relay: RelayProcess) => [{ socket: relay.front, mac: MAC, queues: PAIRS }];
    const common = { qemu: "10", folder: folder.path, run: "shell", cpus: PAIRS } as const;
    await using source = await startVm({ ...common, name: "source", nets: nets(a) });
    await source.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0");
    await source.shell(`ping -c 1 -w 30 ${BRIDGE_ADDRESS}`);

    // What the guest's driver told QEMU has reached the device.
    const settled = async (relay: RelayProcess) => {
      const { net } = await relay.waitStatus("both pairs", ({ net }) => net?.pairs === PAIRS);
      assert.deepEqual([net!.control, net!.queue, net!.refused], ["relay", PAIRS * 2, []]);
      const state = await relay.call<{ mac: string; rx: unknown }>("net_state");
      assert.deepEqual([state.mac, state.rx], [MAC, { allmulti: true }]);
    };
    await settled(a);

    await step("pings while the modes change", async () => {
      const ping = source.shell(`ping -c 40 -i 0.1 -W 5 ${BRIDGE_ADDRESS}`, 120_000);
      let pinging = true;
      const ended = ping.finally(() => pinging = false);
      ended.catch(() => {});
      for (let i = 0; pinging && i < 24; i++) {
        const { queues } = await a.setMode(MODES[i % MODES.length]!);
        const data = queues.filter(({ index }) => index < PAIRS * 2).map(({ mode }) => mode);
        assert.deepEqual(data, data.map(() => MODES[i % MODES.length]));
        await Promise.race([ended.catch(() => {}), new Promise((resolve) => setTimeout(resolve, 150))]);
      }
      assert.match(await ping, /40 packets transmitted, 40 packets received/);
      await a.setMode("auto");
    });

    await step("after a migration", async () => {
      await using destination = await startVm({ ...common, name: "destination", nets: nets(b), incoming: uri });
      await migrate(source, destination, uri);
      await settled(b);
      await destination.send(`ping -c 5 -i 0.2 -W 5 ${BRIDGE_ADDRESS} | grep -c "5 packets received"; echo PINGED\n`);
      await destination.waitSerial(/^PINGED$/, { timeoutMs: 60_000 });
      assert.ok(destination.serial.lines.some(({ text }) => text === "1"), destination.serial.tail());
      for (const relay of [a, b]) assert.equal((await relay.status()).queues.reduce((sum, queue) => sum + queue.errors, 0), 0);
    });
  },
);
