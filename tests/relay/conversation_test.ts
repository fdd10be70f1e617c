// What front-ends without a VMM say to a relay; those of VMMs are compared in tests/lab.
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { unixPair } from "../../src/ffi/mod.ts";
import { MessageLog } from "../../src/relay/message_log.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../../src/uapi/vhost_user.ts";
import { FRONT_END_PROTOCOL_FEATURES, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { assertConversation } from "../support/conversation.ts";

const { REPLY_ACK, MQ } = PROTOCOL_FEATURE;

for (
  const { name, what, protocolFeatures } of [
    { name: "embedded_driver", what: "the embedded driver", protocolFeatures: FRONT_END_PROTOCOL_FEATURES },
    { name: "embedded_driver_plain", what: "one with two protocol features only", protocolFeatures: bitsOf([MQ, REPLY_ACK]) },
  ]
) {
  Deno.test(`the conversation of ${what} with a relay is the recorded one`, async () => {
    const log = new MessageLog();
    await using sim = await SimDevice.open({ kind: "loopback", queues: 2 });
    await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode: "used" }, {
      log: () => {},
      error: ({ message }) => assert.fail(message),
    });
    const [a, b] = unixPair();
    const ended = new BackendServer(a, relay, { offerLog: true, onMessage: log.hook("front") }).run();
    {
      await using vmm = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 20_000, protocolFeatures });
      await using driver = await EmbeddedDriver.open(vmm, { queues: 2, num: 64, ramSize: 16 << 20, regionSize: 8 << 20 });
      const { lost, duplicated, corrupted } = await driver.run({ requests: 200 });
      assert.deepEqual([lost, duplicated, corrupted], [0, 0, 0]);
    }
    assert.equal(await ended, undefined);
    await assertConversation(name, log.since(0));
  });
}
