import assert from "node:assert/strict";
import { QmpClient } from "../../src/migration/qmp.ts";
import type { TracedMessage } from "../../src/relay/message_log.ts";
import type { RelayMode } from "../../src/relay/relay.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage, startVm, storageDaemon, verifyImage, type Vm } from "../support/vm.ts";

/** Set before each life, so that a device's start and end are seen in each. */
const MODES = ["passthrough", "notify", "used", "shadow"] as const;

const WORKLOAD = { report: 100, blocks: 1024, hold: 64 } as const;

async function assertSound(vm: Vm, image: string, since = 0): Promise<void> {
  const result = await vm.finishWorkload({ since });
  assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
  assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, result.digest, "the image holds what the guest wrote");
}

async function assertNoErrors(relay: RelayProcess, mode: string): Promise<void> {
  const status = await relay.status();
  assert.deepEqual(status.queues.map((queue) => [queue.mode, queue.errors]), [[mode, 0]]);
  assert.equal(status.needs_reset, false);
}

function sentBy(messages: readonly TracedMessage[], from: TracedMessage["from"], request: string): TracedMessage[] {
  return messages.filter((message) => message.from === from && message.request === request && !message.reply);
}

/** Starts a checked workload beside the shell; `stopWorkload` ends it. */
async function startWorkload(vm: Vm, device = "/dev/vda"): Promise<void> {
  await vm.shell("rm -f /tmp/ctl; mkfifo /tmp/ctl; exec 3<>/tmp/ctl");
  const since = vm.serial.lines.length;
  await vm.shell(
    `{ svq_guest dev=${device} ${Object.entries(WORKLOAD).map(([name, value]) => `${name}=${value}`).join(" ")} </tmp/ctl & }`,
  );
  await vm.waitReady(undefined, since);
}

async function stopWorkload(vm: Vm, image: string): Promise<void> {
  const since = vm.serial.lines.length;
  // A job that ends while this shell reads from its terminal ends the shell, too.
  await vm.send("echo stop >&3; wait\n");
  const [line] = await vm.waitSerial(/^SVQ DONE .*$/, { since });
  assert.match(line, /^SVQ DONE ok /, line);
  const digest = /digest=(\w+)/.exec(line)![1];
  assert.equal((await verifyImage(image, { blocks: WORKLOAD.blocks })).digest, digest);
}

await labTest("a guest's whole life goes through the relay in every mode", ["qemu-10", "guest"], async ({ folder, step }) => {
  const image = await makeImage(folder.join("disk.img"));
  const [socket, monitor] = [folder.join("blk.sock"), folder.join("qsd.qmp")];
  await using _daemon = await storageDaemon({ version: "10", image, socket, qmpSocket: monitor });
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
  await using vm = await startVm({
    ...{ qemu: "10", folder: folder.path, reboot: true, stay: true, run: "workload", workload: WORKLOAD },
    disk: { socket: relay.front },
  });
  await vm.waitReady();
  const last = async () => (await relay.messages()).at(-1)!.seq;
  let mib = 64;

  for (const mode of MODES) {
    await relay.setMode(mode);
    await vm.nextHeartbeat();
    await assertNoErrors(relay, mode);

    await step(`${mode}: system_reset under load: firmware first, then the kernel, with features of its own`, async () => {
      const [after, since] = [await last(), vm.serial.lines.length];
      await vm.qmp.execute("system_reset");
      await vm.waitReady(undefined, since);
      const messages = await relay.messages(after);
      const words = sentBy(messages, "vmm", "SET_FEATURES").map((message) => message.fields.value);
      assert.ok(new Set(words).size >= 2, `feature words: ${words.join(" ")}`);
      assert.ok(sentBy(messages, "vmm", "GET_VRING_BASE").length >= 2, "the old kernel's ring and the firmware's were stopped");
      await vm.nextHeartbeat();
      await assertNoErrors(relay, mode);
    });

    await step(`${mode}: the workload of the new life is sound`, async () => {
      const since = vm.serial.lines.length;
      await assertSound(vm, image, since);
      await vm.waitSerial(/GUEST workload ended/, { since });
    });

    await step(`${mode}: block_resize under load reaches the guest`, async () => {
      await startWorkload(vm);
      const after = await last();
      mib += 32;
      const qsd = await QmpClient.connect(monitor);
      try {
        await qsd.execute("block_resize", { "node-name": "file0", size: mib << 20 });
      } finally {
        await qsd.close();
      }
      await vm.shell(`while [ "$(cat /sys/block/vda/size)" != ${mib << 11} ]; do sleep 0.1; done`);
      const changes = (await relay.messages(after)).filter((message) => message.request === "CONFIG_CHANGE_MSG" && !message.reply);
      assert.deepEqual(changes.map((message) => message.from), ["device", "relay"]);
    });

    await step(`${mode}: the guest writes into the configuration space, and the workload is sound`, async () => {
      const after = await last();
      // The workload reports on the same line.
      const cacheType = async () => /^write \w+$/m.exec(await vm.shell("cat /sys/block/vda/cache_type"))?.[0];
      const before = await cacheType();
      const [wanted, byte] = before === "write back" ? ["write through", "00"] : ["write back", "01"];
      await vm.shell(`echo "${wanted}" >/sys/block/vda/cache_type`);
      assert.equal(await cacheType(), wanted);
      const written = sentBy(await relay.messages(after), "relay", "SET_CONFIG");
      assert.deepEqual(written.map((message) => [message.fields.offset, message.fields.bytes]), [[32, byte]]);
      await assertNoErrors(relay, mode);
      await stopWorkload(vm, image);
    });

    await step(`${mode}: a guest that reboots under load`, async () => {
      await startWorkload(vm);
      const since = vm.serial.lines.length;
      await vm.send("reboot -f\n");
      await vm.waitReady(undefined, since);
      await vm.nextHeartbeat();
      await assertNoErrors(relay, mode);
    });
  }
  await assertSound(vm, image, vm.serial.lines.length);
});

