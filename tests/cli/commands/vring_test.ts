import assert from "node:assert/strict";
import { svq, svqCommand } from "../../support/cli.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";
import { waitUntil } from "../../support/wait.ts";

/** A relay over a disk, and an embedded guest that keeps it busy. */
async function busyRelay(
  device: string,
  mode: string,
  body: (run: (...args: string[]) => ReturnType<typeof svq>, relay: RelayProcess, folder: TempDir) => Promise<void>,
): Promise<void> {
  using folder = new TempDir();
  await using relay = await RelayProcess.start({ folder: folder.path, device, args: ["--mode", mode] });
  const env = { SVQ_RUNTIME_DIR: folder.path, NO_COLOR: "1" };
  const guest = svqCommand(["drive", `unix:${relay.front}`, "--duration", "10m", "--depth", "8", "--drain-timeout", "1s"], env).spawn();
  try {
    await relay.waitStatus("has requests", ({ queues }) => queues.length > 0 && queues[0]!.inflight > 0);
    await body((...args) => svq(args, env), relay, folder);
  } finally {
    guest.kill("SIGKILL");
    await guest.output();
  }
}

// deno-lint-ignore no-explicit-any -- documents are looked into deeply
type Json = any;

Deno.test("svq vring shows, checks, watches, saves and compares the rings of a busy relay", async (t) => {
  await busyRelay("sim:blk,size=64MiB,latency=2ms", "shadow", async (run, relay, folder) => {
    const saved = folder.join("rings.json");

    await t.step("dump -j is a svq.vring/1 document with both sides", async () => {
      const { code, stdout, stderr } = await run("-j", "vring", "dump", "relay", "--save", saved);
      assert.equal(code, 0, stderr);
      assertMatchesSchema("svq.vring/1", stdout);
      const document: Json = JSON.parse(stdout);
      assert.equal(document.relay, "relay");
      assert.deepEqual(document.queues.map((ring: Json) => [ring.index, ring.side, ring.layout, ring.mode]), [
        [0, "guest", "split", "shadow"],
        [0, "shadow", "split", "shadow"],
      ]);
      for (const ring of document.queues) {
        assert.equal(ring.in_flight, (ring.avail_idx - ring.used_idx) & 0xffff);
        if (ring.consistent) assert.deepEqual(ring.anomalies, []);
        for (const chain of ring.chains) assert.ok(chain.readable_bytes >= 16 && chain.writable_bytes >= 1);
      }
    });

    await t.step("dump is a table for people, of the queues and the side that are asked for", async () => {
      const { code, stdout } = await run("vring", "dump", "relay", "--queue", "0", "--side", "guest", "--all");
      assert.equal(code, 0);
      assert.match(stdout, /^queue 0 guest {2}split, \d+ descriptors, mode shadow/);
      assert.match(stdout, /\n {2}in flight {2}\d+ chains|\n {2}in flight {2}nothing/);
      assert.match(stdout, /\n {2}DESCRIPTOR +ADDRESS +LENGTH +FLAGS +NEXT\n/);
      assert.doesNotMatch(stdout, /queue 0 shadow/);
    });

    await t.step("verify finds no broken rule", async () => {
      await waitUntil("a look that is not torn", async () => {
        const { code, stdout } = await run("-j", "vring", "verify", "relay");
        const document: Json = JSON.parse(stdout);
        for (const ring of document.queues) assert.deepEqual(ring.anomalies, []);
        return code === 0;
      });
    });

    await t.step("watch prints lines, and documents under -j", async () => {
      const text = await run("vring", "watch", "relay", "--count", "2", "--interval", "50ms", "--side", "guest");
      assert.equal(text.code, 0, text.stderr);
      const lines = text.stdout.trimEnd().split("\n");
      assert.equal(lines.length, 2);
      assert.match(lines[1]!, /queue 0 guest, split, mode shadow {2}avail \d+ \(\+\d+\) {2}used \d+ \(\+\d+\)/);
      const json = await run("-j", "vring", "watch", "relay", "--count", "2", "--interval", "50ms");
      const documents = json.stdout.trimEnd().split("\n");
      assert.equal(documents.length, 2);
      for (const document of documents) assertMatchesSchema("svq.vring/1", document);
    });

    await t.step("diff tells what moved since an image", async () => {
      const { code, stdout } = await run("-j", "vring", "diff", saved, "relay", "--side", "guest");
      assert.equal(code, 0);
      assertMatchesSchema("svq.vring-diff/1", stdout);
      const document: Json = JSON.parse(stdout);
      assert.equal(document.identical, false);
      assert.ok(document.queues[0].used_moved > 0);
      const text = await run("vring", "diff", "relay", "--interval", "50ms");
      assert.match(text.stdout, /^queue 0 guest\n {2}made available {2}\d+ chains/);
    });

    await t.step("an image is shown, checked, and compared with itself", async () => {
      assertMatchesSchema("svq.vring-image/1", await Deno.readTextFile(saved));
      const { code, stdout } = await run("-j", "vring", "dump", "--image", saved, "--queue", "0");
      assert.equal(code, 0);
      assert.equal(JSON.parse(stdout).source, saved);
      assert.match((await run("vring", "diff", saved, saved)).stdout, /queue 0 guest {2}nothing moved/);
    });

    await t.step("verify of a broken image ends with 6 and names the rule and its section", async () => {
      const image: Json = JSON.parse(await Deno.readTextFile(saved));
      const { ring } = image.queues[0];
      const avail = Uint8Array.fromBase64(ring.avail);
      new DataView(avail.buffer).setUint16(0, 7, true);
      ring.avail = avail.toBase64();
      await Deno.writeTextFile(folder.join("broken.json"), JSON.stringify(image));
      const text = await run("vring", "verify", "--image", folder.join("broken.json"));
      assert.equal(text.code, 6);
      assert.match(text.stdout, /SUPPRESSION_FLAGS {2}virtio 1\.3, 2\.7\.7\.1: The flags of the avail ring are 0x7/);
      const json = await run("-j", "vring", "verify", "--image", folder.join("broken.json"));
      assert.equal(json.code, 6);
      assertMatchesSchema("svq.vring/1", json.stdout);
      assert.deepEqual(JSON.parse(json.stdout).queues[0].anomalies.map(({ rule, spec }: Json) => [rule, spec]), [
        ["SUPPRESSION_FLAGS", "2.7.7.1"],
      ]);
    });

    await t.step("what cannot be done says why", async () => {
      await Deno.writeTextFile(folder.join("text.log"), "relay: ready\nrelay: a guest came\n");
      await Deno.writeTextFile(folder.join("bad.json"), '{"schema":"svq.vring-image/1","created":"now","queues":[{"index":-1}]}');
      for (
        const [expected, message, ...args] of [
          [3, /No relay "nobody" runs/, "dump", "nobody"],
          [3, /Queue 5 is not set up; these are: 0/, "dump", "relay", "--queue", "5"],
          [2, /Say whose rings/, "verify"],
          [2, /The rings of relay, or those of the image: one at a time/, "dump", "relay", "--image", saved],
          [2, /There is no file/, "dump", "--image", folder.join("nothing.json")],
          [1, /bad\.json is no ring image: \$\.queues\[0\] has neither/, "verify", "--image", folder.join("bad.json")],
          [1, /text\.log is no ring image: it is not JSON\n/, "dump", "--image", folder.join("text.log")],
          [2, /An image is compared with another one/, "diff", saved],
        ] as const
      ) {
        const { code, stderr } = await run("vring", ...args);
        assert.match(stderr, message);
        assert.equal(code, expected, stderr);
      }
    });

    assert.equal((await relay.status()).queues[0]!.errors, 0);
  });
});

Deno.test("svq vring dump tells for how long a chain has been out, in passthrough, too", async () => {
  await busyRelay("sim:blk,size=8MiB,latency=10m", "passthrough", async (run) => {
    const flying = async () => {
      const { stdout } = await run("-j", "vring", "dump", "relay");
      const [ring, ...others]: Json[] = JSON.parse(stdout).queues;
      assert.equal(others.length, 0, "passthrough has no shadow side");
      assert.equal(ring.last_avail_idx, null);
      return ring.chains.filter(({ in_flight }: Json) => in_flight);
    };
    const first = await flying();
    assert.equal(first.length, 8);
    assert.deepEqual(new Set(first.map(({ in_flight_ms }: Json) => in_flight_ms)), new Set([null]));
    for (const chain of await flying()) assert.ok(chain.in_flight_ms > 0);
  });
});
