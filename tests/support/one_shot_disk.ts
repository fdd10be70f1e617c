/**
 * A disk daemon that ends when its front-end leaves: `one_shot_disk.ts SOCKET IMAGE`.
 *
 * @module
 */
import { SimDevice } from "../../src/devices/sim_device.ts";
import { listenUnix } from "../../src/ffi/mod.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";

const [socket, file] = Deno.args;
const sim = await SimDevice.open({ kind: "blk", file: file!, size: 32 << 20, queues: 2, latencyUs: 300, jitterUs: 1500 });
const listener = listenUnix(socket!);
const stream = await listener.accept();
listener.close();
await new BackendServer(stream, sim).run();
Deno.exit(7);
