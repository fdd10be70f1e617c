/**
 * Starts the lab VM. A kernel needs many seconds to boot under emulation, so that is done once for each kind of machine: init waits
 * before it mounts anything (a mounted 9p share cannot be saved), the machine is saved there, and each run goes on from that.
 * Guest memory is a file which runs map privately, so loading it costs nothing.
 *
 * @module
 */
import { SvqError } from "../../src/errors.ts";
import { exists, locked } from "./cache.ts";
import type { LabVm } from "./vm_build.ts";

/** virtio PCI devices behind an emulated IOMMU, for vp_vdpa: `lab-vp 05 NAME` (blk) and `lab-vp 06 NAME` (net) make them vDPA
 * devices; `lab-qmp COMMAND [JSON]` speaks to the QEMU that has them. */
export interface VpDevices {
  /** A 64 MiB disk at PCI 0000:00:05.0. */
  blk?: boolean;
  /** A network card at PCI 0000:00:06.0; DHCP answers on it. */
  net?: boolean;
  /** Another network card, at PCI 0000:00:08.0, on a network of its own. */
  secondNet?: boolean;
  /** Offer packed rings (default false). */
  packed?: boolean;
  /** Address bits of the IOMMU: 39 or 48 (default 39). */
  addressBits?: 39 | 48;
  /** One page per doorbell, so that doorbells can be mapped (default true). */
  pagePerQueue?: boolean;
}

/** What decides which saved machine fits. */
export interface Machine {
  /** Memory of the VM. */
  memoryMiB: number;
  /** An IOMMU and devices behind it. */
  vp?: VpDevices | undefined;
}

/** Directories of the host that the VM sees. */
export interface Shares {
  /** The run's own, writable. */
  lab: string;
  /** The checkout. */
  checkout: string;
  /** The directory that the Deno binary is in. */
  denohome: string;
  /** Deno's cache. */
  denodir: string;
}

/** How one start of the VM ended. */
export interface Outcome {
  /** Until the start script ran; null when it never did. */
  bootMs: number | null;
  /** It was killed at a deadline. */
  killed: boolean;
  /** It was killed because it stood still: nothing in it ran any more, not even its clock. */
  stalled: boolean;
  /** The serial console, and what QEMU said. */
  console: string;
}

/** Time limits of a start, in ms. */
export interface Deadlines {
  /** Until the start script runs. */
  bootMs: number;
  /** From then on. */
  commandMs: number;
  /** How long the VM may give no sign of life then. */
  stallMs: number;
}

/** The file in the VM's folder /lab that changes as long as the VM runs. */
export const ALIVE = "alive";

const READY = "LAB-READY";
const BOOTED = "LAB-BOOTED";
const DISK_BYTES = 64 << 20;
/**
 * Without what makes an emulated processor slower: byte-wise string instructions where the kernel and libc would use wide moves,
 * a fifth level of page tables, and checks at each entry into the kernel.
 */
const CPU = "max,erms=off,fsrm=off,fsrs=off,la57=off,smap=off,smep=off,pku=off";

/** Runs the VM to its end, from a saved machine where `saved` is given. */
export async function runMachine(vm: LabVm, machine: Machine, shares: Shares, deadlines: Deadlines, saved?: string): Promise<Outcome> {
  if (machine.vp?.blk) await makeDisk(shares.lab);
  const started = performance.now();
  using listener = saved === undefined ? null : listen(shares.lab);
  const memory = saved === undefined
    ? []
    : [...memoryArguments(machine, saved, false), ...monitorArguments(shares.lab), "-incoming", "defer"];
  using qemu = new Qemu(vm, [...machineArguments(vm, machine, shares), ...memory]);
  qemu.deadline(deadlines.bootMs);
  // A QEMU that cannot load does not run, and the deadline would be waited for.
  if (listener) load(listener, `${saved}/state`).catch(() => qemu.kill());
  let bootMs: number | null = null;
  let stalled = false;
  using life = new LifeSigns(`${shares.lab}/${ALIVE}`, deadlines.stallMs, () => {
    stalled = true;
    qemu.kill();
  });
  let answered = 0;
  for await (const text of qemu.output()) {
    const asked = text.split(READY).length - 1;
    // Asked again where the answer came too early for the machine to hear it.
    if (bootMs === null && asked > answered) {
      answered = asked;
      await qemu.type("go\n");
    }
    if (bootMs === null && text.includes(BOOTED)) {
      bootMs = performance.now() - started;
      qemu.deadline(deadlines.commandMs);
      life.watch();
    }
  }
  return { bootMs, killed: qemu.killed, stalled, console: await qemu.end() };
}

