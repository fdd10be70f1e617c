import assert from "node:assert/strict";
import { listenUnix } from "../../src/ffi/mod.ts";
import { bitNames } from "../../src/uapi/bits.ts";
import { PROTOCOL_FEATURE, REQUEST } from "../../src/uapi/vhost_user.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { serve } from "../../src/vhost_user/serve.ts";
import { labTest } from "../support/real_parts.ts";
import { makeImage, migrate, startVm, storageDaemon, verifyImage } from "../support/vm.ts";

/** A VMM's socket in front of a device's: server and front-end with nothing between them. */
class Bridge implements AsyncDisposable {
  readonly errors: unknown[] = [];
  readonly requests: number[] = [];
  readonly #listener;
  readonly #serving: Promise<void>;

  constructor(socket: string, device: string) {
    const note = (error: unknown) => void this.errors.push(error);
    this.#listener = listenUnix(socket);
    this.#serving = serve(this.#listener, async () => {
      const backend = await VhostUserFrontEnd.connect(device, {
        onMessage: (direction, request) => {
          if (direction === "out") this.requests.push(request);
        },
      });
      const onDisconnect = async (error: Error | undefined) => {
        if (error !== undefined) note(error);
        await backend.close();
      };
      return { backend, options: { offerLog: true, onError: note, onDisconnect } };
    }, note);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    await this.#serving;
  }
}

await labTest(
  "a QEMU 7.2 guest works through server and front-end onto a real storage daemon",
  ["qemu-7.2", "guest"],
  async ({ folder }) => {
    const image = await makeImage(folder.join("disk.img"));
    await using _daemon = await storageDaemon({ version: "7.2", image, socket: folder.join("device") });
    await using bridge = new Bridge(folder.join("vmm"), folder.join("device"));
    {
      const disk = { socket: folder.join("vmm") };
      await using vm = await startVm({ qemu: "7.2", folder: folder.path, disk, run: "workload", workload: { ops: 1000 } });
      const result = await vm.finishWorkload({ ends: true });
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image)).digest, result.digest);
      await vm.process.expectExit(0);
    }
    assert.deepEqual(bridge.errors, []);
  },
);

// Only QEMU 10 migrates here. With VMM and daemon both 7.2 the guest came out corrupted in 5 of 7 such runs, and in 5 of 6
// without svq in between in the same hour on a loaded machine; later 4 of 4 without svq passed. The cause is not known.
await labTest(
  "a QEMU 10 guest works and migrates through server and front-end onto real storage daemons",
  ["qemu-10", "guest"],
  async ({ folder }) => {
    const image = await makeImage(folder.join("disk.img"));
    const path = (name: string) => folder.join(name);
    await using _a = await storageDaemon({ version: "10", image, socket: path("da") });
    await using _b = await storageDaemon({ version: "10", image, socket: path("db") });

    const probe = await VhostUserFrontEnd.probe(path("da"), 5000);
    assert.deepEqual(probe.notes, []);
    assert.equal(probe.queueNum, 1);
    assert.equal(probe.config?.length, 60);
    assert.ok(bitNames(probe.protocolFeatures, PROTOCOL_FEATURE).includes("LOG_SHMFD"));

    await using source = new Bridge(path("a"), path("da"));
    await using destination = new Bridge(path("b"), path("db"));
    {
      const uri = `unix:${path("migrate")}`;
      const common = { qemu: "10", folder: folder.path, run: "workload", workload: { report: 200 } } as const;
      await using vmA = await startVm({ ...common, name: "va", disk: { socket: path("a") } });
      await using vmB = await startVm({ ...common, name: "vb", disk: { socket: path("b") }, incoming: uri });
      await vmA.waitReady();
      await migrate(vmA, vmB, uri);
      await vmB.nextHeartbeat();
      const result = await vmB.finishWorkload();
      assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
      assert.equal((await verifyImage(image)).digest, result.digest);
    }
    assert.deepEqual([...source.errors, ...destination.errors], []);
    assert.ok(source.requests.includes(REQUEST.SET_LOG_BASE), "the device logged");
  },
);
