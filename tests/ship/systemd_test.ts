import assert from "node:assert/strict";
import { compile } from "../support/executable_suite.ts";
import { systemdMissing, TestSystemd } from "../support/systemd.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const UNITS = new URL("../../units/", import.meta.url).pathname;
const FRONT = "unix:/run/vhost-user/t.sock";
const SERVICE = "svq-relay@t.service";

const NAME = "the systemd units start a relay in their sandbox, watch it, restart it, and start it again by its socket";
const reason = systemdMissing();

Deno.test({ name: reason === undefined ? NAME : `${NAME} (left out, needs ${reason})`, ignore: reason !== undefined }, async (t) => {
  using place = new TempDir();
  await compile(["--kind=packed", `--output=${place.join("svq")}`]);
  const unit = (name: string) => Deno.readTextFileSync(UNITS + name);
  await using systemd = await TestSystemd.start(place.join("svq"), {
    "svq-relay@.service": unit("svq-relay@.service"),
    "svq-relay@.socket": unit("svq-relay@.socket"),
    // What the test needs on top: no journal here, and a watchdog that does not take half a minute.
    "svq-relay@.service.d/test.conf": "[Service]\nStandardOutput=file:/run/t.log\nStandardError=inherit\nWatchdogSec=3s\n",
  }, { "t.env": "SVQ_DEVICE=sim:blk\nSVQ_FORCE_SHADOW=1\n" });
  const status = () => systemd.property(SERVICE, "StatusText");
  const drive = async () => {
    const report = JSON.parse(await systemd.good("svq", "drive", FRONT, "-j", "--requests", "200"));
    assert.deepEqual([report.requests.completed, report.requests.lost, report.requests.corrupted], [200, 0, 0]);
  };

  await t.step("it is active when it can be used, and says what it does", async () => {
    await systemd.good("systemctl", "start", SERVICE);
    assert.equal(await systemd.property(SERVICE, "ActiveState"), "active");
    assert.equal(await status(), "waiting for a front-end");
    await drive();
    await waitUntil("the status of the front-end's end", async () => /left/.test(await status()));
  });

  await t.step("the sandbox is in force", async () => {
    const pid = await systemd.property(SERVICE, "MainPID");
    const facts = await systemd.good("cat", `/proc/${pid}/status`);
    assert.match(facts, /^NoNewPrivs:\s*1$/m);
    assert.match(facts, /^Seccomp:\s*2$/m);
    // DAC_OVERRIDE (1), NET_ADMIN (12), IPC_LOCK (14)
    assert.match(facts, /^CapBnd:\s*0000000000005002$/m);
    // A container may not lift its own limit, so the process's is not looked at.
    assert.equal(await systemd.property(SERVICE, "LimitMEMLOCK"), "infinity");
  });

  await t.step("a relay that hangs is killed by the watchdog and started again", async () => {
    const pid = await systemd.property(SERVICE, "MainPID");
    await waitUntil("a sign of life", async () => {
      const [first, last] = [
        await systemd.property(SERVICE, "ActiveEnterTimestampMonotonic"),
        await systemd.property(SERVICE, "WatchdogTimestampMonotonic"),
      ];
      return Number(last) > Number(first);
    });
    await systemd.good("kill", "-STOP", pid);
    await waitUntil("another process", async () => {
      const [now, state] = [await systemd.property(SERVICE, "MainPID"), await systemd.property(SERVICE, "ActiveState")];
      return state === "active" && now !== pid && now !== "0";
    });
    await drive();
  });

  await t.step("it stops cleanly, and the next connection to its socket starts it again", async () => {
    await systemd.good("systemctl", "stop", SERVICE);
    assert.equal(await systemd.property(SERVICE, "Result"), "success");
    assert.equal(await systemd.property(SERVICE, "ExecMainStatus"), "0");
    await systemd.good("systemctl", "start", "svq-relay@t.socket");
    assert.equal(await systemd.property(SERVICE, "ActiveState"), "inactive");
    await drive();
    assert.equal(await systemd.property(SERVICE, "ActiveState"), "active");
  });

  await t.step("wrong settings are not tried again and again", async () => {
    await systemd.good("systemctl", "stop", SERVICE, "svq-relay@t.socket");
    await systemd.good("sh", "-c", "echo SVQ_MODE=nonsense >>/etc/svq/relay/t.env");
    assert.notEqual((await systemd.run("systemctl", "start", SERVICE)).code, 0);
    await waitUntil("the failed state", async () => await systemd.property(SERVICE, "ActiveState") === "failed");
    assert.equal(await systemd.property(SERVICE, "ExecMainStatus"), "2");
    const log = await systemd.good("cat", "/run/t.log");
    assert.match(log, /nonsense/);
  });
});

Deno.test("systemd finds nothing wrong with the units", async (t) => {
  using place = new TempDir();
  Deno.writeTextFileSync(place.join("svq"), "#!/bin/sh\n", { mode: 0o755 });
  for (const name of ["svq-relay@.service", "svq-relay@.socket"]) {
    const text = Deno.readTextFileSync(UNITS + name).replace("/usr/local/bin/svq", place.join("svq"));
    Deno.writeTextFileSync(place.join(name.replace("@", "@t")), text);
  }
  let output: Deno.CommandOutput;
  try {
    output = await new Deno.Command("systemd-analyze", { args: ["verify", place.join(SERVICE)], stdin: "null" }).output();
  } catch {
    await t.step({ name: "left out, needs systemd-analyze", ignore: true, fn: () => {} });
    return;
  }
  assert.deepEqual([output.code, new TextDecoder().decode(output.stderr)], [0, ""]);
});
