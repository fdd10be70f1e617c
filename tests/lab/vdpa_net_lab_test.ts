/**
 * The control queue of a kernel vDPA network device, in the lab VM: its commands go through the relay, in an address space of
 * their own, and a second device is brought to what was set on the first one.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../src/devices/open.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { formatMac } from "../../src/net/command.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import { vdpaNode, vmTest, type VmTestOptions } from "../support/lab_vm.ts";

const OWN = "02:00:00:00:00:01";
const SET = "02:00:00:00:00:99";

const sim: VmTestOptions = {
  file: import.meta.url,
  modules: ["vhost_vdpa", "vdpa_sim_net"],
  setup: [`vdpa dev add name net0 mgmtdev vdpasim_net mac ${OWN}`, "vdpa dev add name net1 mgmtdev vdpasim_net mac 02:00:00:00:00:02"],
  timeoutMs: 900_000,
};

async function open(name: string, errors: string[]): Promise<{ device: VhostVdpa; relay: Relay }> {
  const device = await openDevice(vdpaNode(name));
  assert.ok(device instanceof VhostVdpa);
  const relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG }, { log: () => {}, error: (error) => errors.push(error.message) });
  return { device, relay };
}

// This device drops a frame for which there is no buffer at that moment.
const options = { queues: 1, depth: 8, num: 64, ramSize: 8 << 20, rate: 50 };

async function works(driver: EmbeddedDriver): Promise<void> {
  const report = await driver.run({ requests: 20, drainMs: 5000 });
  assert.deepEqual([report.duplicated, report.corrupted], [0, 0]);
  assert.ok(report.net!.received >= 10, `${report.net!.received} of 20 frames came back`);
}

vmTest(
  "an address that was set through the control queue of one vdpa_sim_net is set on the second one before its queues start",
  sim,
  async () => {
    const errors: string[] = [];
    const source = await open("net0", errors);
    const address = async ({ device }: { device: VhostVdpa }) => formatMac(await device.getConfig(0, 6));
    const first = await EmbeddedDriver.open(source.relay, options);
    assert.equal(source.relay.net.source, "guest");
    assert.equal(await address(source), OWN);
    assert.ok(await first.control({ name: "MAC_ADDR_SET", mac: SET }));
    assert.equal(await address(source), SET);
    await works(first);
    const state = source.relay.net.document;
    assert.equal(state?.mac, SET);
    await first.close();
    await source.relay.close();
    await source.device.close();

    const destination = await open("net1", errors);
    await destination.relay.net.load(JSON.parse(JSON.stringify(state)));
    const second = await EmbeddedDriver.open(destination.relay, options);
    assert.equal(await address(destination), SET);
    await works(second);
    assert.ok(await second.control({ name: "MAC_ADDR_SET", mac: OWN }));
    assert.equal(await address(destination), OWN);
    await second.close();
    await destination.relay.close();
    await destination.device.close();
    assert.deepEqual(errors, []);
  },
);

vmTest("where the VMM keeps the control queue to itself, the relay gives vdpa_sim_net the address of --mac", sim, async () => {
  const errors: string[] = [];
  const device = await openDevice(vdpaNode("net0"));
  const config = { ...DEFAULT_RELAY_CONFIG, mac: "02:00:00:00:00:77" };
  const relay = new Relay(device, config, { log: () => {}, error: (error) => errors.push(error.message) });
  const CTRL = 1n << 17n | 1n << 23n;
  const vmm = new Proxy(relay, {
    get(target, name) {
      if (name === "getFeatures") return async () => (await target.getFeatures()) & ~CTRL;
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
  const driver = await EmbeddedDriver.open(vmm, options);
  assert.equal(relay.net.source, "relay");
  assert.equal(formatMac(await device.getConfig(0, 6)), "02:00:00:00:00:77");
  await works(driver);
  await driver.close();
  await relay.close();
  await device.close();
  assert.deepEqual(errors, []);
});
