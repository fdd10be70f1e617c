import assert from "node:assert/strict";
import { QmpError } from "../../src/migration/qmp.ts";
import { HideLogProxy, REQUEST } from "../support/hide_log_proxy.ts";
import { labTest } from "../support/real_parts.ts";
import { makeImage, migrate, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `a QEMU ${qemu} guest works on a storage daemon and the image holds what it wrote`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const socket = folder.join("blk.sock");
      await using _daemon = await storageDaemon({ version: qemu, image, socket });
      await using vm = await startVm({ qemu, folder: folder.path, disk: { socket }, run: "workload", workload: { ops: 2000 } });
      assert.match(vm.qmp.greeting.version, new RegExp(`^${qemu.replace(".", "\\.")}\\.`));
      const result = await vm.finishWorkload({ ends: true });
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.ok(result.ops >= 2000);
      await vm.process.expectExit(0);
      const onHost = await verifyImage(image);
      assert.equal(onHost.ok, true, onHost.line);
      assert.equal(onHost.digest, result.digest, "the image on the host holds the generations that the guest wrote");
    },
  );

  await labTest(
    `${
      qemu === "7.2" ? "migration of a stopped guest" : "live migration"
    } between two QEMU ${qemu} with a storage daemon each keeps the workload intact`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      const [socketA, socketB] = [folder.join("a.sock"), folder.join("b.sock")];
      await using _a = await storageDaemon({ version: qemu, image, socket: socketA });
      await using _b = await storageDaemon({ version: qemu, image, socket: socketB });
      const uri = `unix:${folder.join("migrate")}`;
      const common = { qemu, folder: folder.path, run: "workload", workload: { report: 200 } } as const;
      await using source = await startVm({ ...common, name: "a", disk: { socket: socketA } });
      await using destination = await startVm({ ...common, name: "b", disk: { socket: socketB }, incoming: uri });
      await source.waitReady();
      const before = await source.nextHeartbeat();
      const figures = await migrate(source, destination, uri, { stopGuest: qemu === "7.2" });
      await destination.progress(before);
      const result = await destination.finishWorkload();
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image)).digest, result.digest);
      console.log(`  QEMU ${qemu}: total ${figures.totalMs} ms, downtime ${figures.downtimeMs} ms, longest request ${result.maxms} ms`);
    },
  );

  await labTest(
    `QEMU ${qemu} alone refuses to migrate a disk whose back-end hides its log`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      const image = await makeImage(folder.join("disk.img"));
      // QEMU's own check of the protocol feature comes first.
      const cases = [
        { options: { hideProtocolFeatures: 0n }, text: "Migration disabled: vhost lacks VHOST_F_LOG_ALL feature." },
        { options: {}, text: "Migration disabled: vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature." },
      ];
      for (const [i, { options, text }] of cases.entries()) {
        const [device, socket] = [folder.join(`device${i}`), folder.join(`proxy${i}`)];
        await using _daemon = await storageDaemon({ version: qemu, image, socket: device });
        await using proxy = new HideLogProxy(socket, device, options);
        await using vm = await startVm({
          qemu,
          folder: folder.path,
          name: `vm${i}`,
          disk: { socket },
          run: "workload",
          workload: { ops: 500 },
        });
        await assert.rejects(
          vm.qmp.execute("migrate", { uri: `unix:${folder.join("nowhere")}` }),
          (error) => error instanceof QmpError && error.message.includes(text),
        );
        if (i > 0) assert.equal((await vm.finishWorkload({ ends: true })).ok, true, "the guest works through the proxy");
        assert.ok(proxy.sent(REQUEST.GET_FEATURES).length > 0);
        assert.equal(proxy.deviceWasToldToLog, false);
      }
    },
  );
}

/** After so many migrations none of which lost anything, the device logs after all. */
const MOST_MOVES = 5;

await labTest(
  "a device that does not log what it writes is found out by the workload after a migration",
  ["qemu-10", "guest"],
  async ({ folder }) => {
    const image = await makeImage(folder.join("disk.img"));
    // What is forgotten shows only where the device wrote to a page between its last journey and the guest's stop. On a busy machine
    // the guest may get no turn in that time: then there was nothing to find, and it moves once more.
    for (let attempt = 1;; attempt++) {
      const [device, socketA, socketB] = ["device", "a.sock", "b.sock"].map((name) => folder.join(`${attempt}-${name}`)) as [
        string,
        string,
        string,
      ];
      await using _a = await storageDaemon({ version: "10", image, socket: device });
      await using _proxy = new HideLogProxy(socketA, device, { forgetLog: true });
      await using _b = await storageDaemon({ version: "10", image, socket: socketB });
      const uri = `unix:${folder.join(`${attempt}-migrate`)}`;
      const common = { qemu: "10", folder: folder.path, run: "workload", workload: { report: 200, mode: "readonly" } } as const;
      await using source = await startVm({ ...common, name: `a${attempt}`, disk: { socket: socketA } });
      await using destination = await startVm({ ...common, name: `b${attempt}`, disk: { socket: socketB }, incoming: uri });
      await source.waitReady();
      await source.nextHeartbeat();
      await migrate(source, destination, uri, { slowFirstPass: true });
      const result = await destination.finishWorkload();
      if (result.ok && attempt < MOST_MOVES) continue;
      assert.equal(result.ok, false, result.line);
      assert.match(result.errorLines.join("\n"), /kind=(?:late-)?(?:not-read|partly-read)/);
      return;
    }
  },
);
