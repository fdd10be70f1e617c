/**
 * DPDK's testpmd as a front-end: virtio-user on a vhost-user socket. What it sends comes from a file, and what it receives
 * goes to one, so that every byte can be compared and nobody sends without end.
 *
 * @module
 */
import { testpmdProgram } from "../../scripts/lab/host.ts";
import { decodePcap, encodePcap } from "./pcap.ts";
import { Process } from "./process.ts";
import { waitUntil } from "./wait.ts";

/** What the front-end negotiates. */
export interface VirtioUserOptions {
  folder: string;
  socket: string;
  packed?: boolean;
  inOrder?: boolean;
  mergeable?: boolean;
  /** What is sent by each {@linkcode VirtioUser.replay}; default: there is nothing to replay. */
  frames?: readonly Uint8Array[];
}

/** Counters of testpmd's port. */
export interface PortCounters {
  received: number;
  sent: number;
}

/** A running front-end. */
export class VirtioUser implements AsyncDisposable {
  private constructor(readonly process: Process, readonly received: string) {}

  /** Starts testpmd and waits for its prompt: the device is up then. */
  static async start(options: VirtioUserOptions): Promise<VirtioUser> {
    const program = await testpmdProgram(options.folder);
    const flag = (value: boolean | undefined) => value === true ? 1 : 0;
    const device = `net_virtio_user0,path=${options.socket},queues=1,packed_vq=${flag(options.packed)},in_order=${flag(options.inOrder)},` +
      `mrg_rxbuf=${flag(options.mergeable)}`;
    const [source, received] = [`${options.folder}/front.in.pcap`, `${options.folder}/front.out.pcap`];
    if (options.frames !== undefined) await Deno.writeFile(source, encodePcap(options.frames));
    const files = options.frames === undefined ? [] : [`--vdev=net_pcap0,rx_pcap=${source},tx_pcap=${received}`];
    const process = new Process(program.command, {
      name: "testpmd (virtio-user)",
      env: program.env,
      // deno-fmt-ignore
      args: [
        ...program.args, `--file-prefix=${options.socket.replace(/\W/g, "_")}_front`,
        `--vdev=${device}`, ...files,
        "--", "--total-num-mbufs=4096", "--no-flush-rx", "--forward-mode=io", "--interactive",
      ],
    });
    try {
      await process.stdout.wait(/testpmd> /, { partial: true });
      return new VirtioUser(process, received);
    } catch (error) {
      await process[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Types a command. */
  async command(text: string): Promise<void> {
    await this.process.write(`${text}\n`);
  }

  /** Sends the frames once; what comes back is collected anew. */
  async replay(): Promise<void> {
    // A port that starts opens both files again.
    await this.command("stop\nport stop 1\nport start 1\nstart");
  }

  /** The frames that came back since the last {@linkcode VirtioUser.replay}, once there are `count`. */
  async frames(count: number): Promise<Uint8Array[]> {
    return await waitUntil(`${count} frames`, async () => {
      const frames = decodePcap(await Deno.readFile(this.received));
      return frames.length >= count ? frames : undefined;
    });
  }

  /**
   * The port's counters. testpmd's output is a pipe, which it fills by 4 KiB at a time: asked often enough, an answer comes
   * through.
   */
  async counters(): Promise<PortCounters> {
    const { stdout } = this.process;
    const since = stdout.lines.length;
    await this.process.write("show port stats 0\n".repeat(16));
    const [, received] = await stdout.wait(/RX-packets: (\d+)/, { since });
    const [, sent] = await stdout.wait(/TX-packets: (\d+)/, { since });
    return { received: Number(received), sent: Number(sent) };
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
  }
}
