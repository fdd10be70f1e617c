/**
 * Device daemons besides the storage daemon and testpmd: virtiofsd and passt.
 *
 * @module
 */
import { passtProgram, virtiofsdProgram, vsockProgram } from "../../scripts/lab/host.ts";
import { Process } from "./process.ts";
import { waitUntil } from "./wait.ts";

async function waitSocket(process: Process, socket: string): Promise<void> {
  await waitUntil(`${process.name} to listen`, () => {
    if (process.ended) throw new Error(`${process.name} ended at once:\n${process.stderr.tail()}`);
    try {
      return Deno.lstatSync(socket).isSocket === true;
    } catch {
      return false;
    }
  });
}

/** Starts virtiofsd for a folder; it ends when its front-end leaves. */
export async function startVirtiofsd(socket: string, folder: string, extraArgs: string[] = []): Promise<Process> {
  const program = await virtiofsdProgram();
  await Deno.remove(socket).catch(() => {});
  const process = new Process(program.command, {
    name: "virtiofsd",
    env: program.env,
    args: [...program.args, `--socket-path=${socket}`, `--shared-dir=${folder}`, "--sandbox=none", "--seccomp=none", ...extraArgs],
  });
  try {
    await waitSocket(process, socket);
    return process;
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** passt in a network namespace of its own, in which TCP port 7777 of the loopback interface echoes. */
export interface Passt {
  /** It and its namespace end with it. */
  process: Process;
  /** The address by which the guest reaches the namespace's loopback. */
  gateway: string;
  /** What the guest gets. */
  address: string;
}

/** Starts passt. Needs root, `ip` and `unshare`. */
export async function startPasst(socket: string, echo: string): Promise<Passt> {
  const program = await passtProgram();
  const words = [program.command, ...program.args, "--vhost-user", "-f", "-s", socket, "--runas", "0", "-t", "none", "-u", "none"];
  const script = [
    "ip link set lo up",
    "ip tuntap add dev up0 mode tap",
    "ip addr add 192.0.2.2/24 dev up0",
    "ip link set up0 up",
    "ip route add default via 192.0.2.1",
    `${echo} &`,
    "trap 'kill %1' EXIT",
    `exec ${words.map((word) => `'${word}'`).join(" ")}`,
  ].join("\n");
  const process = new Process("unshare", {
    name: "passt",
    env: program.env,
    args: ["-n", "-p", "-f", "--kill-child", "sh", "-ec", script],
  });
  try {
    await waitSocket(process, socket);
    return { process, gateway: "192.0.2.1", address: "192.0.2.2" };
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/**
 * Starts vhost-device-vsock: a guest's connection to port P of the host ends in the unix socket `${uds}_P`.
 *
 * @param cid the guest's address
 */
export async function startVsock(socket: string, uds: string, cid: number): Promise<Process> {
  const program = await vsockProgram();
  const process = new Process(program.command, {
    name: "vhost-device-vsock",
    env: program.env,
    args: [...program.args, "--vm", `guest-cid=${cid},socket=${socket},uds-path=${uds}`],
  });
  try {
    await waitSocket(process, socket);
    return process;
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** So many looks in a row, 10 ms apart, at which a thread has not run. */
const RESTING_LOOKS = 5;

/**
 * Waits until the thread of the rings of vhost-device-vsock sleeps: what the last data brought about (credit, the end of a flush) is
 * done. An event that meets a stopped ring ends that thread for good, with QEMU alone just the same.
 *
 * @throws Error when it has ended
 */
export async function vsockRests(daemon: Process): Promise<void> {
  const tasks = `/proc/${daemon.pid}/task`;
  let [last, looks] = ["", 0];
  await waitUntil("vhost-device-vsock to come to rest", () => {
    const status = Array.from(Deno.readDirSync(tasks), ({ name }) => Deno.readTextFileSync(`${tasks}/${name}/status`))
      .find((text) => text.startsWith("Name:\tvring_worker\n"));
    if (status === undefined) throw new Error("vhost-device-vsock has lost the thread of its rings");
    const switches = /^voluntary_ctxt_switches:.*$/m.exec(status)![0];
    looks = switches === last && /^State:\tS/m.test(status) ? looks + 1 : 0;
    last = switches;
    return looks >= RESTING_LOOKS;
  });
}

/** A listener that sends back what it gets, until it is closed. */
export function echoOn(path: string): Deno.Listener {
  const listener = Deno.listen({ transport: "unix", path });
  (async () => {
    for await (const connection of listener) connection.readable.pipeTo(connection.writable).catch(() => {});
  })().catch(() => {});
  return listener;
}
