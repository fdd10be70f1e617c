/**
 * A network namespace with a bridge and taps on it, for devices on taps. It ends with its process.
 *
 * @module
 */
import { Process } from "./process.ts";

/** The bridge's address. */
export const BRIDGE_ADDRESS = "10.77.0.1";

/** A namespace; disposing it ends what holds it. */
export class NetSpace implements AsyncDisposable {
  private constructor(readonly process: Process, readonly pid: number) {}

  /** Makes taps `tap0`, `tap1`, … on one bridge. Needs root, `ip`, `unshare` and `nsenter`. */
  static async start(taps: number): Promise<NetSpace> {
    const script = ["ip link set lo up", "ip link add br0 type bridge", `ip addr add ${BRIDGE_ADDRESS}/24 dev br0`, "ip link set br0 up"];
    for (let i = 0; i < taps; i++) {
      script.push(`ip tuntap add tap${i} mode tap vnet_hdr`, `ip link set tap${i} master br0`, `ip link set tap${i} up`);
    }
    script.push("echo space $$", "exec sleep infinity");
    const process = new Process("unshare", { name: "network namespace", args: ["-n", "sh", "-ec", script.join("\n")] });
    try {
      const [, pid] = await process.stdout.wait(/^space (\d+)$/);
      return new NetSpace(process, Number(pid));
    } catch (error) {
      await process[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Words that run a program in it. */
  get enter(): string[] {
    return ["nsenter", "-t", String(this.pid), "-n"];
  }

  /** Runs a program in it. */
  run(name: string, words: readonly string[]): Process {
    const [program, ...args] = [...this.enter, ...words];
    return new Process(program!, { name, args });
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
  }
}
