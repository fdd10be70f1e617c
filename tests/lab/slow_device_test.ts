import assert from "node:assert/strict";
import { differingPages } from "../support/compare_memory.ts";
import { migrateResult, startMigrateVm } from "../support/migrate_cli.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startVm, type Vm } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

const LATENCY_MS = 5000;
const SWITCH_TIMEOUT_MS = 500;
// What a loaded machine adds to an answer that is ready.
const SLACK_MS = 1500;
const READERS = 8;

/** Asks QEMU's main loop all the time how it is. */
class Pulse {
  longestMs = 0;
  #stopped = false;
  readonly #done: Promise<void>;

  constructor(vm: Vm) {
    this.#done = (async () => {
      while (!this.#stopped) {
        const begun = performance.now();
        await vm.qmp.execute("query-status", undefined, { timeoutMs: 60_000 });
        this.longestMs = Math.max(this.longestMs, performance.now() - begun);
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    })();
    // Awaited in stop; a test that fails before is told of its own failure.
    this.#done.catch(() => {});
  }

  async stop(): Promise<number> {
    this.#stopped = true;
    await this.#done;
    return this.longestMs;
  }
}

/** The longest time between two beats on the serial line, from `since` (performance.now()) until now. */
function longestGapMs(vm: Vm, since: number): number {
  const beats = vm.serial.lines.filter((line) => line.text === "BEAT" && line.atMs >= since).map((line) => line.atMs);
  return [...beats, performance.now()].reduce((gap, at, i, all) => Math.max(gap, at - (all[i - 1] ?? since)), 0);
}

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `with a device whose requests take 5 s, turning the log on kills no QEMU ${qemu} and freezes the guest no longer than the time-out`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      const image = folder.join("disk.img");
      const content = crypto.getRandomValues(new Uint8Array(65536));
      // The kernel looks for partitions, one slow read after the other: it finds at once that there are none.
      content.fill(0, 0, 8192);
      await Deno.writeFile(image, content);
      const device = `sim:blk,file=${image},latency=${LATENCY_MS}ms`;
      const relay = (name: string) =>
        RelayProcess.start({ folder: folder.path, name, device, args: [`--switch-timeout=${SWITCH_TIMEOUT_MS}ms`] });
      await using a = await relay("a");
      await using b = await relay("b");
      const guest = { qemu, folder: folder.path };
      await using source = await startVm({ ...guest, name: "source", disk: { socket: a.front } });
      await using destination = await startVm({
        ...guest,
        name: "destination",
        disk: { socket: b.front },
        incoming: "defer",
        paused: true,
      });
      await source.waitSerial(/^GUEST up /, { timeoutMs: 180_000 });
      // Readers keep requests in flight all the time; the beats say that the guest's processor runs.
      const reader = (i: number) =>
        `(while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct count=1 skip=${2 + i} 2>/dev/null || echo IOERROR; done) &`;
      await source.send(`(while :; do echo BEAT; sleep 0.1; done) & ${Array.from({ length: READERS }, (_, i) => reader(i)).join(" ")}\n`);
      await source.waitSerial(/^BEAT$/);
      await a.waitStatus("requests in flight", (status) => (status.queues[0]?.inflight ?? 0) >= READERS);

      const begun = performance.now();
      const pulse = new Pulse(source);
      const pair = { folder: folder.path } as Parameters<typeof startMigrateVm>[0];
      const [from, to] = [{ side: { relay: a }, vm: source }, { side: { relay: b }, vm: destination }] as unknown as Parameters<
        typeof startMigrateVm
      >[1][];
      await using migration = startMigrateVm(pair, from!, to!);
      await a.waitStatus("marks all memory", (status) => {
        if (migration.ended) throw new Error(`It ended at once:\n${migration.stderr.tail()}\n${migration.stdout.tail()}`);
        return status.marking_all;
      });
      await a.waitStatus("has switched", (status) => {
        assert.ok(!status.marking_all || !migration.ended, "it does not converge while nobody knows what the device writes");
        return !status.marking_all && status.queues[0]!.switches.count > 0;
      });
      const frozen = await pulse.stop();
      const gap = longestGapMs(source, begun);
      const switched = (await a.status()).queues[0]!.switches;
      console.log(
        `  QEMU ${qemu}: switch ${((switched.drain_us + switched.switch_us) / 1e6).toFixed(1)} s, monitor ${
          frozen.toFixed(0)
        } ms at most, ` +
          `guest ${gap.toFixed(0)} ms at most between beats of 100 ms`,
      );
      assert.ok(switched.drain_us > SWITCH_TIMEOUT_MS * 1000, "the device was slow");
      assert.ok(frozen < SWITCH_TIMEOUT_MS + SLACK_MS, `the monitor did not answer for ${frozen} ms`);
      assert.ok(gap < SWITCH_TIMEOUT_MS + SLACK_MS, `the guest stood still for ${gap} ms`);

      const document = await migrateResult(migration);
      console.log(`  total ${document.total_ms} ms, downtime ${document.downtime_us!.total / 1000} ms, ${document.rounds.length} rounds`);
      assert.equal(document.outcome, "completed");
      // QEMU 7.2 under TCG forgets pages that the processor writes while it migrates.
      if (qemu === "10") assert.deepEqual(differingPages(source.memoryPath(), destination.memoryPath()), []);
      await destination.qmp.execute("cont");
      await waitUntil("the guest at the destination", () => destination.serial.lines.some((line) => line.text === "BEAT"));
      await b.waitStatus("requests go on", (status) => (status.queues[0]?.used_idx ?? 0) > (status.queues[0]?.start_base ?? 0) + READERS);
      assert.ok(!source.serial.text.includes("IOERROR") && !destination.serial.text.includes("IOERROR"));
    },
  );
}
