import assert from "node:assert/strict";
import { EmbeddedDriver } from "../../../src/drivers/embedded_driver.ts";
import { VhostUserFrontEnd } from "../../../src/vhost_user/front_end.ts";
import { svq } from "../../support/cli.ts";
import { decodePcapng } from "../../support/pcapng.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";

Deno.test("A network device behind a relay is driven by svq drive; its state is printed, saved and loaded", async () => {
  using folder = new TempDir();
  const env = { SVQ_RUNTIME_DIR: folder.path };
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:net,cable=loop,queues=5" });

  const drive = await svq(["-j", "drive", `unix:${relay.front}`, "--requests", "32"], env);
  assert.equal(drive.code, 0, drive.stderr);
  const report = JSON.parse(drive.stdout);
  assert.deepEqual([report.requests.completed, report.requests.lost, report.net.sent], [32, 0, 32]);

  const none = await svq(["-j", "relay", "status", "relay", "--net-state"], env);
  assert.equal(none.code, 5);
  assert.equal(JSON.parse(none.stderr).error.code, "NO_CONTROL_QUEUE");

  await using device = await VhostUserFrontEnd.connect(relay.front);
  await using driver = await EmbeddedDriver.open(device, { queues: 2, depth: 8, num: 64, ramSize: 8 << 20 });
  assert.ok(await driver.control({ name: "VLAN_ADD", vlan: 42 }));
  const shown = await svq(["relay", "status", "relay", "--net-state"], env);
  const state = JSON.parse(shown.stdout);
  assertMatchesSchema("svq.net-state/1", state);
  assert.deepEqual([state.vlans, state.steering], [[42], [{ pairs: 2 }]]);
  const { net } = await relay.status();
  assert.deepEqual(net, { control: "guest", queue: 4, own_address_space: false, pairs: 2, refused: [], not_migratable: [] });

  await driver.control({ name: "VLAN_DEL", vlan: 42 });
  Deno.writeTextFileSync(folder.join("state.json"), shown.stdout);
  const set = await svq(["-j", "relay", "set", "relay", "--net-state", folder.join("state.json")], env);
  assert.equal(set.code, 0, set.stderr);
  assertMatchesSchema("svq.relay/1", JSON.parse(set.stdout));
  assert.deepEqual(await relay.call("net_state"), state);

  Deno.writeTextFileSync(folder.join("bad.json"), shown.stdout.replace("42", "4242"));
  const bad = await svq(["-j", "relay", "set", "relay", "--net-state", folder.join("bad.json")], env);
  assert.equal(JSON.parse(bad.stderr).error.code, "BAD_NET_STATE");
});

Deno.test("svq trace --pcapng writes the frames of a guest until it is over, and status and metrics count them", async () => {
  using folder = new TempDir();
  const env = { SVQ_RUNTIME_DIR: folder.path };
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:net,cable=loop" });
  await using device = await VhostUserFrontEnd.connect(relay.front);
  await using driver = await EmbeddedDriver.open(device, { depth: 8, num: 64, ramSize: 8 << 20, rate: 500 });
  const run = driver.run({ drainMs: 5000 });
  run.catch(() => {});
  const file = folder.join("frames.pcapng");
  const traced = await svq(["trace", "relay", "--pcapng", file, "--duration", "1s"], env);
  assert.equal(traced.code, 0, traced.stderr);
  const { frames, dropped, interface: { name } } = decodePcapng(Deno.readFileSync(file));
  assert.match(traced.stderr, new RegExp(`${frames.length} frames captured, 0 not captured`));
  assert.deepEqual([name, dropped], ["relay", 0]);
  assert.deepEqual(new Set(frames.map(({ direction, queue }) => `${direction} ${queue}`)), new Set(["in 0", "out 1"]));
  assert.ok(frames.length > 50 && frames.every(({ length }) => length === 510));
  const report = await driver.stop(5000);
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  const status = await relay.status();
  assertMatchesSchema("svq.relay/1", status);
  assert.deepEqual(status.queues.slice(0, 2).map(({ mode }) => mode), ["passthrough", "passthrough"]);
  assert.deepEqual(status.queues[1]!.frames, { frames: report.net!.sent, bytes: report.net!.sent * 510, drops: 0 });
  const metrics = await svq(["relay", "status", "relay", "--metrics"], env);
  assert.match(metrics.stdout, new RegExp(`^svq_queue_frames_total{relay="relay",queue="1"} ${report.net!.sent}$`, "m"));
  assert.match(metrics.stdout, /^svq_queue_frame_drops_total{relay="relay",queue="0"} 0$/m);
});
