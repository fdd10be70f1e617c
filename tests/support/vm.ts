/**
 * Guests under QEMU (TCG) with vhost-user devices, and the storage daemons behind them.
 *
 * @module
 */
import { guest, qemuProgram, type QemuVersion, testpmdProgram } from "../../scripts/lab/host.ts";
import { QmpClient } from "../../src/migration/qmp.ts";
import { type LineLog, Process, type WaitOptions } from "./process.ts";
import { waitUntil } from "./wait.ts";

/** A vhost-user-blk disk of a guest. */
export interface DiskOptions {
  socket: string;
  /** Default 1. */
  queues?: number;
  queueSize?: number;
  /** QEMU connects again when the back-end goes away. */
  reconnect?: boolean;
  /** More properties of the device, e.g. `packed=on`. */
  properties?: string;
}

/** A virtio-net card over vhost-user. */
export interface NetOptions {
  socket: string;
  /** QEMU listens and the back-end connects. */
  server?: boolean;
  queues?: number;
  mac?: string;
  reconnect?: boolean;
  /** More properties of the device, e.g. `packed=on`. */
  properties?: string;
}

/** What a guest consists of and runs. */
export interface VmOptions {
  qemu: QemuVersion;
  /** Folder of its sockets; several guests may share it. */
  folder: string;
  /** Names its sockets and its messages; default `vm`. */
  name?: string;
  /** Default 256. */
  memMiB?: number;
  /** A file for its memory; default: a memfd. */
  memoryFile?: string;
  /** Default 1. */
  cpus?: number;
  disk?: DiskOptions;
  nets?: NetOptions[];
  /** What /init does: the checked disk workload, or a shell on the serial line (default). */
  run?: "workload" | "shell";
  /** Arguments of the workload, e.g. `{ mode: "mixed", depth: 16, ops: 1000 }`. */
  workload?: Record<string, string | number>;
  /** Module lists to load besides the virtio bus: disk, net, fs, console; default what the devices need. */
  modules?: string[];
  /** A shell after the workload instead of power off. */
  stay?: boolean;
  /** A reset starts the guest anew instead of ending QEMU. */
  reboot?: boolean;
  /** Words that run a program where this QEMU is to run: in a network namespace. */
  within?: readonly string[];
  /** `-incoming` URI: this guest is a migration's destination. */
  incoming?: string;
  /** Created stopped (`-S`): as a destination it stays stopped after the migration. */
  paused?: boolean;
  /** More of the kernel's command line. */
  append?: string;
  /** More of QEMU's arguments. */
  extraArgs?: string[];
}

/** One report of the checked workload. */
export interface Heartbeat {
  ops: number;
  errors: number;
  maxms: number;
  gen: number;
  /** All numbers of the line by name. */
  all: Record<string, number>;
  /** When it arrived here (performance.now()). */
  atMs: number;
}

/** The last line of the checked workload. */
export interface WorkloadResult {
  ok: boolean;
  line: string;
  /** Covers every block's number and generation. */
  digest: string;
  ops: number;
  errors: number;
  maxms: number;
  /** The lines that name errors, at most 20. */
  errorLines: string[];
}

function numbersOf(line: string): Record<string, number> {
  return Object.fromEntries(Array.from(line.matchAll(/(\w+)=(\d+)\b/g), ([, name, value]) => [name!, Number(value)]));
}

function reconnectOption(version: QemuVersion, wanted: boolean | undefined): string {
  if (wanted !== true) return "";
  return version === "10" ? ",reconnect-ms=100" : ",reconnect=1";
}

