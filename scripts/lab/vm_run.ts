/**
 * Runs a command in the lab VM. The checkout and Deno are visible there at the paths they have on the host, read-only; /lab is
 * the run's own directory, and what the command leaves in /lab/out comes back.
 *
 * `deno run -A scripts/lab/vm_run.ts --module vhost_net -- deno --version` exits with the command's status.
 *
 * @module
 */
import { SvqError } from "../../src/errors.ts";
import { ensureVm, type LabVm } from "./vm_build.ts";
import { labPrograms, startScript } from "./vm_guest.ts";
import { ALIVE, type Machine, type Outcome, runMachine, savedMachine, type VpDevices } from "./vm_qemu.ts";

export type { VpDevices };

/** What a run needs besides its command. */
export interface VmOptions {
  /** Kernel modules in load order, each with its parameters: `vdpa_sim use_va=0`. */
  modules?: readonly string[];
  /** Shell lines run before the command; the first that fails ends the run. */
  setup?: readonly string[];
  /** Environment of the command, besides PATH, HOME and Deno's own. */
  env?: Readonly<Record<string, string>>;
  /** Files put into /lab/files, by name. */
  files?: Readonly<Record<string, string | Uint8Array>>;
  /** Adds an IOMMU and PCI devices behind it. */
  vp?: VpDevices;
  /** From the end of the boot to the end of the command (default 60 s); the VM is killed then. */
  timeoutMs?: number;
  /** For the boot (default 120 s: other work on the host slows emulation down); a boot that takes longer or dies is tried a second time. */
  bootTimeoutMs?: number;
  /** How long the VM may stand still before it is given up and tried a second time (default 60 s). */
  stallTimeoutMs?: number;
  /** Memory of the VM (default 2048). */
  memoryMiB?: number;
  /** The checkout to show, and the command's working directory (default: the one that this file belongs to). */
  checkout?: string;
}

/** How a run ended. */
export interface VmResult {
  /** Exit status of the command. */
  code: number;
  /** Everything the command wrote. */
  stdout: string;
  /** Everything the command wrote. */
  stderr: string;
  /** The serial console. */
  console: string;
  /** The kernel's log. */
  kernelLog: string;
  /** What the command left in /lab/out, by name. */
  outputs: Record<string, Uint8Array<ArrayBuffer>>;
  /** Duration of the boot that worked. */
  bootMs: number;
  /** Duration of everything, the VM's build not included. */
  totalMs: number;
}

/**
 * Runs a command in a fresh VM; the VM is built first where that has not been done.
 *
 * @param command program and arguments, found on the VM's PATH; Deno is `deno`
 * @throws SvqError `LAB_BOOT` when two boots died, `LAB_TIMEOUT` when the command did not end in time, `LAB_VM_DIED` when the kernel
 * stopped under it, `LAB_VM_STALLED` when the VM stood still twice, and what `ensureVm` throws
 */
