import assert from "node:assert/strict";
import { VmMigration } from "../../src/migration/vm.ts";
import type { VmMigrationOptions } from "../../src/migration/vm_report.ts";
import { type Answer, FakeMonitor } from "../support/fake_monitor.ts";
import { TempDir } from "../support/temp.ts";

/** What a test says of one QEMU: by command, a value or what makes one. */
type Script = Record<string, unknown | (() => unknown)>;

const COMMON: Script = {
  "qom-get": "pc-q35-10.0-machine",
  "qom-list": [],
  "query-memory-size-summary": { "base-memory": 268435456 },
  "query-migrate-capabilities": [],
  "query-migrate-parameters": { "downtime-limit": 300 },
  "migrate-set-parameters": {},
  "query-migrate": {},
};

function answers(script: Script, commands: string[]): Answer {
  const all: Script = { ...COMMON, ...script };
  return (command) => {
    commands.push(command);
    const value = all[command];
    if (value === undefined) return Promise.resolve({ error: { class: "CommandNotFound", desc: `no ${command}` } });
    return Promise.resolve(typeof value === "function" ? value() : { return: value });
  };
}

const value = (result: unknown) => ({ return: result });

/** Migrates between two monitors that follow scripts. */
async function migrate(source: Script, destination: Script, options: Partial<VmMigrationOptions> = {}) {
  using dir = new TempDir();
  const [a, b] = [dir.join("a"), dir.join("b")];
  const commands: string[] = [];
  await using _a = new FakeMonitor(a, answers({ "query-status": { status: "running" }, "migrate": {}, ...source }, commands));
  await using _b = new FakeMonitor(b, answers({ "query-status": { status: "inmigrate" }, "migrate-incoming": {}, ...destination }, []));
  await using migration = await VmMigration.open({ source: a, destination: b, sourceRelays: [], destinationRelays: [], ...options });
  const report = await migration.run();
  return { report, commands };
}

Deno.test("A destination that is gone after the switchover is exit 8, and the hint says that the source still holds the guest", async () => {
  let asked = 0;
  const source = { "query-migrate": () => value(asked++ < 2 ? {} : { status: "completed", "total-time": 5, downtime: 1 }) };
  let status = 0;
  // QEMU ends when it cannot load the state: its monitor answers no more.
  const destination = {
    "query-status": () => status++ === 0 ? value({ status: "inmigrate" }) : { error: { class: "GenericError", desc: "gone" } },
  };
  const { report } = await migrate(source, destination);
  assert.deepEqual([report.outcome, report.error?.code, report.error?.exitCode], ["failed", "DESTINATION_LOST", 8]);
  assert.match(report.error!.hint!, /QMP cont/);
});

Deno.test("A migration that takes too long is cancelled: exit 124, and the guest runs at the source", async () => {
  let cancelled = false;
  const source = {
    "query-migrate": () => value({ status: cancelled ? "cancelled" : "active" }),
    "migrate_cancel": () => {
      cancelled = true;
      return value({});
    },
  };
  let checked = false;
  const whole = {
    ...source,
    "query-migrate": () => {
      // Nothing goes on while it is looked at before the start.
      if (!checked) {
        checked = true;
        return value({});
      }
      return source["query-migrate"]();
    },
  };
  const { report, commands } = await migrate(whole, {}, { timeoutMs: 200 });
  assert.deepEqual([report.outcome, report.error?.code, report.error?.exitCode], ["cancelled", "MIGRATION_TIMEOUT", 124]);
  assert.equal(commands.filter((command) => command === "migrate_cancel").length, 1, "asked once");
});

Deno.test("QEMU's reasons against a migration are shown word for word, with what to do, and nothing is started", async () => {
  const reason = "Migration disabled: vhost lacks VHOST_F_LOG_ALL feature.";
  await assert.rejects(migrate({ "query-migrate": { "blocked-reasons": [reason] } }, {}), {
    code: "MIGRATION_BLOCKED",
    exitCode: 6,
    message: `QEMU refuses: ${reason}`,
    hint: /svq relay run/,
  });
});
