/**
 * Two sides of a live migration: on each a storage daemon on the same image, a proxy that hides that it could log, a relay,
 * and a QEMU.
 *
 * @module
 */
import type { QemuVersion } from "../../scripts/lab/host.ts";
import { HideLogProxy } from "./hide_log_proxy.ts";
import type { Process } from "./process.ts";
import { RelayProcess } from "./relay_process.ts";
import { makeImage, startVm, storageDaemon, type Vm, type VmOptions } from "./vm.ts";

/** One host: everything but the guest. */
export class Side implements AsyncDisposable {
  private constructor(readonly daemon: Process, readonly proxy: HideLogProxy, readonly relay: RelayProcess, readonly folder: string) {}

  /** Starts daemon, proxy and relay. */
  static async start(
    qemu: QemuVersion,
    folder: string,
    name: string,
    image: string,
    relayArgs: string[] = [],
    iops?: number,
  ): Promise<Side> {
    await using stack = new AsyncDisposableStack();
    const [device, socket] = [`${folder}/${name}.device`, `${folder}/${name}.proxy`];
    const daemon = stack.use(
      await storageDaemon({ version: qemu, image, socket: device, ...(iops === undefined ? {} : { iops }) }),
    );
    const proxy = stack.use(new HideLogProxy(socket, device));
    const relay = stack.use(await RelayProcess.start({ folder, name, device: `unix:${socket}`, args: relayArgs }));
    const side = new Side(daemon, proxy, relay, folder);
    side.#stack = stack.move();
    return side;
  }

  #stack = new AsyncDisposableStack();

  /** Ends all of them. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}

/** Both hosts, one image. */
export class MigrationPair implements AsyncDisposable {
  private constructor(
    readonly qemu: QemuVersion,
    readonly folder: string,
    readonly image: string,
    readonly a: Side,
    readonly b: Side,
    readonly stack: AsyncDisposableStack,
  ) {}

  /** Starts both sides without guests. */
  static async start(qemu: QemuVersion, folder: string, options: { relayArgs?: string[]; iops?: number } = {}): Promise<MigrationPair> {
    await using stack = new AsyncDisposableStack();
    const image = await makeImage(`${folder}/disk.img`);
    const a = stack.use(await Side.start(qemu, folder, "a", image, options.relayArgs, options.iops));
    const b = stack.use(await Side.start(qemu, folder, "b", image, options.relayArgs, options.iops));
    return new MigrationPair(qemu, folder, image, a, b, stack.move());
  }

  /** A guest on one side. @param name names its sockets */
  async startGuest(side: Side, name: string, options: Partial<VmOptions> = {}): Promise<Vm> {
    return await startVm({
      qemu: this.qemu,
      folder: this.folder,
      name,
      disk: { socket: side.relay.front },
      run: "workload",
      workload: { report: 200 },
      ...options,
    });
  }

  /** Ends everything. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.stack.disposeAsync();
  }
}