export async function runInVm(command: readonly string[], options: VmOptions = {}): Promise<VmResult> {
  const vm = await ensureVm();
  const started = performance.now();
  const directory = await Deno.makeTempDir({ prefix: "svq-lab-" });
  try {
    await prepareRun(directory, command, options);
    const boot = await start(vm, directory, options);
    if (boot.bootMs === null) {
      throw new SvqError("LAB_BOOT", `The lab VM did not boot, twice: ${tail(boot.console)}`);
    }
    const [code, stdout, stderr, kernelLog] = await Promise.all(
      ["code", "stdout", "stderr", "dmesg"].map((name) => readText(directory, name)),
    );
    if (code === "") {
      const [errorCode, what] = boot.stalled
        ? ["LAB_VM_STALLED", `The lab VM stood still, twice`]
        : boot.killed
        ? ["LAB_TIMEOUT", `The command did not end within ${commandTimeout(options)} ms`]
        : ["LAB_VM_DIED", "The lab VM's kernel stopped under the command"];
      throw new SvqError(errorCode, `${what}: ${tail(`${stdout}\n${stderr}`)}\nconsole: ${death(boot.console) ?? tail(boot.console)}`);
    }
    const outputs: VmResult["outputs"] = {};
    for await (const { name, isFile } of Deno.readDir(`${directory}/out`)) {
      if (isFile) outputs[name] = await Deno.readFile(`${directory}/out/${name}`);
    }
    const totalMs = performance.now() - started;
    return {
      code: Number(code),
      stdout: stdout!,
      stderr: stderr!,
      kernelLog: kernelLog!,
      console: boot.console,
      outputs,
      bootMs: boot.bootMs,
      totalMs,
    };
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** From the saved machine; when that fails, once more by a boot of its own. */
async function start(vm: LabVm, directory: string, options: VmOptions): Promise<Outcome> {
  const machine: Machine = { memoryMiB: options.memoryMiB ?? 2048, vp: options.vp };
  const denohome = Deno.realPathSync(Deno.execPath()).replace(/\/[^/]*$/, "");
  const shares = { lab: directory, checkout: checkoutOf(options), denohome, denodir: denoDirectory() };
  const deadlines = {
    bootMs: options.bootTimeoutMs ?? 120_000,
    commandMs: commandTimeout(options),
    stallMs: options.stallTimeoutMs ?? 60_000,
  };
  const saved = await savedMachine(vm, machine, deadlines.bootMs).catch((error) => {
    if (error instanceof SvqError && error.code === "LAB_BOOT") return null;
    throw error;
  });
  const first = saved === null ? null : await runMachine(vm, machine, shares, deadlines, saved);
  if (first !== null && first.bootMs !== null && !first.stalled) return first;
  if (first?.stalled === true) {
    // Seen once in some hundred runs of a saved machine: the emulated processor waits, and no timer wakes it. No program in
    // the machine can do that to it, so it is the machine that is tried once more, and said.
    console.warn("The lab VM stood still and is started again");
    for (const name of ["code", "stdout", "stderr", "dmesg", ALIVE]) await Deno.remove(`${directory}/${name}`).catch(() => {});
    await Deno.remove(`${directory}/out`, { recursive: true });
    await Deno.mkdir(`${directory}/out`);
  }
  return await runMachine(vm, machine, shares, deadlines);
}

function commandTimeout(options: VmOptions): number {
  return options.timeoutMs ?? 60_000;
}

function tail(text: string): string {
  return text.trim().split("\n").slice(-25).join("\n");
}

/** From the line in which a kernel says why it dies; what follows is a trace of any length. */
function death(console: string): string | undefined {
  const lines = console.trim().split("\n");
  const first = lines.findIndex((line) => /sysrq: |Kernel panic|Oops|BUG: /.test(line));
  return first < 0 ? undefined : lines.slice(first, first + 25).join("\n");
}

async function readText(directory: string, name: string): Promise<string> {
  return await Deno.readTextFile(`${directory}/${name}`).catch(() => "");
}

function checkoutOf(options: VmOptions): string {
  return options.checkout ?? new URL("../..", import.meta.url).pathname.replace(/\/$/, "");
}

function denoDirectory(): string {
  const cache = Deno.env.get("XDG_CACHE_HOME") || `${Deno.env.get("HOME") ?? "/root"}/.cache`;
  return Deno.env.get("DENO_DIR") || `${cache}/deno`;
}

async function prepareRun(directory: string, command: readonly string[], options: VmOptions): Promise<void> {
  for (const name of ["bin", "files", "out"]) await Deno.mkdir(`${directory}/${name}`);
  const denoDir = denoDirectory();
  await Deno.mkdir(denoDir, { recursive: true });
  await Deno.writeTextFile(
    `${directory}/start.sh`,
    startScript({
      command,
      modules: [...(options.vp ? ["vp_vdpa", "virtio_console"] : []), ...(options.modules ?? [])],
      setup: options.setup ?? [],
      env: options.env ?? {},
      checkout: checkoutOf(options),
      denoDir,
      denoName: Deno.realPathSync(Deno.execPath()).replace(/^.*\//, ""),
      epochSeconds: Math.floor(Date.now() / 1000),
      // Ends a VM whose runner was killed.
      lifetimeSeconds: Math.ceil(commandTimeout(options) / 1000) + 5,
    }),
  );
  for (const [name, text] of Object.entries(labPrograms())) {
    await Deno.writeTextFile(`${directory}/bin/${name}`, text, { mode: 0o755 });
  }
  for (const [name, content] of Object.entries(options.files ?? {})) {
    const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
    await Deno.writeFile(`${directory}/files/${name}`, bytes);
  }
}

function parse(args: readonly string[]): { command: string[]; options: VmOptions } {
  const end = args.indexOf("--");
  const command = end < 0 ? [] : args.slice(end + 1);
  const modules: string[] = [];
  const setup: string[] = [];
  const env: Record<string, string> = {};
  const vp: VpDevices = {};
  const options: VmOptions = { modules, setup, env };
  const words = args.slice(0, end < 0 ? args.length : end);
  for (let word = words.shift(); word !== undefined; word = words.shift()) {
    if (word === "--module") modules.push(words.shift() ?? "");
    else if (word === "--setup") setup.push(words.shift() ?? "");
    else if (word === "--timeout") options.timeoutMs = Number(words.shift()) * 1000;
    else if (word === "--vp-blk") options.vp = Object.assign(vp, { blk: true });
    else if (word === "--vp-net") options.vp = Object.assign(vp, { net: true });
    else if (word === "--packed") options.vp = Object.assign(vp, { packed: true });
    else if (word === "--env") {
      const [, name, value] = /^(\w+)=(.*)$/s.exec(words.shift() ?? "") ?? [];
      env[name ?? ""] = value ?? "";
    } else throw new SvqError("USAGE", `Unknown option ${word}`, { exitCode: 2 });
  }
  if (command.length === 0) {
    const usage =
      "vm_run.ts [--module 'NAME PARAMETER=VALUE']... [--setup SHELL]... [--env K=V]... [--timeout S] [--vp-blk] [--vp-net] [--packed] -- COMMAND...";
    throw new SvqError("USAGE", usage, { exitCode: 2 });
  }
  return { command, options };
}

if (import.meta.main) {
  try {
    const { command, options } = parse(Deno.args);
    const result = await runInVm(command, options);
    await Deno.stdout.write(new TextEncoder().encode(result.stdout));
    await Deno.stderr.write(new TextEncoder().encode(result.stderr));
    console.error(`[lab] boot ${(result.bootMs / 1000).toFixed(1)} s, all ${(result.totalMs / 1000).toFixed(1)} s`);
    Deno.exit(result.code);
  } catch (error) {
    if (!(error instanceof SvqError)) throw error;
    console.error(`${error.code}: ${error.message}`);
    Deno.exit(error.exitCode);
  }
}