function deviceArgs(options: VmOptions): string[] {
  const args: string[] = [];
  const extra = (properties: string | undefined) => properties === undefined ? "" : `,${properties}`;
  const { disk, nets = [], qemu } = options;
  if (disk !== undefined) {
    const size = disk.queueSize === undefined ? "" : `,queue-size=${disk.queueSize}`;
    args.push("-chardev", `socket,id=disk0,path=${disk.socket}${reconnectOption(qemu, disk.reconnect)}`);
    args.push("-device", `vhost-user-blk-pci,id=vd0,chardev=disk0,num-queues=${disk.queues ?? 1}${size}${extra(disk.properties)}`);
  }
  nets.forEach((net, i) => {
    const server = net.server === true ? ",server=on" : "";
    const queues = net.queues ?? 1;
    // QEMU 7.2 crashes under TCG with vhost-user-net and MSI-X.
    const vectors = qemu === "7.2" ? ",vectors=0" : "";
    args.push("-chardev", `socket,id=net${i},path=${net.socket}${server}${reconnectOption(qemu, net.reconnect)}`);
    args.push("-netdev", `vhost-user,id=nd${i},chardev=net${i},queues=${queues}`);
    args.push(
      "-device",
      `virtio-net-pci,id=nic${i},netdev=nd${i},romfile=,mq=${queues > 1 ? "on" : "off"},mac=${
        net.mac ?? `52:54:00:00:00:0${i + 1}`
      }${vectors}${extra(net.properties)}`,
    );
  });
  return args;
}

function kernelCommandLine(options: VmOptions): string {
  const modules = options.modules ??
    [options.disk === undefined ? "" : "disk", options.nets === undefined ? "" : "net"].filter((name) => name !== "");
  const workload = Object.entries(options.workload ?? {}).map(([name, value]) => `${name}=${value}`).join(",");
  return [
    // On a loaded host TCG delivers the timer too late for the kernel's check of it, which panics then.
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check",
    `svq.run=${options.run ?? "shell"}`,
    `svq.modules=${modules.join(",")}`,
    workload === "" ? "" : `svq.args=${workload}`,
    options.stay === true ? "svq.end=stay" : "",
    options.append ?? "",
  ].filter((word) => word !== "").join(" ");
}

/** How long a guest may take to boot: seconds of processor time, of which a busy machine gives little. */
const BOOT_MS = 240_000;

/** A running guest. Disposing it kills QEMU. */
export class Vm implements AsyncDisposable {
  readonly process: Process;
  readonly qmp: QmpClient;
  /** Path of a second monitor for whoever else drives this QEMU. */
  readonly qmpSocket: string;
  #commands = 0;

  /** Made by {@linkcode startVm}. */
  constructor(process: Process, qmp: QmpClient, qmpSocket: string) {
    this.process = process;
    this.qmp = qmp;
    this.qmpSocket = qmpSocket;
  }

  /** What the guest wrote to its serial line. */
  get serial(): LineLog {
    return this.process.stdout;
  }

  /** Waits for a line on the serial line. */
  waitSerial(pattern: RegExp, options: WaitOptions = {}): Promise<RegExpExecArray> {
    return this.serial.wait(pattern, options);
  }

  /** Types on the serial line. */
  send(text: string): Promise<void> {
    return this.process.write(text);
  }

