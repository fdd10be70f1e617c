import assert from "node:assert/strict";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const DISK = new URL("../support/one_shot_disk.ts", import.meta.url).pathname;
const SHAPE = { depth: 32, num: 64, queues: 2, ramSize: 16 << 20, regionSize: 8 << 20, workload: "blk" } as const;

function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(Deno.readTextFileSync(`/proc/${pid}/status`));
  } catch {
    return false;
  }
}

Deno.test("a back-end that ends when its front-end leaves, or is killed, is started again by its relay, and ends with it", async () => {
  using folder = new TempDir();
  const socket = folder.join("disk.sock");
  const command = `${Deno.execPath()} run -A --quiet --no-check ${DISK} ${socket} ${folder.join("disk.img")}`;
  const args = ["--mode", "shadow", "--device-exec", command];
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args });
  for (let guest = 0; guest < 2; guest++) {
    await using front = await VhostUserFrontEnd.connect(relay.front);
    await using driver = await EmbeddedDriver.open(front, SHAPE);
    const run = driver.run({ durationMs: 3_600_000 });
    const progress = async () => {
      const before = (await driver.report()).completed;
      await waitUntil("requests", async () => (await driver.report()).completed > before + 100);
    };
    await progress();
    const before = (await relay.status()).device_process!;
    assert.equal(before.command, command);
    // The shell leads the group; the daemon in it is killed under its load.
    Deno.kill(-before.pid!, "SIGKILL");
    await progress();
    const after = (await relay.status()).device_process!;
    assert.deepEqual([after.starts, after.last_end], [before.starts + 1, "SIGKILL"]);
    assert.notEqual(after.pid, before.pid);
    const report = await driver.stop();
    await run;
    assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
    await driver.close();
    await front.close();
    // The relay leaves the device with its front-end, and that ends the daemon.
    const fresh = await relay.waitStatus(
      "the next daemon",
      ({ state, device_process }) => state === "waiting" && device_process!.starts > after.starts,
    );
    assert.equal(fresh.device_process!.last_end, "exit code 7");
  }
  const { pid } = (await relay.status()).device_process!;
  assert.ok(isRunning(pid!));
  // It goes along with an upgrade, and ends with the new version.
  const { pid: relayPid } = await relay.upgrade();
  assert.equal((await relay.status()).device_process!.pid, pid);
  assert.ok(isRunning(pid!));
  Deno.kill(relayPid, "SIGTERM");
  await waitUntil("both to end", () => !isRunning(relayPid) && !isRunning(pid!));
});

Deno.test("a back-end that does not start keeps its relay from starting, and the reason is said", async () => {
  using folder = new TempDir();
  const args = ["--device-exec", "exit 9"];
  const started = RelayProcess.start({ folder: folder.path, device: `unix:${folder.join("none.sock")}`, args });
  await assert.rejects(started, /ended with exit code 9/);
});
