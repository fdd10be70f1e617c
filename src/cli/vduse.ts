/** `svq device run … --vduse`: an embedded device as a vDPA device of this kernel, until a signal. @module */
import type { SimDevice } from "../devices/sim_device.ts";
import { VduseDevice } from "../devices/vduse.ts";
import { findHolders, formatHolders } from "../vhost/holders.ts";
import type { CliContext } from "./context.ts";
import { aborted } from "./signals.ts";

const HOLDER_INTERVAL_MS = 200;

/**
 * Serves `device` as the VDUSE device `name` until a signal comes, and takes it off the vdpa bus and destroys it then.
 *
 * @param add put it on the vdpa bus as well
 * @throws what {@linkcode VduseDevice.create} and {@linkcode VduseDevice.attach} throw
 */
export async function serveVduse({ signal, output }: CliContext, device: SimDevice, name: string, add: boolean): Promise<void> {
  await using vduse = await VduseDevice.create(name, device, {
    info: (message) => output.info(message),
    warn: (message) => output.warn(message),
  });
  device.onConfigChange = () => output.warn(device.errors.at(-1)?.message ?? "A queue stopped");
  if (add) {
    await vduse.attach();
    output.info(`${name}: ready, ${whereIs(vduse)}`);
  } else {
    output.info(`${name}: ready; put it on the vdpa bus: vdpa dev add name ${name} mgmtdev vduse`);
  }
  await Promise.race([aborted(signal), vduse.done]);
  await leaveBus(vduse, output);
}

function whereIs(vduse: VduseDevice): string {
  const { node, busDriver } = vduse.listing ?? {};
  if (node !== undefined) return node;
  return busDriver === undefined ? "without a driver: modprobe vhost_vdpa" : `taken by ${busDriver}`;
}

// A process that has the device open would be waited for inside the kernel: waited for here, it keeps being served.
async function leaveBus(vduse: VduseDevice, output: CliContext["output"]): Promise<void> {
  let told = "";
  for (;;) {
    const { listing } = vduse;
    if (listing === undefined) return;
    const holders = listing.node === undefined ? [] : findHolders(listing.node);
    if (holders.length === 0) break;
    const text = formatHolders(holders);
    if (text !== told) output.warn(`${vduse.name} is in use by ${text}: waiting for it (a second signal stops at once)`);
    told = text;
    await new Promise((resolve) => setTimeout(resolve, HOLDER_INTERVAL_MS));
  }
  await vduse.detach();
}
