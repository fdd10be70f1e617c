import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import type { RelayCore } from "../../src/relay/core.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { Polling } from "../../src/relay/polling.ts";
import { QueueRunner } from "../../src/relay/queue_runner.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { workerCpus } from "../../src/relay/worker_load.ts";
import { Chain } from "../../src/vring/queue.ts";
import { PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";
import { FlatMemory, packedPlace, splitPlace } from "../support/ring_memory.ts";
import { waitUntil } from "../support/wait.ts";
import { explore, type Outcome } from "../vring/interleavings.ts";

// ---- the handshake of a polled queue, in every interleaving with the other side of one ring

interface Scenario {
  format: "split" | "packed";
  eventIdx: boolean;
  /** The other side of the ring: the guest, which kicks, or the device, which calls. */
  other: "guest" | "device";
  /** Looks without notifications before the queue is armed. */
  looks: number;
  /** Sleep without arming. */
  careless?: boolean;
}

/** The side that the test does not look at: what goes in comes out at once. */
abstract class HalfCore implements RelayCore {
  readonly kind = "js";
  readonly callWanted = false;
  readonly kickWanted = false;
  full = false;
  readonly inflight = 0;
  readonly guestBase = 0;
  readonly guestUsed = 0;
  abstract forward(): number;
  abstract returnUsed(): number;
  disableCalls(): void {}
  enableCalls(): boolean {
    return false;
  }
  disableKicks(): void {}
  enableKicks(): boolean {
    return false;
  }
  setLogUsed(): void {}
  logRing(): void {}
  uses(): number {
    return 0;
  }
  progress() {
    return { deviceBase: 0, inflight: 0, guestBase: 0 };
  }
  finish() {
    return this.progress();
  }
  renew(): void {}
  abandon() {
    return this.progress();
  }
  close(): void {}
}

const CHAINS = 2;
const NUM = 1;

function check({ format, eventIdx, other, looks, careless = false }: Scenario): Outcome {
  const memory = new FlatMemory(192);
  const place = format === "split" ? splitPlace(memory, NUM) : packedPlace(memory, NUM);
  const newDriver = () => format === "split" ? new SplitDriver({ ...place, eventIdx }) : new PackedDriver({ ...place, eventIdx });
  const newDevice = () =>
    format === "split"
      ? new SplitDevice({ ...place, eventIdx, indirect: false })
      : new PackedDevice({ ...place, eventIdx, indirect: false });
  const start = { index: 0, mode: "shadow", callFd: -1, deviceKickFd: -1, paused: false } as unknown as QueueStart;
  // The Worker's part, with the real steps of a queue.
  const run = (core: RelayCore, steps: { sleep(): void; mark(text: string): void }, state: () => string | undefined) => {
    const runner = new QueueRunner(start, core, new Float64Array(16));
    for (;;) {
      for (let idle = 0; idle <= looks;) {
        idle = runner.work() === 0 ? idle + 1 : 0;
        const text = state();
        if (text === undefined) return;
        // Between two looks everything is in this text: nothing is half done.
        steps.mark(`${text}, ${idle} looks in vain`);
      }
      if (!careless && runner.arm()) continue;
      steps.sleep();
    }
  };
  if (other === "guest") {
    return explore(memory.bytes, [
      () => (steps) => {
        const driver = newDriver();
        for (let sent = 0, back = 0;;) {
          driver.disableCalls();
          while (driver.take() >= 0) back++;
          steps.mark(`${sent} sent, ${back} back`);
          if (back === CHAINS) return;
          if (sent < CHAINS && driver.add([{ address: 64, length: 1 }], []) >= 0) {
            sent++;
            if (driver.publish()) steps.notify();
          }
          if (!driver.enableCalls()) steps.sleep();
        }
      },
      () => (steps) => {
        const device = newDevice();
        const chain = new Chain(NUM);
        const ready: number[] = [];
        class Core extends HalfCore {
          forward(): number {
            let moved = 0;
            for (; device.pop(chain); moved++) ready.push(chain.id);
            return moved;
          }
          returnUsed(): number {
            const moved = ready.length;
            for (const id of ready.splice(0)) device.push(id, 0);
            if (moved > 0 && device.flush()) steps.notify();
            return moved;
          }
          override disableKicks = () => device.disableKicks();
          override enableKicks = () => device.enableKicks();
        }
        run(new Core(), steps, () => `${device.base}`);
      },
    ], 0);
  }
  return explore(memory.bytes, [
    () => (steps) => {
      const driver = newDriver();
      let [sent, back] = [0, 0];
      class Core extends HalfCore {
        forward(): number {
          this.full = false;
          if (sent === CHAINS) return 0;
          if (driver.add([{ address: 64, length: 1 }], []) < 0) {
            this.full = true;
            return 0;
          }
          sent++;
          if (driver.publish()) steps.notify();
          return 1;
        }
        returnUsed(): number {
          let moved = 0;
          for (; driver.take() >= 0; moved++) back++;
          return moved;
        }
        override disableCalls = () => driver.disableCalls();
        override enableCalls = () => driver.enableCalls();
      }
      run(new Core(), steps, () => back === CHAINS ? undefined : `${sent} sent, ${back} back`);
    },
    () => (steps) => {
      const device = newDevice();
      const chain = new Chain(NUM);
      for (;;) {
        device.disableKicks();
        while (device.pop(chain)) device.push(chain.id, 0);
        if (device.flush()) steps.notify();
        steps.mark(`${device.base}`);
        if (!device.enableKicks()) steps.sleep();
      }
    },
  ], 0);
}

const scenarios = (["guest", "device"] as const).flatMap((other) =>
  (["split", "packed"] as const).flatMap((format) =>
    [false, true].flatMap((eventIdx) => [0, 1].map((looks): Scenario => ({ other, format, eventIdx, looks })))
  )
);

Deno.test("In every interleaving, a polled queue that is armed before its thread sleeps misses neither a kick nor a call", () => {
  let states = 0;
  // All of them take 10 s of a CPU.
  const few = scenarios.filter(({ other, format, eventIdx, looks }) =>
    eventIdx && looks === 1 && (other === "device") === (format === "split")
  );
  for (const scenario of Deno.env.has("SVQ_SOAK") ? scenarios : few) {
    const outcome = check(scenario);
    assert.deepEqual(outcome.stuck, [], `a wake-up was lost: ${JSON.stringify(scenario)}`);
    states += outcome.states;
  }
  assert.ok(states > 1000, `only ${states} states were reached`);
});

Deno.test("The check finds the lost wake-up of a thread that sleeps with a polled queue not armed", () => {
  for (const scenario of scenarios) {
    assert.notDeepEqual(check({ ...scenario, careless: true }).stuck, [], `not found: ${JSON.stringify(scenario)}`);
  }
});

// ---- for how long

Deno.test("Self-tuned polling grows while sleeps are short, and ends after a few long ones", () => {
  const polling = new Polling("auto", 1);
  assert.equal(polling.budgetUs, 0);
  const seen = [];
  for (let now = 0; now < 10; now++) {
    polling.slept(10, now);
    seen.push(polling.budgetUs);
  }
  assert.deepEqual(seen.slice(0, 5), [16, 32, 64, 64, 64]);
  assert.equal(seen.at(-1), 64, "no longer than what a wake-up costs");
  let sleeps = 0;
  while (polling.budgetUs > 0) {
    polling.slept(5000, 20);
    sleeps++;
  }
  assert.ok(sleeps <= 6, `an idle queue was polled ${sleeps} times more`);
});

Deno.test("Self-tuned polling stops when the thread lost its CPU meanwhile, for longer each time", () => {
  const polling = new Polling("auto", 1);
  let now = 0;
  const pauses: number[] = [];
  for (let i = 0; i < 12; i++) {
    while (polling.budgetUs === 0) polling.slept(10, now += 1000);
    assert.equal(polling.lap(20, now), false, "two looks in a row");
    assert.equal(polling.lap(3000, now), true);
    assert.equal(polling.budgetUs, 0);
    const from = now;
    while (polling.budgetUs === 0) polling.slept(10, now += 1000);
    pauses.push(now - from);
  }
  assert.equal(polling.heldOff, 12);
  assert.ok(pauses[1]! > 1.5 * pauses[0]! && pauses.at(-1)! >= 1_000_000, `${pauses}`);
});

Deno.test("Self-tuned polling stops where it finds nothing and the sleeps after it are short all the same", () => {
  const polling = new Polling("auto", 1);
  let [rounds, now] = [0, 0];
  for (; now < 10_000_000; now += 100) {
    if (polling.budgetUs > 0) {
      rounds++;
      polling.ended(false, now);
    }
    polling.slept(20, now);
  }
  assert.ok(rounds > 0 && rounds < 400, `${rounds} rounds in 10 s`);
  // What it found meanwhile makes it go on.
  for (let i = 0; i < 200; i++) {
    polling.slept(20, now += 100_000);
    polling.ended(i % 3 > 0, now);
  }
  assert.equal(polling.budgetUs, 64);
});

Deno.test("Self-tuned polling never begins where there are no more CPUs than workers", () => {
  const polling = new Polling("auto", 0);
  for (let now = 0; now < 100; now++) polling.slept(1, now);
  assert.equal(polling.budgetUs, 0);
});

Deno.test("A fixed time to poll stays what it is", () => {
  const polling = new Polling(30, -3);
  polling.slept(1e6, 0);
  assert.equal(polling.lap(5000, 1), false);
  assert.equal(polling.budgetUs, 30);
});

Deno.test("Workers share a list of CPUs out, and take turns where it is shorter", () => {
  assert.deepEqual([0, 1].map((index) => workerCpus([4, 5, 6], index, 2)), [[4, 6], [5]]);
  assert.deepEqual([0, 1, 2].map((index) => workerCpus([4, 5], index, 3)), [[4], [5], [4]]);
  assert.deepEqual(workerCpus([], 1, 2), []);
});

// ---- the whole

async function drive(config: Partial<RelayConfig>, requests: number, queues = 1) {
  const errors: string[] = [];
  await using device = await SimDevice.open({ kind: "blk", size: 16 << 20, queues });
  await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, ...config }, {
    log: (text) => errors.push(text),
    error: ({ message }) => errors.push(message),
  });
  await using driver = await EmbeddedDriver.open(relay, { queues, depth: 8, requestSize: 512, regionSize: 16 << 20 });
  const report = await driver.run({ requests });
  const chains = relay.queues.map(({ index }) => relay.counters.of(index)[2]!);
  return { report, errors, chains, loads: relay.loads };
}

