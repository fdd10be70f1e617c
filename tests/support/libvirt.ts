/**
 * Two libvirt daemons on one machine, without systemd: each in a mount namespace of its own, with its own directories and its
 * own host name.
 *
 * @module
 */
import { programInRoot } from "../../scripts/lab/apt.ts";
import { ensurePart, guest, qemuProgram, type QemuVersion, root } from "../../scripts/lab/host.ts";
import { LineLog, Process } from "./process.ts";
import { waitUntil } from "./wait.ts";

/** What each daemon sees in place of the machine's own directories. */
const BINDS = { run: "/run/libvirt", etc: "/etc/libvirt", lib: "/var/lib/libvirt", log: "/var/log/libvirt", cache: "/var/cache/libvirt" };

const DATA = "/usr/share/libvirt";

const QEMU_CONF = `security_driver = "none"
user = "root"
group = "root"
stdio_handler = "file"
cgroup_controllers = [ ]
namespaces = [ ]
dynamic_ownership = 0
`;

async function run(command: string, args: string[], timeoutMs = 120_000): Promise<string> {
  const child = new Deno.Command(command, { args, signal: AbortSignal.timeout(timeoutMs) });
  const { success, stdout, stderr } = await child.output();
  if (!success) throw new Error(`${command} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
  return new TextDecoder().decode(stdout);
}

/** Why libvirt cannot be had; undefined where it can. */
export async function libvirtMissing(): Promise<string | undefined> {
  if (Deno.uid() !== 0) return "root";
  const state = await ensurePart("libvirt");
  return state.ok ? undefined : `libvirt: ${state.reason}`;
}

/** A program of the lab's libvirt, with the words before its own; nothing of it is installed on this machine. */
async function program(path: string): Promise<string[]> {
  const { command, args } = programInRoot(await root("libvirt"), path);
  return [command, ...args];
}

/** A daemon. Inside, its folder `run` is /run/libvirt: domains find what they need there under the same name on both sides. */
export class Libvirt implements AsyncDisposable {
  private constructor(readonly name: string, readonly folder: string, readonly process: Process) {}

  /** Starts it. @param links names in /run/libvirt, and what they stand for */
  static async start(name: string, parent: string, links: Record<string, string>): Promise<Libvirt> {
    const folder = `${parent}/${name}`;
    for (const [ours, theirs] of Object.entries(BINDS)) {
      await Deno.mkdir(`${folder}/${ours}`, { recursive: true });
      await Deno.mkdir(theirs, { recursive: true });
    }
    for (const [link, target] of Object.entries(links)) await Deno.symlink(target, `${folder}/run/${link}`);
    await Deno.writeTextFile(`${folder}/etc/qemu.conf`, QEMU_CONF);
    const conf = `auth_unix_rw = "none"\nhost_uuid = "${crypto.randomUUID()}"\n`;
    await Deno.writeTextFile(`${folder}/etc/libvirtd.conf`, conf);
    const mounts = Object.entries(BINDS).map(([ours, theirs]) => `mount --bind ${folder}/${ours} ${theirs}`).join(" && ");
    const part = await root("libvirt");
    // Maps of processors and schemas, which it looks for where it was built for.
    await Deno.mkdir(DATA, { recursive: true });
    const data = `mount --bind ${part}${DATA} ${DATA}`;
    const drivers = `LIBVIRT_DRIVER_DIR=${part}/usr/lib/x86_64-linux-gnu/libvirt/connection-driver`;
    const libvirtd = (await program("sbin/libvirtd")).join(" ");
    const script =
      `hostname ${name} && ${mounts} && ${data} && exec env ${drivers} ${libvirtd} -p ${folder}/pid -f /etc/libvirt/libvirtd.conf`;
    const process = new Process("unshare", {
      name: `libvirtd ${name}`,
      args: ["-m", "-u", "--propagation", "private", "sh", "-c", script],
    });
    const libvirt = new Libvirt(name, folder, process);
    try {
      await waitUntil(`libvirtd ${name}`, async () => {
        if (process.ended) throw new Error(`libvirtd ended:\n${process.stderr.tail()}`);
        return await libvirt.virsh(["list"]).then(() => true, () => false);
      }, 60_000);
      return libvirt;
    } catch (error) {
      await libvirt[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Where clients connect. */
  get uri(): string {
    return `qemu+unix:///system?socket=${this.folder}/run/libvirt-sock`;
  }

  /** Runs virsh. @throws Error with what it said */
  async virsh(words: string[], timeoutMs?: number): Promise<string> {
    const [command, ...before] = await program("bin/virsh");
    return await run(command!, [...before, "-c", this.uri, ...words], timeoutMs);
  }

  /** A domain's serial line: what it says from now on, and a way to answer. */
  async serial(): Promise<Serial> {
    const path = `${this.folder}/run/serial`;
    const connection = await waitUntil("the serial line", () => Deno.connect({ transport: "unix", path }).catch(() => undefined), 30_000);
    return new Serial(this.name, connection);
  }

  /** Ends its domains, then it. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const name of (await this.virsh(["list", "--name"]).catch(() => "")).split("\n").filter((line) => line.trim() !== "")) {
      await this.virsh(["destroy", name.trim()]).catch(() => {});
    }
    this.process.kill("SIGTERM");
    await this.process[Symbol.asyncDispose]();
  }
}

/** A serial line that is a socket. */
export class Serial implements Disposable {
  /** What the guest wrote. */
  readonly log: LineLog;
  readonly #connection: Deno.Conn;

  /** Takes the connection over. */
  constructor(name: string, connection: Deno.Conn) {
    this.#connection = connection;
    this.log = new LineLog(`serial line at ${name}`, ReadableStream.from(untilClosed(connection)));
  }

  /** Types. */
  async send(text: string): Promise<void> {
    await this.#connection.write(new TextEncoder().encode(text));
  }

  /** Ends it. */
  [Symbol.dispose](): void {
    try {
      this.#connection.close();
    } catch { /* the guest's end ended it */ }
  }
}

async function* untilClosed(connection: Deno.Conn): AsyncGenerator<Uint8Array<ArrayBuffer>> {
  for (;;) {
    const bytes = new Uint8Array(4096);
    const count = await connection.read(bytes).catch(() => null);
    if (count === null) return;
    yield bytes.subarray(0, count);
  }
}

/** A script that starts a QEMU of the lab: what libvirt takes for the emulator. */
export async function emulator(folder: string, version: QemuVersion): Promise<string> {
  const { command, args, env = {} } = await qemuProgram(version, "qemu-system-x86_64");
  const path = `${folder}/qemu-${version}`;
  const exports = Object.entries(env).map(([name, value]) => `export ${name}='${value}'\n`).join("");
  await Deno.writeTextFile(path, `#!/bin/sh\n${exports}exec ${[command, ...args].map((word) => `'${word}'`).join(" ")} "$@"\n`, {
    mode: 0o755,
  });
  return path;
}

/** A domain with a vhost-user disk at /run/libvirt/disk and an interface at /run/libvirt/net. */
export async function domainXml(name: string, emulatorPath: string, workload: string): Promise<string> {
  const { kernel, initramfs } = await guest();
  const append =
    `console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check svq.run=workload svq.modules=disk,net svq.args=${workload}`;
  return `<domain type='qemu'>
  <name>${name}</name>
  <memory unit='MiB'>256</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu><features><acpi/></features>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>${kernel}</kernel><initrd>${initramfs}</initrd><cmdline>${append}</cmdline></os>
  <cpu mode='custom' match='exact' check='none'><model fallback='allow'>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>${emulatorPath}</emulator>
    <disk type='vhostuser' device='disk' snapshot='no'>
      <driver name='qemu' type='raw'/>
      <source type='unix' path='/run/libvirt/disk'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='vhostuser'>
      <mac address='52:54:00:00:00:01'/>
      <source type='unix' path='/run/libvirt/net' mode='client'><reconnect enabled='yes' timeout='1'/></source>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <serial type='unix'><source mode='bind' path='/run/libvirt/serial'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
`;
}
