/**
 * DPDK's testpmd as a front-end: virtio-user on a vhost-user socket.
 *
 * @module
 */
import { testpmdProgram } from "../../scripts/lab/host.ts";
import { Process } from "./process.ts";

/** What the front-end negotiates. */
export interface VirtioUserOptions {
  folder: string;
  socket: string;
  packed?: boolean;
  inOrder?: boolean;
  mergeable?: boolean;
}

/** Counters of testpmd's port. */
export interface PortCounters {
  received: number;
  sent: number;
}

/** A running front-end. */
export class VirtioUser implements AsyncDisposable {
  private constructor(readonly process: Process) {}

  /** Starts testpmd and waits for its prompt: the device is up then. */
  static async start(options: VirtioUserOptions): Promise<VirtioUser> {
    const program = await testpmdProgram(options.folder);
    const flag = (value: boolean | undefined) => value === true ? 1 : 0;
    const device = `net_virtio_user0,path=${options.socket},queues=1,packed_vq=${flag(options.packed)},in_order=${flag(options.inOrder)},` +
      `mrg_rxbuf=${flag(options.mergeable)}`;
    const process = new Process(program.command, {
      name: "testpmd (virtio-user)",
      env: program.env,
      // deno-fmt-ignore
      args: [
        ...program.args, `--file-prefix=${options.socket.replace(/\W/g, "_")}_front`, `--vdev=${device}`,
        "--", "--total-num-mbufs=8192", "--forward-mode=io", "--interactive",
      ],
    });
    try {
      await process.stdout.wait(/testpmd> /, { partial: true });
      return new VirtioUser(process);
    } catch (error) {
      await process[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Types a command. */
  async command(text: string): Promise<void> {
    await this.process.write(`${text}\n`);
  }

  /**
   * The port's counters. testpmd's output is a pipe, which it fills by 4 KiB at a time: asked often enough, an answer comes
   * through.
   */
  async counters(): Promise<PortCounters> {
    const { stdout } = this.process;
    const since = stdout.lines.length;
    const asked = "show port stats 0\n".repeat(16);
    await this.process.write(asked);
    const [, received] = await stdout.wait(/RX-packets: (\d+)/, { since });
    const [, sent] = await stdout.wait(/TX-packets: (\d+)/, { since });
    return { received: Number(received), sent: Number(sent) };
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
  }
}
