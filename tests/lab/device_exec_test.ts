import assert from "node:assert/strict";
import { passtProgram, qemuProgram } from "../../scripts/lab/host.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { makeImage } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

function words(env: Record<string, string>, ...all: string[]): string {
  const quoted = (word: string) => `'${word.replaceAll("'", `'\\''`)}'`;
  return [...Object.entries(env).map(([name, value]) => `${name}=${quoted(value)}`), ...all.map(quoted)].join(" ");
}

await labTest(
  "a storage daemon that its relay started is killed under checked load, and started again",
  ["qemu-10"],
  async ({ folder }) => {
    const { command, args, env } = await qemuProgram("10", "qemu-storage-daemon");
    const image = await makeImage(folder.join("disk.img"));
    const socket = folder.join("disk.sock");
    const daemon = words(
      env,
      command,
      ...args,
      ...["--blockdev", `driver=file,node-name=file0,filename=${image}`],
      ...["--export", `type=vhost-user-blk,id=export0,node-name=file0,addr.type=unix,addr.path=${socket},writable=on`],
    );
    const options = { folder: folder.path, device: `unix:${socket}`, args: ["--mode", "shadow", "--device-exec", daemon] };
    await using relay = await RelayProcess.start(options);
    await using front = await VhostUserFrontEnd.connect(relay.front);
    await using driver = await EmbeddedDriver.open(front, { depth: 16, num: 64, ramSize: 16 << 20, regionSize: 4 << 20, workload: "blk" });
    const run = driver.run({ durationMs: 3_600_000 });
    for (let kill = 0; kill < 3; kill++) {
      const before = (await driver.report()).completed;
      await waitUntil("requests", async () => (await driver.report()).completed > before + 100);
      const { pid } = (await relay.status()).device_process!;
      Deno.kill(-pid!, "SIGKILL");
    }
    const before = (await driver.report()).completed;
    await waitUntil("requests", async () => (await driver.report()).completed > before + 100);
    assert.equal((await relay.status()).device_process!.starts, 4);
    const report = await driver.stop();
    await run;
    assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
    await driver.close();
    await front.close();
    await relay.stop();
  },
);

await labTest("passt --one-off ends with each front-end, and is there for the next one", ["passt"], async ({ folder }) => {
  const { command, args, env } = await passtProgram();
  const socket = folder.join("net.sock");
  const passt = words(env, command, ...args, "--vhost-user", "-f", "--one-off", "-s", socket, "--runas", "0", "-t", "none", "-u", "none");
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--device-exec", passt] });
  for (let guest = 1; guest <= 3; guest++) {
    await using front = await VhostUserFrontEnd.connect(relay.front);
    assert.notEqual(await front.getFeatures(), 0n);
    await front.close();
    await relay.waitStatus("the next passt", ({ state, device_process }) => state === "waiting" && device_process!.starts === guest + 1);
  }
  assert.equal((await relay.status()).device_process!.last_end, "exit code 0");
  await relay.stop();
});