/** Watches a file that the VM writes to every second. */
class LifeSigns implements Disposable {
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(readonly path: string, readonly stallMs: number, readonly onStall: () => void) {}

  watch(): void {
    let seen = "";
    let since = performance.now();
    this.#timer = setInterval(() => {
      const now = exists(this.path) ? Deno.readTextFileSync(this.path) : "";
      if (now !== seen) {
        seen = now;
        since = performance.now();
      } else if (performance.now() - since > this.stallMs) {
        clearInterval(this.#timer);
        this.onStall();
      }
    }, 1000);
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }
}

/**
 * The directory of the saved machine, made now when it is not there. One caller makes it, the others wait.
 *
 * @throws SvqError `LAB_BOOT` when the machine does not get to its waiting point in `bootMs`
 */
export async function savedMachine(vm: LabVm, machine: Machine, bootMs: number): Promise<string> {
  const shares: Shares = { lab: vm.folder, checkout: vm.folder, denohome: vm.folder, denodir: vm.folder };
  const key = new TextEncoder().encode(JSON.stringify([machine, machineArguments(vm, machine, shares)]));
  const name = new Uint8Array(await crypto.subtle.digest("SHA-256", key)).slice(0, 8).toHex();
  const directory = `${vm.folder}/saved/${name}`;
  if (exists(directory)) return directory;
  return await locked("vm-saved", async () => {
    if (!exists(directory)) await makeSaved(vm, machine, directory, bootMs);
    return directory;
  });
}

async function makeSaved(vm: LabVm, machine: Machine, directory: string, bootMs: number): Promise<void> {
  const temporary = `${vm.folder}/saving`;
  // Whoever left one behind is gone: the lock is ours.
  if (exists(temporary)) await Deno.remove(temporary, { recursive: true });
  await Deno.mkdir(temporary);
  await Deno.mkdir(`${vm.folder}/saved`, { recursive: true });
  if (machine.vp?.blk) await makeDisk(temporary);
  using listener = listen(temporary);
  const shares: Shares = { lab: temporary, checkout: vm.folder, denohome: vm.folder, denodir: vm.folder };
  using qemu = new Qemu(vm, [
    ...machineArguments(vm, machine, shares),
    ...memoryArguments(machine, temporary, true),
    ...monitorArguments(temporary),
  ]);
  qemu.deadline(bootMs);
  let saved = false;
  for await (const text of qemu.output()) {
    if (saved || !text.includes(READY)) continue;
    saved = true;
    await save(listener, `${temporary}/state`);
  }
  const console = await qemu.end();
  if (!saved || qemu.killed) throw new SvqError("LAB_BOOT", `The lab VM did not boot: ${console.slice(-2000)}`);
  await Deno.rename(temporary, directory);
}

/** Lets a QEMU that was started with memory in a file skip that memory when it is saved or loaded. */
const SKIP_MEMORY = { capabilities: [{ capability: "x-ignore-shared", state: true }] };

