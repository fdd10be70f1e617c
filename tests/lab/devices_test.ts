import assert from "node:assert/strict";
import type { RelayStatus } from "../../src/relay/status.ts";
import { echoOn, startPasst, startVirtiofsd, startVsock, vsockRests } from "../support/daemons.ts";
import { gapText, NetProbe } from "../support/net_probe.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { migrate, startTestpmd, startVm, type Vm } from "../support/vm.ts";

const MODES = ["passthrough", "shadow", "used", "notify"] as const;

function modesOf(status: RelayStatus): string[] {
  assert.deepEqual(status.queues.map((queue) => queue.error), status.queues.map(() => null));
  return status.queues.filter((queue) => queue.mode !== "stopped").map((queue) => queue.mode);
}

async function ping(vm: Vm, address: string, count = 3): Promise<void> {
  // On a slow host a request may be repeated before its answer has come.
  assert.match(await vm.shell(`ping -c ${count} -W 5 -A ${address}`), new RegExp(`, ${count} packets received`));
}

/** Takes the driver off its device and gives it back: a new start of all rings, without a boot. */
async function startAnew(vm: Vm): Promise<void> {
  await vm.shell(
    "cd /sys/bus/virtio/drivers/virtio_net; d=$(basename $(readlink -f /sys/class/net/eth0/device)); echo $d >unbind; echo $d >bind; cd /",
  );
}

