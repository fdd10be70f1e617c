import assert from "node:assert/strict";
import type { QemuFacts } from "../../src/migration/qemu.ts";
import { checkError, checkMigration, type MigrationFacts } from "../../src/migration/vm_checks.ts";
import { isBack, ringPositions } from "../../src/migration/vm_relays.ts";
import type { QueueStatus, RelayStatus } from "../../src/relay/status.ts";
import { EXIT, SvqError } from "../../src/errors.ts";

function qemu(path: string, runState: string, more: Partial<QemuFacts> = {}): QemuFacts {
  const migration = {
    ...{ status: "none", totalMs: undefined, downtimeMs: undefined, expectedDowntimeMs: undefined, setupMs: undefined },
    ...{ error: undefined, blockedReasons: [], ram: undefined, listening: [] },
  };
  const machine = "pc-q35-10.0-machine";
  return { path, version: "10.0.2", runState, migration, machine, memoryBytes: 2 ** 28, capabilities: ["multifd"], ...more };
}

function queue(more: Partial<QueueStatus> = {}): QueueStatus {
  return { index: 0, mode: "passthrough", start_base: 5, last_base: null, error: null, ...more } as QueueStatus;
}

function relay(name: string, more: Partial<RelayStatus> = {}): RelayStatus {
  return {
    ...{ name, pid: name.charCodeAt(0), state: "connected", mode: "auto", force_shadow: false, front: `unix:/${name}`, device: "unix:/d" },
    ...{ logging: false, marking_all: false, features: "0x0", offered_features: "0x130000000", queue_num: 1, config: "00c0", error: null },
    queues: [],
    ...more,
  } as unknown as RelayStatus;
}

function facts(): MigrationFacts {
  return {
    source: qemu("/a", "running"),
    destination: qemu("/b", "inmigrate"),
    sourceRelays: [{ name: "a", status: relay("a", { state: "running", features: "0x100000000", queues: [queue()] }) }],
    destinationRelays: [{ name: "b", status: relay("b") }],
    capabilities: ["multifd"],
  };
}

function failures(change: (facts: MigrationFacts) => void): string[] {
  const changed = facts();
  change(changed);
  const failed = checkMigration(changed).filter((check) => !check.ok);
  for (const check of failed) {
    assert.ok(check.message.length > 10 && (check.hint ?? "").length > 10, `${check.code} has a message and a hint`);
    assert.ok(checkError(check).exitCode > 0);
  }
  return failed.map(({ code }) => code);
}

Deno.test("two QEMUs and two relays that fit pass every check", () => {
  assert.deepEqual(failures(() => {}), []);
});

Deno.test("each reason against a migration is found, with a code, a message and a hint", () => {
  const source = (more: Partial<RelayStatus>) => (all: MigrationFacts) => void Object.assign(all.sourceRelays[0]!.status!, more);
  const destination = (more: Partial<RelayStatus>) => (all: MigrationFacts) => void Object.assign(all.destinationRelays[0]!.status!, more);
  const cases: [string, (facts: MigrationFacts) => void][] = [
    ["SOURCE_STATE", (all) => all.source.runState = "postmigrate"],
    ["SOURCE_STATE", (all) => all.source.runState = "something-new"],
    ["MIGRATION_RUNS", (all) => all.source.migration.status = "active"],
    ["MIGRATION_BLOCKED", (all) => all.source.migration.blockedReasons = ["Migration disabled: vhost lacks VHOST_F_LOG_ALL feature."]],
    ["DESTINATION_STATE", (all) => all.destination.runState = "running"],
    ["SAME_QEMU", (all) => all.destination.path = "/a"],
    ["OLDER_DESTINATION", (all) => all.destination.version = "7.2.22"],
    ["MACHINE_DIFFERS", (all) => all.destination.machine = "pc-i440fx-10.0-machine"],
    ["MEMORY_DIFFERS", (all) => all.destination.memoryBytes = 2 ** 29],
    ["POSTCOPY", (all) => all.capabilities = ["postcopy-ram"]],
    ["NO_SUCH_CAPABILITY", (all) => all.source.capabilities = ["xbzrle"]],
    ["NO_SUCH_RELAY", (all) => {
      all.sourceRelays = [{ name: "a", error: new SvqError("NO_SUCH_RELAY", 'No relay "a" runs', { exitCode: EXIT.noDevice }) }];
    }],
    ["DEVICE_LOST", source({ state: "device-lost" })],
    ["RELAY_STOPS", source({ state: "stopping" })],
    ["RELAY_WITHOUT_VMM", destination({ state: "waiting" })],
    ["QUEUE_FAILED", source({ queues: [queue({ mode: "failed", error: { code: "RING_LOOP", message: "a chain loops" } })] })],
    ["RELAY_IN_USE", destination({ queues: [queue()] })],
    ["MIGRATION_RUNS", source({ logging: true })],
    ["RELAYS_UNPAIRED", (all) => all.destinationRelays = [...all.destinationRelays, ...all.destinationRelays]],
    ["FEATURES_DIFFER", source({ features: "0x100000002" })],
    ["QUEUES_DIFFER", source({ queue_num: 4, queues: [queue({ index: 3 })] })],
    ["CONFIG_DIFFERS", destination({ config: "00d0" })],
    ["SAME_RELAY", (all) => all.destinationRelays[0]!.status = { ...all.sourceRelays[0]!.status!, queues: [] }],
  ];
  for (const [code, change] of cases) assert.deepEqual(failures(change), [code], code);
});

Deno.test("ring positions agree only where the destination went on at the source's last base", () => {
  const before = relay("a", { queues: [queue(), queue({ index: 1, mode: "stopped" })] });
  const source = relay("a", { queues: [queue({ mode: "stopped", last_base: 70 })] });
  const at = (start_base: number | null, paused = false) =>
    ringPositions(before, source, relay("b", { queues: start_base === null ? [] : [queue({ start_base })] }), paused).map(({ agree }) =>
      agree
    );
  assert.deepEqual(at(70), [true], "queue 1 did not run");
  assert.deepEqual(at(69), [false]);
  assert.deepEqual(at(null), [false]);
  assert.deepEqual(at(null, true), [undefined], "a paused destination has not started its queues");
  const still = relay("a", { queues: [queue()] });
  assert.deepEqual(
    ringPositions(before, still, relay("b", { queues: [queue()] }), false).map(({ agree }) => agree),
    [false],
    "it still runs",
  );
});

Deno.test("a relay is back when it logs no more and its queues are in the modes of before", () => {
  const before = relay("a", { queues: [queue()] });
  assert.equal(isBack(relay("a", { queues: [queue()] }), before), true);
  assert.equal(isBack(relay("a", { queues: [queue({ mode: "shadow" })] }), before), false);
  assert.equal(isBack(relay("a", { queues: [queue({ mode: "switching" })] }), before), false, "on its way is not back");
  assert.equal(isBack(relay("a", { queues: [queue()], logging: true }), before), false);
  assert.equal(isBack(relay("a", { queues: [queue()], marking_all: true }), before), false);
});
