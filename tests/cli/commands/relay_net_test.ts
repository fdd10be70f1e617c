import assert from "node:assert/strict";
import { EmbeddedDriver } from "../../../src/drivers/embedded_driver.ts";
import { VhostUserFrontEnd } from "../../../src/vhost_user/front_end.ts";
import { svq } from "../../support/cli.ts";
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
  assert.deepEqual(net, { control: "guest", queue: 4, pairs: 2, refused: [], not_migratable: [] });

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