  /** Runs a command in the guest's shell (`run: "shell"`). @returns what it wrote. @throws Error when it fails */
  async shell(command: string, timeoutMs?: number): Promise<string> {
    if (this.#commands === 0) await this.waitSerial(/^GUEST up /, { timeoutMs: BOOT_MS });
    const [since, mark] = [this.serial.lines.length, `MARK${++this.#commands}`];
    await this.send(`echo ${mark}; ${command}; echo ${mark} $?\n`);
    const [, code] = await this.waitSerial(new RegExp(`^${mark} (\\d+)$`), timeoutMs === undefined ? { since } : { since, timeoutMs });
    const lines = this.serial.lines.slice(since).map(({ text }) => text);
    const output = lines.slice(lines.indexOf(mark) + 1, lines.findIndex((line) => line.startsWith(`${mark} `))).join("\n");
    if (code !== "0") throw new Error(`In the guest, ${command} ended with ${code}:\n${output}`);
    return output;
  }

  /** Waits until the workload has filled the disk and goes on (after line `since`: it starts again with the guest). */
  async waitReady(timeoutMs: number = BOOT_MS, since = 0): Promise<void> {
    const match = await this.waitSerial(/SVQ READY .*errors=(\d+)|SVQ DONE FAILED.*|GUEST workload ended/, { timeoutMs, since });
    if (match[1] !== "0") throw new Error(`The workload did not start well:\n${this.serial.tail()}`);
  }

  /** Waits for the next report of the workload (from now on). */
  async nextHeartbeat(options: WaitOptions = {}): Promise<Heartbeat> {
    const since = options.since ?? this.serial.lines.length;
    await this.waitSerial(/^SVQ ops=.* ms=\d+$/, { ...options, since });
    return this.heartbeats(since).at(-1)!;
  }

  /** A report with more requests done than in `before`: the workload goes on. On a busy machine one report may be as the one before it. */
  async progress(before: Heartbeat): Promise<Heartbeat> {
    const deadline = performance.now() + 30_000;
    for (;;) {
      const now = await this.nextHeartbeat();
      if (now.ops > before.ops) return now;
      if (performance.now() > deadline) throw new Error(`The workload stands still at ${now.ops} requests`);
    }
  }

  /** All reports of the workload, from line `since` on. */
  heartbeats(since = 0): Heartbeat[] {
    return this.serial.lines.slice(since).filter((line) => line.text.startsWith("SVQ ops=")).map((line) => {
      const all = numbersOf(line.text);
      return { ops: all.ops!, errors: all.errors!, maxms: all.maxms!, gen: all.gen!, all, atMs: line.atMs };
    });
  }

  /** Tells the workload to stop (unless `ends` on its own) and returns the outcome of its full verification. */
  async finishWorkload(options: { ends?: boolean; timeoutMs?: number; since?: number } = {}): Promise<WorkloadResult> {
    if (options.ends !== true) await this.send("stop\n");
    const { timeoutMs, since = 0 } = options;
    const [line] = await this.waitSerial(/^SVQ DONE .*$/, timeoutMs === undefined ? { since } : { timeoutMs, since });
    return workloadResult(line, this.serial);
  }

  /** A path that opens the guest's RAM (its memfd), for as long as QEMU runs. */
  memoryPath(): string {
    const folder = `/proc/${this.process.pid}/fd`;
    for (const entry of Deno.readDirSync(folder)) {
      try {
        if (Deno.readLinkSync(`${folder}/${entry.name}`).startsWith("/memfd:memory-backend-memfd")) return `${folder}/${entry.name}`;
      } catch { /* closed meanwhile */ }
    }
    throw new Error("QEMU holds no memfd");
  }

  /** Kills QEMU. */
  kill(): void {
    this.process.kill();
  }

  /** Kills QEMU and waits for its end. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.qmp.close();
    await this.process[Symbol.asyncDispose]();
  }
}

function workloadResult(line: string, log: LineLog): WorkloadResult {
  const numbers = numbersOf(line.replace(/digest=\w+/, ""));
  return {
    ok: line.startsWith("SVQ DONE ok "),
    line,
    digest: /digest=(\w+)/.exec(line)?.[1] ?? "",
    ops: numbers.ops ?? 0,
    errors: numbers.errors ?? 0,
    maxms: numbers.maxms ?? 0,
    errorLines: log.lines.map(({ text }) => text).filter((text) => text.startsWith("SVQ ERROR")),
  };
}

/** Starts a guest and connects to its monitor. @throws Error with what QEMU wrote when it ends at once */
export async function startVm(options: VmOptions): Promise<Vm> {
  const name = options.name ?? "vm";
  const program = await qemuProgram(options.qemu, "qemu-system-x86_64");
  const image = await guest();
  const mib = options.memMiB ?? 256;
  const socket = (kind: string) => `${options.folder}/${name}.${kind}`;
  const backend = options.memoryFile === undefined ? "memory-backend-memfd" : `memory-backend-file,mem-path=${options.memoryFile}`;
  const [command, ...before] = [...options.within ?? [], program.command];
  const process = new Process(command!, {
    name: `QEMU ${options.qemu} (${name})`,
    env: program.env,
    // deno-fmt-ignore
    args: [
      ...before, ...program.args,
      "-name", name, "-accel", "tcg", "-cpu", "qemu64", "-smp", String(options.cpus ?? 1), "-m", String(mib),
      "-object", `${backend},id=m,size=${mib}M,share=on`, "-machine", "q35,memory-backend=m,hpet=off",
      "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", ...(options.reboot === true ? [] : ["-no-reboot"]),
      "-qmp", `unix:${socket("qmp")},server=on,wait=off`, "-qmp", `unix:${socket("qmp2")},server=on,wait=off`,
      "-kernel", image.kernel, "-initrd", image.initramfs, "-append", kernelCommandLine(options),
      ...deviceArgs(options),
      ...(options.incoming === undefined ? [] : ["-incoming", options.incoming]),
      ...(options.paused === true ? ["-S"] : []),
      ...(options.extraArgs ?? []),
    ],
  });
  try {
    const qmp = await waitUntil(`the monitor of ${process.name}`, () => {
      if (process.ended) throw new Error(`${process.name} ended at once:\n${process.stderr.tail()}`);
      return QmpClient.connect(socket("qmp")).catch(() => undefined);
    });
    return new Vm(process, qmp, socket("qmp2"));
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** What QEMU said about a finished migration, in ms. */
export interface MigrationFigures {
  totalMs: number;
  downtimeMs: number;
}

/** How {@linkcode migrate} does it. */
export interface MigrateOptions {
  timeoutMs?: number;
  /** Copies the memory slowly the first time (16 MiB/s), so that most pages are copied while the device goes on; then fast. */
  slowFirstPass?: boolean;
  /**
   * Stops the guest before and lets it go on after. Needed with QEMU 7.2: under TCG it forgets to mark pages that the guest
   * writes while it migrates (seen without any vhost device, as lost counters, stale blocks and kernel panics; QEMU 10 does not).
   */
  stopGuest?: boolean;
}

/** Migrates by plain QMP, as any management program does, and waits for the end on both sides. */
export async function migrate(source: Vm, destination: Vm, uri: string, options: MigrateOptions = {}): Promise<MigrationFigures> {
  const { timeoutMs = 120_000 } = options;
  const setBandwidth = (bytes: number) => source.qmp.execute("migrate-set-parameters", { "max-bandwidth": bytes });
  if (options.slowFirstPass === true) await setBandwidth(16 << 20);
  if (options.stopGuest === true) await source.qmp.execute("stop");
  await source.qmp.execute("migrate", { uri });
  if (options.slowFirstPass === true) {
    await waitUntil("the first pass over memory", async () => {
      const { ram } = await source.qmp.execute<{ ram?: { "dirty-sync-count": number } }>("query-migrate");
      return (ram?.["dirty-sync-count"] ?? 0) >= 2;
    }, timeoutMs);
    await setBandwidth(1 << 30);
  }
  const info = await waitUntil("the migration's end", async () => {
    const info = await source.qmp.execute<Record<string, unknown>>("query-migrate");
    if (info.status === "failed" || info.status === "cancelled") {
      throw new Error(`The migration is ${info.status}: ${info["error-desc"] ?? ""}\n${destination.process.stderr.tail()}`);
    }
    return info.status === "completed" ? info : undefined;
  }, timeoutMs);
  await waitUntil("the destination to have taken over", async () => {
    return (await destination.qmp.execute<{ status: string }>("query-status")).status !== "inmigrate";
  }, timeoutMs);
  if (options.stopGuest === true) await destination.qmp.execute("cont");
  return { totalMs: Number(info["total-time"]), downtimeMs: Number(info.downtime) };
}

/** A storage daemon that exports an image as a vhost-user-blk back-end. */
export interface StorageDaemonOptions {
  version: QemuVersion;
  /** Path of a raw image. */
  image: string;
  /** Where it listens. */
  socket: string;
  /** Default 1. */
  queues?: number;
  /** Default true. */
  writable?: boolean;
  /** Requests per second, to stand for a slow device. */
  iops?: number;
  /** Where its own monitor listens, when wanted (block_resize). */
  qmpSocket?: string;
  extraArgs?: string[];
}

/** Starts a storage daemon and waits until it listens. */
export async function storageDaemon(options: StorageDaemonOptions): Promise<Process> {
  const program = await qemuProgram(options.version, "qemu-storage-daemon");
  const pidFile = `${options.socket}.pid`;
  await Deno.remove(pidFile).catch(() => {});
  await Deno.remove(options.socket).catch(() => {});
  const slow = options.iops === undefined ? [] : [
    "--object",
    `throttle-group,id=t0,x-iops-total=${options.iops}`,
    "--blockdev",
    "driver=throttle,node-name=slow0,file=file0,throttle-group=t0",
  ];
  const process = new Process(program.command, {
    name: `storage daemon ${options.version}`,
    env: program.env,
    // deno-fmt-ignore
    args: [
      ...program.args,
      // Both sides of a migration have the image open.
      "--blockdev", `driver=file,node-name=file0,filename=${options.image},locking=off`,
      ...slow,
      ...(options.qmpSocket === undefined ? [] : [
        "--chardev", `socket,id=mon0,path=${options.qmpSocket},server=on,wait=off`, "--monitor", "chardev=mon0",
      ]),
      "--export", `type=vhost-user-blk,id=export0,node-name=${options.iops === undefined ? "file0" : "slow0"},addr.type=unix,addr.path=${options.socket},` +
        `writable=${options.writable === false ? "off" : "on"},num-queues=${options.queues ?? 1}`,
      "--pidfile", pidFile,
      ...(options.extraArgs ?? []),
    ],
  });
  try {
    // The daemon writes the file once its exports are up.
    await waitUntil(`${process.name} to listen`, () => {
      if (process.ended) throw new Error(`${process.name} ended at once:\n${process.stderr.tail()}`);
      try {
        return Deno.statSync(pidFile).size > 0;
      } catch {
        return false;
      }
    });
    return process;
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** Starts DPDK's testpmd as a vhost-user-net back-end that answers pings, and waits until it listens, or (client) connects. */
export async function startTestpmd(
  options: { folder: string; socket: string; queues?: number; mode?: string; client?: boolean },
): Promise<Process> {
  const program = await testpmdProgram(options.folder);
  const process = new Process(program.command, {
    name: "testpmd",
    env: program.env,
    // deno-fmt-ignore
    args: [
      ...program.args, `--file-prefix=${options.socket.replace(/\W/g, "_")}`,
      `--vdev=net_vhost0,iface=${options.socket},queues=${options.queues ?? 1}${options.client === true ? ",client=1" : ""}`,
      "--", "--total-num-mbufs=8192", `--forward-mode=${options.mode ?? "icmpecho"}`, "--auto-start", "--interactive",
    ],
  });
  try {
    await process.stdout.wait(/testpmd> /, { partial: true });
    return process;
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** Starts testpmd as a front-end (virtio-user) that sends packets as fast as it can, and waits until it runs. */
export async function startVirtioUser(options: { folder: string; socket: string; extra?: string }): Promise<Process> {
  const program = await testpmdProgram(options.folder);
  const process = new Process(program.command, {
    name: "virtio-user",
    env: program.env,
    // deno-fmt-ignore
    args: [
      ...program.args, `--file-prefix=${options.socket.replace(/\W/g, "_")}`,
      `--vdev=net_virtio_user0,path=${options.socket},queues=1${options.extra ?? ""}`,
      "--", "--total-num-mbufs=8192", "--forward-mode=txonly", "--auto-start", "--interactive",
    ],
  });
  try {
    await process.stdout.wait(/testpmd> /, { partial: true });
    return process;
  } catch (error) {
    await process[Symbol.asyncDispose]();
    throw error;
  }
}

/** Makes a sparse raw image. */
export async function makeImage(path: string, mib = 64): Promise<string> {
  using file = await Deno.open(path, { create: true, write: true, truncate: true });
  await file.truncate(mib * 1024 * 1024);
  return path;
}

/** Runs the workload's `verify` mode on an image, on the host. */
export async function verifyImage(path: string, args: Record<string, string | number> = {}): Promise<WorkloadResult> {
  const words = Object.entries(args).map(([name, value]) => `${name}=${value}`);
  await using process = new Process((await guest()).workload, { args: [`dev=${path}`, "mode=verify", ...words] });
  const [line] = await process.stdout.wait(/^SVQ DONE .*$/);
  return workloadResult(line, process.stdout);
}
