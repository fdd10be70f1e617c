import assert from "node:assert/strict";
import { SERVER_PROTOCOL_FEATURES } from "../../src/vhost_user/server_rules.ts";
import { FRONT_END_PROTOCOL_FEATURES } from "../../src/vhost_user/front_end.ts";
import { PROTOCOL_FEATURE } from "../../src/uapi/vhost_user.ts";
import { allMasked, MASKED_FEATURES, maskedOf } from "../../src/vhost/masked.ts";
import { bit, bitsOf, hasBit } from "../../src/uapi/bits.ts";
import { painter } from "../../src/cli/colour.ts";
import { describeDevice } from "../../src/cli/probe_text.ts";
import { listenUnix } from "../../src/ffi/mod.ts";
import { describeSocket } from "../../src/vhost/probe.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { FakeBackend } from "../support/fake_backend.ts";
import { TempDir } from "../support/temp.ts";

const masked = allMasked().filter(({ kind }) => kind === "protocol").map(({ bit }) => bit);

Deno.test("every protocol feature is either used with the device or masked with a reason", () => {
  // What the VMM is offered besides is the relay's own.
  assert.equal(SERVER_PROTOCOL_FEATURES, FRONT_END_PROTOCOL_FEATURES | bit(PROTOCOL_FEATURE.INFLIGHT_SHMFD));
  for (const [name, number] of Object.entries(PROTOCOL_FEATURE)) {
    assert.equal(masked.includes(number), !hasBit(FRONT_END_PROTOCOL_FEATURES, number), name);
  }
});

Deno.test("docs/features.md has a row for every masked feature, with the reason that a probe gives for protocol features", async () => {
  const rows = (await Deno.readTextFile(new URL("../../docs/features.md", import.meta.url))).split("\n");
  for (const { kind, bit, name, text } of allMasked()) {
    const start = kind === "protocol" ? `| ${bit} | ${name} | ${text} |` : `| ${bit} | ${name} | masked`;
    assert.ok(rows.some((row) => row.startsWith(start)), start);
    if (kind === "feature") assert.ok(hasBit(MASKED_FEATURES, bit), name);
  }
  assert.equal(
    rows.filter((row) => /^\| \d+ \| \w+ \| masked/.test(row)).length,
    allMasked().filter(({ kind }) => kind === "feature").length,
  );
});

Deno.test("docs/features.md tells of every transport feature that QEMU's shadow virtqueues refuse whether it is carried or masked, and truly", async () => {
  const text = await Deno.readTextFile(new URL("../../docs/features.md", import.meta.url));
  const section = text.slice(text.indexOf("## What QEMU's own"), text.indexOf("## vhost-user protocol features"));
  for (let number = 34; number <= 41; number++) {
    const row = section.split("\n").find((line) => line.startsWith(`| ${number} |`));
    assert.ok(row !== undefined, `bit ${number}`);
    assert.equal(row.includes("| masked: "), hasBit(MASKED_FEATURES, number), row);
  }
});

Deno.test("only what a device offers is listed, also protocol features that nobody knows yet", () => {
  assert.deepEqual(maskedOf(1n << 32n, 1n), []);
  const names = maskedOf(1n << 33n | 1n << 40n, 1n << 8n | 1n << 14n | 1n << 21n | 1n << 40n).map(({ kind, name }) => `${kind} ${name}`);
  assert.deepEqual(names, [
    "feature ACCESS_PLATFORM",
    "feature RING_RESET",
    "protocol PAGEFAULT",
    "protocol INBAND_NOTIFICATIONS",
    "protocol SHMEM",
    "protocol bit_40",
  ]);
});

Deno.test("a probe of a back-end with postcopy and in-band notifications names them, with the reason, in the document and in words", async () => {
  using folder = new TempDir();
  const path = folder.join("device.sock");
  using listener = listenUnix(path);
  const offer = bitsOf([0, 3, PROTOCOL_FEATURE.PAGEFAULT, PROTOCOL_FEATURE.INBAND_NOTIFICATIONS]);
  const served = listener.accept().then((stream) => new BackendServer(stream!, new FakeBackend(), { protocolFeatures: offer }).run());
  const device = await describeSocket(path, `unix:${path}`, 5000);
  await served;
  assert.equal(device.error, null);
  assert.deepEqual(device.masked!.map(({ name }) => name), ["PAGEFAULT", "INBAND_NOTIFICATIONS"]);
  assert.match(describeDevice(device, painter(false)), /not passed on by a relay:\n +PAGEFAULT: Postcopy is not carried/);
});