/** Saves a machine and ends its QEMU. */
async function save(listener: Deno.UnixListener, path: string): Promise<void> {
  using monitor = await Monitor.accept(listener);
  await monitor.ask("migrate-set-capabilities", SKIP_MEMORY);
  await monitor.ask("migrate", { uri: `file:${path}` });
  for (let status: string | undefined = "setup"; status !== "completed";) {
    ({ status } = await monitor.ask("query-migrate"));
    if (status === "failed" || status === "cancelled") throw new SvqError("LAB_BOOT", `Saving the lab VM ended as ${status}`);
  }
  await monitor.ask("quit");
}

/** Loads a saved machine, which runs from then on. */
async function load(listener: Deno.UnixListener, path: string): Promise<void> {
  using monitor = await Monitor.accept(listener);
  await monitor.ask("migrate-set-capabilities", SKIP_MEMORY);
  await monitor.ask("migrate-incoming", { uri: `file:${path}` });
}

/** QMP, as far as saving and loading need it. QEMU connects to us, so that nobody waits for a socket to appear. */
class Monitor implements Disposable {
  readonly #connection: Deno.UnixConn;
  readonly #pieces: AsyncIterator<string>;
  #pending = "";

  private constructor(connection: Deno.UnixConn) {
    this.#connection = connection;
    this.#pieces = connection.readable.pipeThrough(new TextDecoderStream())[Symbol.asyncIterator]();
  }

  static async accept(listener: Deno.UnixListener): Promise<Monitor> {
    const monitor = new Monitor(await listener.accept());
    await monitor.ask("qmp_capabilities");
    return monitor;
  }

  async ask(execute: string, args: Record<string, unknown> = {}): Promise<{ status?: string }> {
    await this.#connection.write(new TextEncoder().encode(JSON.stringify({ execute, arguments: args }) + "\n"));
    for (;;) {
      for (let end = this.#pending.indexOf("\n"); end >= 0; end = this.#pending.indexOf("\n")) {
        const message = JSON.parse(this.#pending.slice(0, end));
        this.#pending = this.#pending.slice(end + 1);
        if (message.error) throw new SvqError("LAB_BOOT", `QEMU refused ${execute}: ${message.error.desc}`);
        if (message.return) return message.return;
      }
      const { value, done } = await this.#pieces.next();
      if (done) throw new SvqError("LAB_BOOT", `QEMU went away during ${execute}`);
      this.#pending += value;
    }
  }

  [Symbol.dispose](): void {
    this.#connection.close();
  }
}

/** A running QEMU: the VM's own, under its own loader, so that nothing needs to be installed on the host. */
class Qemu implements Disposable {
  readonly #child: Deno.ChildProcess;
  readonly #errors: Promise<string>;
  readonly #input: WritableStreamDefaultWriter<Uint8Array>;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #console = "";
  #running = true;
  killed = false;

  constructor(vm: LabVm, args: readonly string[]) {
    const libraries = `${vm.root}/usr/lib/x86_64-linux-gnu`;
    this.#child = new Deno.Command(`${vm.root}/usr/lib64/ld-linux-x86-64.so.2`, {
      args: ["--library-path", libraries, `${vm.root}/usr/bin/qemu-system-x86_64`, ...args],
      env: { QEMU_MODULE_DIR: `${libraries}/qemu` },
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#errors = new Response(this.#child.stderr).text();
    this.#input = this.#child.stdin.getWriter();
  }

  /** Everything the console has said so far, each time that it says more; ends with QEMU. */
  async *output(): AsyncGenerator<string> {
    for await (const text of this.#child.stdout.pipeThrough(new TextDecoderStream())) {
      this.#console += text;
      yield this.#console;
    }
  }

  async type(text: string): Promise<void> {
    await this.#input.write(new TextEncoder().encode(text)).catch(() => {});
  }

  /** Kills it so many ms from now; replaces the deadline before. */
  deadline(ms: number): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.killed = true;
      this.kill();
    }, ms);
  }

  /** Waits for its end. */
  async end(): Promise<string> {
    await this.#child.status;
    this.#running = false;
    await this.#input.close().catch(() => {});
    return this.#console + await this.#errors;
  }

  kill(): void {
    if (this.#running) this.#child.kill("SIGKILL");
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
    this.kill();
  }
}

