/**
 * `svq migrate vm` between two guests of a {@linkcode MigrationPair}, as an operator runs it.
 *
 * @module
 */
import assert from "node:assert/strict";
import { MAIN } from "./cli.ts";
import { assertMatchesSchema } from "./schema.ts";
import type { MigrationPair, Side } from "./migration_pair.ts";
import { Process } from "./process.ts";
import { verifyImage, type Vm } from "./vm.ts";

/** The keys of `svq.migrate/1` that tests look at. */
export interface MigrateDocument {
  outcome: string;
  phase: string;
  rounds: { dirty_pages: number; bytes: number; ms: number }[];
  bytes: number;
  downtime_us: { total: number } | null;
  total_ms: number | null;
  positions: { index: number; source_base: number | null; destination_base: number | null; agree: boolean | null }[];
  destination_state: string | null;
  error: { code: string; message: string } | null;
}

/** One end of a migration. */
export interface End {
  side: Side;
  vm: Vm;
}

/** Starts `svq migrate vm -j`. */
export function startMigrateVm(pair: MigrationPair, from: End, to: End, args: string[] = []): Process {
  return new Process(Deno.execPath(), {
    name: "svq migrate vm",
    env: { SVQ_RUNTIME_DIR: pair.folder, NO_COLOR: "1" },
    args: [
      ...["run", "-A", "--quiet", MAIN, "migrate", "vm", "-j", "--source", from.vm.qmpSocket, "--destination", to.vm.qmpSocket],
      ...["--source-relay", from.side.relay.name, "--destination-relay", to.side.relay.name, ...args],
    ],
  });
}

/** The document that it printed, checked against its schema. @throws Error unless it ended with `code` */
export async function migrateResult(process: Process, code = 0): Promise<MigrateDocument> {
  await process.expectExit(code, 180_000);
  await process.stdout.done;
  const document = JSON.parse(process.stdout.text);
  assertMatchesSchema("svq.migrate/1", document);
  return document;
}

/** Runs `svq migrate vm` to its end. */
export async function migrateVm(pair: MigrationPair, from: End, to: End, args: string[] = [], code = 0): Promise<MigrateDocument> {
  await using process = startMigrateVm(pair, from, to, args);
  return await migrateResult(process, code);
}

/** Every checksum holds: in the guest, and in the image afterwards. */
export async function assertSound(vm: Vm, image: string): Promise<void> {
  const result = await vm.finishWorkload({ timeoutMs: 120_000 });
  assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
  assert.equal((await verifyImage(image)).digest, result.digest, "the image holds what the guest wrote");
}

/** No queue failed, and the device behind each relay was never told to log. */
export async function assertRelaysSound(...sides: Side[]): Promise<void> {
  for (const side of sides) {
    assert.equal(side.proxy.deviceWasToldToLog, false, "the device was never sent LOG_ALL nor a log");
    assert.equal((await side.relay.status()).queues.reduce((sum, queue) => sum + queue.errors, 0), 0);
  }
}

/** Inside the gap no memory was mapped at the destination: it had all been taken early. Prints what that saved. */
export async function assertTakenEarly(pair: MigrationPair, qemu: string): Promise<void> {
  const [source, { maps }] = [await pair.a.relay.status(), await pair.b.relay.status()];
  assert.ok(maps.guest > 0 && maps.early.regions === maps.guest, JSON.stringify(maps));
  assert.deepEqual([maps.adopted, maps.waiting, maps.at_start.regions], [maps.guest, 0, 0]);
  const messages = await pair.b.relay.messages();
  const memory = messages.filter(({ request, reply }) => !reply && /_MEM_TABLE|_MEM_REG/.test(request));
  const first = memory.find(({ from }) => from === "vmm");
  assert.ok(first !== undefined, "the VMM gave its memory");
  assert.deepEqual(memory.filter(({ side, seq }) => side === "device" && seq > first.seq), [], "then the device had it already");
  const { early, at_start } = maps;
  console.log(
    `  QEMU ${qemu}: ${early.regions} regions taken early in ${early.ms} ms; ${at_start.ms} ms for memory inside the gap, ` +
      `${source.maps.at_start.ms} ms at the source's own start`,
  );
}
