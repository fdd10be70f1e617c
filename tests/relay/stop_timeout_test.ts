/**
 * A device that keeps a request for ever, when the VMM stops its ring: it is taken away from the ring after a while.
 */
import assert from "node:assert/strict";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { unixPair } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayMode } from "../../src/relay/relay.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { type Lies, LyingDevice } from "../support/lying_device.ts";
import { waitUntil } from "../support/wait.ts";

const STOP_TIMEOUT_MS = 300;

class World implements AsyncDisposable {
  readonly errors: string[] = [];
  readonly relay: Relay;
  losses = 0;
  readonly #servers: { server: BackendServer; ended: Promise<unknown> }[] = [];
  readonly #stack = new AsyncDisposableStack();

  private constructor(device: VhostUserFrontEnd, mode: RelayMode, stopTimeoutMs: number) {
    this.relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode, stopTimeoutMs }, {
      log: () => {},
      error: ({ code }) => this.errors.push(code),
      deviceLost: () => this.losses++,
    });
  }

  static async start(mode: RelayMode, lies: Lies, stopTimeoutMs = STOP_TIMEOUT_MS): Promise<World> {
    const servers: { server: BackendServer; ended: Promise<unknown> }[] = [];
    const stack = new AsyncDisposableStack();
    const device = await connect(lies, servers, stack);
    const world = new World(device, mode, stopTimeoutMs);
    world.#servers.push(...servers);
    world.#stack.use(stack);
    return world;
  }

  /** Another device, in the lost one's place. */
  async replace(lies: Lies): Promise<void> {
    await this.relay.attach(await connect(lies, this.#servers, this.#stack));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.relay.close();
    await this.#stack.disposeAsync();
  }
}

async function connect(lies: Lies, servers: { ended: Promise<unknown> }[], stack: AsyncDisposableStack): Promise<VhostUserFrontEnd> {
  const [a, b] = unixPair();
  const device = stack.use(new LyingDevice(lies));
  const server = new BackendServer(a, device);
  // As a daemon does whose front-end has gone: its rings stop.
  const ended = server.run().finally(() => device.close());
  servers.push({ server, ended } as { ended: Promise<unknown> });
  stack.defer(async () => {
    server.close();
    await ended;
  });
  return stack.use(await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000 }));
}

async function stuck(world: World, depth: number): Promise<EmbeddedDriver> {
  const driver = await EmbeddedDriver.open(world.relay, { num: LyingDevice.ringSize, depth, workload: "loopback" });
  driver.run({ requests: 1_000_000, drainMs: 60_000 }).catch(() => {});
  return driver;
}

for (const mode of ["used", "shadow", "passthrough"] as const) {
  Deno.test(`a request kept for ever, the last that was offered, is offered again when the stop has taken too long: ${mode}`, async () => {
    await using world = await World.start(mode, { drop: 20 });
    await using driver = await stuck(world, 1);
    await waitUntil("the request that is kept", async () => (await driver.report()).completed === 20, 10_000);
    const { relay } = world;
    assert.equal(await relay.getVringBase(0), 20, "the request is still the guest's");
    assert.deepEqual([world.errors, world.losses, relay.deviceLost], [["DRAIN_TIMEOUT"], 1, true]);
    await world.replace({});
  });
}

for (const mode of ["used", "shadow"] as const) {
  Deno.test(`a request kept while later ones came back is done by the device's successor, and the stop is answered then: ${mode}`, async () => {
    await using world = await World.start(mode, { drop: 20 });
    await using driver = await stuck(world, 8);
    await waitUntil("later requests", async () => (await driver.report()).completed > 60, 20_000);
    const { relay } = world;
    let answered = false;
    const base = relay.getVringBase(0).finally(() => answered = true);
    await waitUntil("the loss", () => world.losses === 1, 20_000);
    await new Promise((resolve) => setTimeout(resolve, 2 * STOP_TIMEOUT_MS));
    assert.equal(answered, false, "nobody can say where the ring stands");
    // One that is no better is taken away, too.
    await world.replace({ drop: 0 });
    await waitUntil("the second loss", () => world.losses === 2, 20_000);
    await world.replace({});
    const { used } = relay.queues[0]!.addresses!;
    assert.equal(await base, new Uint16Array(relay.memory.buffer(used, 4))[1], "all that was taken came back");
    assert.deepEqual(world.errors, ["DRAIN_TIMEOUT", "DRAIN_TIMEOUT"]);
  });
}

Deno.test("a device that gives its requests back in time keeps its connection", async () => {
  await using world = await World.start("used", {});
  await using _driver = await stuck(world, 8);
  await world.relay.getVringBase(0);
  await new Promise((resolve) => setTimeout(resolve, 2 * STOP_TIMEOUT_MS));
  assert.deepEqual([world.errors, world.losses], [[], 0]);
});
