import assert from "node:assert/strict";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { SourceGuest } from "../../src/migration/source_guest.ts";
import { Hosts, progress } from "../support/migration.ts";
import { waitUntil } from "../support/wait.ts";

for (const packed of [false, true]) {
  Deno.test(`What the device writes while it is drained is in the log: data, status and the ${packed ? "packed" : "used"} ring`, () =>
    drained(packed));
}

async function drained(packed: boolean): Promise<void> {
  await using hosts = new Hosts({ packed, device: { latencyUs: 400_000 } });
  const guest = await hosts.guestWithoutProgress();
  using source = new SourceGuest(guest.driver, guest.relay);
  await source.logOn();
  await waitUntil("a log that is precise", () => !source.markingAll);
  await progress(guest, 1);
  await guest.driver.pause();
  const before = DirtyBitmap.covering(source.map.endGpa);
  source.harvest(before);
  const memory = new Uint8Array(8 << 20);
  const now = () => new Uint8Array(Deno.readFileSync(`/proc/self/fd/${guest.driver.ram.fd}`));
  memory.set(now());
  await source.stop(10_000);
  const dirty = DirtyBitmap.covering(source.map.endGpa);
  source.harvest(dirty);
  const after = now();
  let changed = 0;
  for (let at = 0; at < memory.length; at += 4096) {
    const same = memory.subarray(at, at + 4096).every((byte, i) => byte === after[at + i]);
    if (same) continue;
    changed++;
    const page = guest.driver.layout.gpa(at) / 4096;
    assert.ok(dirty.has(page), `page ${page} at offset ${at} changed and is not marked`);
  }
  assert.ok(changed > 0, "the device answered what was open");
  const { desc, used } = guest.driver.layout.addresses(0);
  assert.ok(dirty.has(Math.floor((packed ? desc : used) / 4096)), "the ring is marked");
  await source.goOn();
  await progress(guest, 1);
}

Deno.test("Gone on after a stop, the guest works without a log and in passthrough", async () => {
  await using hosts = new Hosts({ queues: 2 });
  const guest = await hosts.guest();
  using source = new SourceGuest(guest.driver, guest.relay);
  for (let i = 0; i < 3; i++) {
    await source.logOn();
    assert.ok(guest.relay.queues.every((queue) => queue.state === "used" || queue.state === "shadow"));
    await source.stop(10_000);
    await source.goOn();
    await progress(guest);
    assert.equal(guest.relay.logging, false);
    await guest.relay.applyMode();
    assert.deepEqual(guest.relay.queues.map((queue) => queue.state), ["passthrough", "passthrough"]);
  }
});

Deno.test("Rings that come back between a stop that took too long and its undo are the guest's again", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  using source = new SourceGuest(guest.driver, guest.relay);
  await source.logOn();
  const { driver } = guest;
  const stopRings = driver.stopRings.bind(driver);
  const answer = Promise.withResolvers<void>();
  let stopped: Promise<number[]> | undefined;
  driver.stopRings = () => stopped = answer.promise.then(stopRings);
  await assert.rejects(source.stop(1), { code: "DRAIN_TIMEOUT" });
  answer.resolve();
  await stopped;
  driver.stopRings = stopRings;
  await source.goOn();
  await progress(guest);
});