for (const mode of ["used", "shadow"] as const) {
  for (const core of ["wasm", "js"] as const) {
    Deno.test(`A ${mode} queue that is polled on the ${core} core loses nothing, and no call`, async () => {
      let hits = 0;
      await waitUntil("polling to find something", async () => {
        const { report, errors, loads } = await drive({ mode, core, pollUs: 300 }, 500);
        const { completed, lost, duplicated, corrupted, missedCalls, faults } = report;
        const seen = { completed, lost, duplicated, corrupted, missedCalls, faults, errors };
        assert.deepEqual(seen, { completed: 500, lost: 0, duplicated: 0, corrupted: 0, missedCalls: 0, faults: [], errors: [] });
        assert.ok(loads[0]!.polls > 0 && loads[0]!.poll_us === 300, JSON.stringify(loads));
        // On a busy machine the device may run in none of these 300 us.
        hits += loads[0]!.poll_hits;
        return hits > 0;
      });
    });
  }
}

Deno.test("A relay that is not to poll sleeps after all work", async () => {
  const { report, loads } = await drive({ mode: "shadow", pollUs: 0 }, 200);
  assert.equal(report.completed, 200);
  const { polls, poll_hits, sleeps } = loads[0]!;
  assert.deepEqual({ polls, poll_hits }, { polls: 0, poll_hits: 0 });
  assert.ok(sleeps > 0);
});