await labTest("a guest pings a DPDK back-end through the relay in every mode", ["qemu-10", "guest", "dpdk"], async ({ folder, step }) => {
  const socket = folder.join("net.sock");
  await using _testpmd = await startTestpmd({ folder: folder.path, socket });
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--mode", "shadow"] });
  await using vm = await startVm({ qemu: "10", folder: folder.path, nets: [{ socket: relay.front }], run: "shell" });
  const up = () => vm.shell("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0");
  await up();
  for (const mode of MODES) {
    await step(mode, async () => {
      await relay.setMode(mode);
      await ping(vm, "10.77.0.1");
      assert.deepEqual(modesOf(await relay.status()), [mode, mode]);
      await startAnew(vm);
      await up();
      await ping(vm, "10.77.0.1");
      assert.deepEqual(modesOf(await relay.status()), [mode, mode]);
    });
  }
  await step("a probe stream while the modes change", async () => {
    await vm[Symbol.asyncDispose]();
    await relay.waitStatus("is free for the next front-end", ({ state }) => state === "waiting");
    await using probe = NetProbe.start(`unix:${relay.front}`, "10.77.0.1", { rate: 200 });
    await relay.waitStatus("sends and receives", ({ queues }) => queues.length === 2 && queues.every(({ used_idx }) => used_idx > 10));
    for (let i = 0; i < 12; i++) {
      await relay.setMode(MODES[i % MODES.length]!);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const report = await probe.end();
    assert.deepEqual([report.missing, report.reordered, report.duplicated], [0, 0, 0], gapText(report));
    console.log(`  ${gapText(report)}`);
  });
});

await labTest(
  "a guest talks TCP through passt and the relay in every mode",
  ["qemu-10", "guest", "passt", "root"],
  async ({ folder, step }) => {
    const socket = folder.join("passt.sock");
    const echo =
      `deno eval 'for await (const c of Deno.listen({hostname: "127.0.0.1", port: 7777})) c.readable.pipeTo(c.writable).catch(() => {})'`;
    const passt = await startPasst(socket, echo);
    await using _passt = passt.process;
    await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--mode", "used"] });
    await using vm = await startVm({ qemu: "10", folder: folder.path, nets: [{ socket: relay.front }], run: "shell" });
    const up = () =>
      vm.shell(`ip link set eth0 up && ip addr add ${passt.address}/24 dev eth0 && ip route add default via ${passt.gateway}`);
    await up();
    await vm.shell("dd if=/dev/urandom of=/tmp/sent bs=1024 count=128 2>/dev/null");
    const talk = () => vm.shell(`(cat /tmp/sent; sleep 2) | nc -w 10 ${passt.gateway} 7777 >/tmp/came; cmp /tmp/sent /tmp/came`, 60_000);
    for (const mode of MODES) {
      await step(mode, async () => {
        await relay.setMode(mode);
        await talk();
        assert.deepEqual(new Set(modesOf(await relay.status())), new Set([mode]));
        await startAnew(vm);
        await up();
        await talk();
        assert.deepEqual(new Set(modesOf(await relay.status())), new Set([mode]));
      });
    }
  },
);

await labTest(
  "a guest mounts, writes and reads through virtiofsd and the relay in every mode",
  ["qemu-10", "guest", "virtiofsd"],
  async ({ folder, step }) => {
    const socket = folder.join("fs.sock");
    const share = folder.join("share");
    await Deno.mkdir(share);
    await Deno.writeTextFile(`${share}/hello`, "from the host\n");
    await using _daemon = await startVirtiofsd(socket, share);
    await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--mode", "used"] });
    await using vm = await startVm({
      ...{ qemu: "10", folder: folder.path, run: "shell", modules: ["fs"] },
      extraArgs: fsArgs(relay.front),
    });
    for (const mode of MODES) {
      await step(mode, async () => {
        await vm.shell("mount -t virtiofs share /mnt");
        // The switch comes with the file system mounted.
        await relay.setMode(mode);
        assert.equal(await vm.shell("cat /mnt/hello"), "from the host");
        await vm.shell("dd if=/dev/urandom of=/mnt/data bs=64k count=16 2>/dev/null; sync");
        const [sum] = (await vm.shell("sha256sum /mnt/data")).split(" ");
        assert.equal(sum, await sha256(`${share}/data`));
        assert.deepEqual(new Set(modesOf(await relay.status())), new Set([mode]));
        await vm.shell("umount /mnt");
      });
    }
  },
);

function fsArgs(socket: string): string[] {
  return ["-chardev", `socket,id=fs0,path=${socket}`, "-device", "vhost-user-fs-pci,chardev=fs0,tag=share,queue-size=256"];
}

async function sha256(path: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", await Deno.readFile(path));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

await labTest(
  "a guest with a virtiofs mount and an open file migrates through the relay, and the file goes on",
  ["qemu-10", "guest", "virtiofsd"],
  async ({ folder }) => {
    const share = folder.join("share");
    await Deno.mkdir(share);
    await using _a = await startVirtiofsd(folder.join("fa.sock"), share);
    await using _b = await startVirtiofsd(folder.join("fb.sock"), share);
    await using relayA = await RelayProcess.start({ folder: folder.path, name: "a", device: `unix:${folder.join("fa.sock")}` });
    await using relayB = await RelayProcess.start({ folder: folder.path, name: "b", device: `unix:${folder.join("fb.sock")}` });
    const uri = `unix:${folder.join("migrate")}`;
    const common = { qemu: "10" as const, folder: folder.path, run: "shell" as const, modules: ["fs"] };
    await using source = await startVm({ ...common, name: "source", extraArgs: fsArgs(relayA.front) });
    await using destination = await startVm({ ...common, name: "destination", incoming: uri, extraArgs: fsArgs(relayB.front) });
    await source.shell("mount -t virtiofs share /mnt && exec 5>/mnt/log");
    await source.shell(
      "(i=0; while [ -e /mnt/go ] || [ $i = 0 ]; do i=$((i+1)); echo line $i >&5; usleep 20000; done; echo end $i >&5) & touch /mnt/go; true",
    );
    const figures = await migrate(source, destination, uri);
    const since = destination.serial.lines.length;
    await destination.send("rm /mnt/go; wait; echo STOPPED\n");
    await destination.waitSerial(/^STOPPED$/, { since });
    const lines = (await Deno.readTextFile(`${share}/log`)).trimEnd().split("\n");
    const last = Number(/^end (\d+)$/.exec(lines.at(-1)!)![1]);
    assert.deepEqual(lines.slice(0, -1), Array.from({ length: last }, (_, i) => `line ${i + 1}`), "every line once, in order");
    const state = async (relay: RelayProcess) =>
      (await relay.messages()).filter(({ request, reply }) => request.includes("DEVICE_STATE") && !reply)
        .map(({ from, request, fields }) => `${from} ${request} ${fields.direction ?? ""}`.trim());
    const expected = (direction: string) =>
      ["vmm SET_DEVICE_STATE_FD", "relay SET_DEVICE_STATE_FD", "vmm CHECK_DEVICE_STATE", "relay CHECK_DEVICE_STATE"]
        .map((text) => text.includes("SET_") ? `${text} ${direction}` : text);
    assert.deepEqual(await state(relayA), expected("save"));
    assert.deepEqual(await state(relayB), expected("load"));
    console.log(`  total ${figures.totalMs} ms, downtime ${figures.downtimeMs} ms`);
  },
);

await labTest(
  "a guest talks over vsock through the relay in every mode, on one connection that lives through the switches",
  ["qemu-10", "guest", "vhost-device"],
  async ({ folder }) => {
    const [socket, uds] = [folder.join("vsock.device"), folder.join("vsock")];
    using _echo = echoOn(`${uds}_7777`);
    await using daemon = await startVsock(socket, uds, 7);
    await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
    await using vm = await startVm({
      ...{ qemu: "10", folder: folder.path, run: "shell", modules: ["vsock"] },
      extraArgs: ["-chardev", `socket,id=vsock0,path=${relay.front}`, "-device", "vhost-user-vsock-pci,chardev=vsock0"],
    });
    await vm.shell("mkfifo /tmp/ctl; exec 3<>/tmp/ctl; { vsock_talk 7777 </tmp/ctl & }");
    for (const [i, mode] of (["passthrough", "shadow", "used", "notify", "shadow", "passthrough"] as const).entries()) {
      await relay.setMode(mode);
      // QEMU keeps the event queue to itself.
      assert.deepEqual(modesOf(await relay.status()), [mode, mode]);
      const since = vm.serial.lines.length;
      await vm.send("echo >&3\n");
      const [line] = await vm.waitSerial(/^VSOCK .*$/, { since });
      assert.equal(line, `VSOCK ok bytes=${(i + 1) * 16 * 16384}`, mode);
      await vsockRests(daemon);
    }
    assert.deepEqual((await relay.status()).queues.map((queue) => queue.errors), [0, 0]);
  },
);