async function makeDisk(directory: string): Promise<void> {
  using disk = await Deno.open(`${directory}/vp.img`, { create: true, write: true });
  await disk.truncate(DISK_BYTES);
}

/** Memory in a file: shared while the machine is saved, so that it is not part of the stream; private for each run. */
function memoryArguments(machine: Machine, directory: string, shared: boolean): string[] {
  const size = `${machine.memoryMiB}M`;
  return [
    ...["-object", `memory-backend-file,id=ram,size=${size},mem-path=${directory}/ram,share=${shared ? "on" : "off"}`],
    ...["-machine", "memory-backend=ram"],
  ];
}

function listen(directory: string): Deno.UnixListener {
  return Deno.listen({ transport: "unix", path: `${directory}/monitor` });
}

function monitorArguments(directory: string): string[] {
  return ["-qmp", `unix:${directory}/monitor`];
}

function machineArguments(vm: LabVm, machine: Machine, shares: Shares): string[] {
  const share = (tag: string, path: string, readonly: boolean) => [
    "-fsdev",
    `local,id=${tag},path=${path.replaceAll(",", ",,")},security_model=none,multidevs=remap${readonly ? ",readonly=on" : ""}`,
    "-device",
    `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`,
  ];
  const kernelCommandLine = [
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr nowatchdog audit=0 init_on_alloc=0 cryptomgr.notests",
    machine.vp ? "intel_iommu=on" : "",
  ].join(" ");
  return [
    ...["-L", `${vm.root}/usr/share/qemu`, "-L", `${vm.root}/usr/share/seabios`],
    ...["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"],
    // One CPU: two oopsed now and then under emulation.
    ...["-M", "q35", "-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", String(machine.memoryMiB)],
    ...["-kernel", vm.kernel, "-initrd", vm.initramfs, "-append", kernelCommandLine],
    ...vpArguments(shares.lab, machine.vp),
    ...share("root", vm.root, true),
    ...share("lab", shares.lab, false),
    ...share("checkout", shares.checkout, true),
    ...share("denohome", shares.denohome, true),
    ...share("denodir", shares.denodir, true),
  ];
}

function vpArguments(directory: string, vp: VpDevices | undefined): string[] {
  if (!vp) return [];
  const packed = vp.packed ? "on" : "off";
  const doorbells = vp.pagePerQueue === false ? "off" : "on";
  const common = `iommu_platform=on,disable-legacy=on,page-per-vq=${doorbells},packed=${packed}`;
  const monitor = `${directory}/qmp`;
  const args = ["-device", `intel-iommu,intremap=on,caching-mode=on,aw-bits=${vp.addressBits ?? 39}`];
  // The VM can speak to its own QEMU: both ends of the monitor's socket are in that process.
  args.push("-chardev", `socket,id=qmp,path=${monitor},server=on,wait=off`, "-mon", "chardev=qmp,mode=control");
  args.push("-chardev", `socket,id=qmpend,path=${monitor}`);
  args.push("-device", "virtio-serial-pci,addr=7", "-device", "virtserialport,chardev=qmpend,name=qmp");
  if (vp.blk) {
    args.push("-drive", `if=none,id=vpdisk,format=raw,file=${directory}/vp.img`);
    args.push("-device", `virtio-blk-pci,id=vpblk,drive=vpdisk,addr=5,${common}`);
  }
  if (vp.net) {
    args.push("-netdev", "user,id=vpnet,restrict=on", "-device", `virtio-net-pci,netdev=vpnet,addr=6,romfile=,${common}`);
  }
  if (vp.secondNet) {
    args.push("-netdev", "user,id=vpnet2,restrict=on", "-device", `virtio-net-pci,netdev=vpnet2,addr=8,romfile=,${common}`);
  }
  return args;
}