await labTest(
  "disks are pulled out under load and plugged in again through the relay in every mode",
  ["qemu-10", "guest"],
  async ({ folder, step }) => {
    const image = await makeImage(folder.join("disk.img"));
    const socket = folder.join("blk.sock");
    await using _daemon = await storageDaemon({ version: "10", image, socket });
    await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
    await using vm = await startVm({
      ...{ qemu: "10", folder: folder.path, run: "shell", modules: ["disk"] },
      extraArgs: ["-device", "pcie-root-port,id=port0,chassis=1,slot=1"],
    });
    await vm.shell("true");
    const plug = async (mode: RelayMode) => {
      await vm.qmp.execute("chardev-add", {
        id: "late",
        backend: { type: "socket", data: { addr: { type: "unix", data: { path: relay.front } }, server: false } },
      });
      await vm.qmp.execute("device_add", { driver: "vhost-user-blk-pci", id: "disk", chardev: "late", bus: "port0" });
      await vm.shell("while ! [ -b /dev/vda ]; do sleep 0.1; done", 60_000);
      await startWorkload(vm);
      await relay.waitStatus("runs", (status) => status.state === "running");
      await assertNoErrors(relay, mode);
    };
    for (const mode of MODES) {
      await step(mode, async () => {
        await relay.setMode(mode);
        await plug(mode);
        const events = vm.qmp.eventCount;
        const since = vm.serial.lines.length;
        await vm.qmp.execute("device_del", { id: "disk" });
        await vm.qmp.waitEvent("DEVICE_DELETED", { since: events, predicate: ({ data }) => data.device === "disk" });
        await vm.waitSerial(/SVQ ERROR/, { since });
        await vm.qmp.execute("chardev-remove", { id: "late" });
        await relay.waitStatus("waits", (status) => status.state === "waiting");
        // The workload lost its disk, which it must not survive with a good result.
        await vm.shell("kill -9 %1; wait; exec 3>&-; true");
        await vm.shell("while [ -b /dev/vda ]; do sleep 0.1; done");
      });
    }
    await relay.setMode("shadow");
    await plug("shadow");
    await stopWorkload(vm, image);
  },
);

for (const [mode, args] of Object.entries({ shadow: ["--force-shadow"], used: ["--mode", "used"] })) {
  await labTest(
    `the storage daemon is killed under load and comes back later; the guest waits and loses nothing: ${mode}`,
    ["qemu-10", "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const socket = folder.join("blk.sock");
      let daemon = await storageDaemon({ version: "10", image, socket });
      await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args });
      try {
        await using vm = await startVm({
          ...{ qemu: "10", folder: folder.path, run: "workload", workload: WORKLOAD },
          disk: { socket: relay.front },
        });
        await vm.waitReady();
        for (let round = 1; round <= 3; round++) {
          await vm.nextHeartbeat();
          await daemon[Symbol.asyncDispose]();
          const lost = await relay.waitStatus("lost", (status) => status.state === "device-lost");
          assert.equal(lost.device_connected, false);
          await relay.waitStatus("holds", (status) => status.queues[0]!.mode === "waiting");
          daemon = await storageDaemon({ version: "10", image, socket });
          const back = await relay.waitStatus("is back", (status) => status.state === "running");
          assert.equal(back.device_connections, round + 1);
          const before = await vm.nextHeartbeat();
          await vm.progress(before);
        }
        // Before the end: the guest powers off behind its workload.
        await assertNoErrors(relay, mode);
        await assertSound(vm, image);
      } finally {
        await daemon[Symbol.asyncDispose]();
      }
    },
  );
}