Deno.test("A relay without work sleeps, however it polls", async () => {
  await using device = await SimDevice.open({ kind: "blk", size: 16 << 20 });
  await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode: "shadow", pollUs: 100 }, { log: () => {}, error: () => {} });
  await using driver = await EmbeddedDriver.open(relay, { depth: 8, regionSize: 16 << 20 });
  await driver.run({ requests: 100 });
  const state = () => {
    const { waits, sleeps, polls } = relay.loads[0]!;
    return `${waits} ${sleeps} ${polls}`;
  };
  let before = "";
  await waitUntil("nothing is looked at for 50 ms", async () => {
    before = state();
    await new Promise((resolve) => setTimeout(resolve, 50));
    return state() === before;
  });
});

for (const pollUs of [0, 50]) {
  Deno.test(`64 queues on 2 workers all get on, polled for ${pollUs} us`, async () => {
    const { report, errors, chains, loads } = await drive({ mode: "shadow", workers: 2, pollUs }, 6400, 64);
    assert.deepEqual(errors, []);
    assert.equal(report.completed, 6400);
    assert.equal(chains.length, 64);
    const fairness = Math.min(...chains) / Math.max(...chains);
    assert.ok(fairness > 0.2, `least over most: ${fairness.toFixed(2)} (${chains})`);
    assert.ok(loads.every(({ sleeps }) => sleeps > 0));
  });
}
