/** `svq relay`: run, start, stop, list, status, set, upgrade. @module */
import { buildCommand, buildRouteMap } from "@stricli/core";
import { EXIT, SvqError } from "../../errors.ts";
import { DeviceSource } from "../../devices/open.ts";
import { ControlClient } from "../../relay/control.ts";
import { DeviceProcess } from "../../relay/device_process.ts";
import type { CoreChoice } from "../../relay/core.ts";
import { DEFAULT_RELAY_CONFIG, type IndirectChoice, type InOrderChoice, type RelayMode, type RingChoice } from "../../relay/relay.ts";
import { controlPath, relayNames } from "../../relay/runtime_dir.ts";
import { type FrontAddress, RelayService } from "../../relay/service.ts";
import { prometheusText } from "../metrics.ts";
import type { QueueStatus, RelayStatus } from "../../relay/status.ts";
import { formatMac, parseMac } from "../../net/command.ts";
import { NetState } from "../../net/state.ts";
import type { WorkerLoad } from "../../relay/worker_load.ts";
import { type DeviceAddress, formatDeviceAddress } from "../../vhost/address.ts";
import { askStatus } from "../ask_relay.ts";
import { askAllRelays } from "../ask_relays.ts";
import type { CliContext } from "../context.ts";
import { selfCommand } from "../self_command.ts";
import { passedFds, ServiceManager } from "../service_manager.ts";
import { aborted } from "../signals.ts";
import { deviceFlag, durationFlag, integerFlag, pathFlag, relayArgument, textFlag } from "../parameters.ts";
import { usageError } from "../usage.ts";
import { Takeover } from "../../relay/takeover.ts";
import { UPGRADE_VARIABLE } from "../../relay/upgrade.ts";
import { premap } from "./relay_premap.ts";
import { upgrade } from "./relay_upgrade.ts";
import { listText, WORKER_FLAGS, workerConfig, type WorkerFlags, workerWords } from "../worker_flags.ts";

const RINGS = ["auto", "split", "packed"] as const satisfies readonly RingChoice[];
const INDIRECT = ["copy", "pass", "flatten"] as const satisfies readonly IndirectChoice[];
const IN_ORDER = ["auto", "on", "off"] as const satisfies readonly InOrderChoice[];
const MODES = ["auto", "passthrough", "notify", "used", "shadow"] as const satisfies readonly RelayMode[];

interface RunFlags extends WorkerFlags {
  readonly front?: DeviceAddress;
  readonly socketPath?: string;
  readonly fd?: number;
  readonly printCapabilities: boolean;
  readonly device?: DeviceAddress;
  readonly deviceExec?: string;
  readonly mode: RelayMode;
  readonly forceShadow: boolean;
  readonly resilient: boolean;
  readonly requireSealed: boolean;
  readonly drainTimeout?: number;
  readonly switchTimeout: number;
  readonly stopTimeout: number;
  readonly core: CoreChoice;
  readonly guestRing: RingChoice;
  readonly deviceRing: RingChoice;
  readonly deviceRingSize?: number;
  readonly indirect: IndirectChoice;
  readonly inOrder: InOrderChoice;
  readonly guestIommu: boolean;
  readonly mac?: string;
  readonly name?: string;
}

function macOf(text: string): string {
  try {
    return formatMac(parseMac(text));
  } catch {
    throw usageError(`${JSON.stringify(text)} is no MAC address`, "write it as 52:54:00:12:34:56");
  }
}

const runFlags = {
  front: deviceFlag("Where the VMM is met: unix:PATH (listen), connect:PATH or fd:N", { optional: true }),
  socketPath: pathFlag("The same as --front unix:PATH", { optional: true }),
  fd: integerFlag("The same as --front fd:N: a vhost-user socket, connected or listening", { optional: true, min: 0 }),
  printCapabilities: {
    kind: "boolean",
    brief: "Print what this back-end can do, as the vhost-user conventions ask, and exit",
    default: false,
  },
  device: deviceFlag("The device behind the relay", { optional: true }),
  deviceExec: textFlag("A shell command that starts the device's back-end: run when nobody listens, and again when it has ended", {
    optional: true,
  }),
  mode: {
    kind: "enum",
    values: MODES,
    brief: "auto: passthrough until the VMM turns the dirty log on",
    default: DEFAULT_RELAY_CONFIG.mode,
  },
  forceShadow: { kind: "boolean", brief: "Stay in shadow mode, whatever the VMM does", default: false },
  resilient: {
    kind: "boolean",
    brief: "Stay in shadow mode, so that a relay that is killed and started again loses no request and repeats no answer",
    default: false,
  },
  requireSealed: {
    kind: "boolean",
    brief: "Refuse guest memory that the VMM could shorten (QEMU: memory-backend-memfd,seal=on)",
    default: false,
  },
  drainTimeout: durationFlag("When stopped: how long the device may take to give back what it has (default: that of --stop-timeout)", {
    optional: true,
  }),
  switchTimeout: durationFlag("How long turning the dirty log on may keep the VMM waiting", { default: "500ms" }),
  stopTimeout: durationFlag("How long a vhost-user device may hold requests of a queue that the VMM stops, before it counts as lost", {
    default: "5min",
  }),
  ...WORKER_FLAGS,
  core: {
    kind: "enum",
    values: ["auto", "wasm", "js"],
    brief: "What runs the data path; auto is wasm where it can run",
    default: DEFAULT_RELAY_CONFIG.core,
  },
  guestRing: { kind: "enum", values: RINGS, brief: "Ring format offered to the guest; auto is the device's", default: "auto" },
  deviceRing: { kind: "enum", values: RINGS, brief: "Ring format used with the device; auto is the guest's", default: "auto" },
  deviceRingSize: integerFlag(
    "Descriptors in the device's rings (default: as many as the guest's); a split ring takes the power of two below",
    {
      optional: true,
      min: 4,
      max: 32768,
    },
  ),
  indirect: {
    kind: "enum",
    values: INDIRECT,
    brief: "Indirect tables in shadow mode: rebuilt (copy), the guest's own (pass), or none for the device (flatten)",
    default: DEFAULT_RELAY_CONFIG.indirect,
  },
  inOrder: {
    kind: "enum",
    values: IN_ORDER,
    brief: "Offer IN_ORDER to the guest: where the device has it (auto), always (the relay keeps the order), or never",
    default: DEFAULT_RELAY_CONFIG.inOrder,
  },
  guestIommu: {
    kind: "boolean",
    brief: "Relay a guest with an IOMMU (iommu_platform=on,ats=on): its queues run in shadow mode, the device needs no support",
    default: false,
  },
  mac: {
    kind: "parsed",
    parse: macOf,
    placeholder: "MAC",
    brief: "The guest's address, for a network device whose control queue the VMM keeps to itself (default: promiscuous)",
    optional: true,
  },
  name: textFlag("Name for status, set and stop (default: relay-PID)", { optional: true }),
} as const;

function frontOf(flags: RunFlags, passed: readonly number[] = []): FrontAddress {
  const given = [flags.front, flags.socketPath, flags.fd].filter((value) => value !== undefined);
  // Socket activation: the service manager listens where its socket unit says.
  if (given.length === 0 && passed.length === 1) return { kind: "fd", fd: passed[0]! };
  if (given.length !== 1) throw usageError("Say once where the VMM is met", "one of --front unix:PATH, --socket-path PATH or --fd N");
  if (flags.socketPath !== undefined) return { kind: "listen", path: flags.socketPath };
  if (flags.fd !== undefined) return { kind: "fd", fd: flags.fd };
  const front = flags.front!;
  if (front.kind === "fd") return { kind: "fd", fd: front.fd };
  if (front.kind === "vhost-user") return { kind: front.how === "connect" ? "connect" : "listen", path: front.path };
  throw usageError(`A VMM cannot be met at ${formatDeviceAddress(front)}`, "write unix:PATH, connect:PATH or fd:N");
}

function deviceOf(flags: RunFlags): DeviceAddress {
  if (flags.device === undefined) {
    throw usageError("--device is missing", "name the device behind the relay, e.g. --device unix:/run/disk.sock");
  }
  // The VMM is given no record then, and a promise that does not hold is worse than none.
  if (flags.guestIommu && flags.resilient) {
    throw usageError(
      "--resilient does not go with --guest-iommu: what is in flight is not recorded for a guest with an IOMMU",
      "leave one of them out; without --resilient a relay that is killed may lose requests of such a guest",
    );
  }
  return flags.device;
}

const run = buildCommand({
  docs: {
    brief: "Run a relay in the foreground",
    fullDescription:
      "Stands between a VMM and a vhost or vDPA device. The VMM sees a vhost-user device that can be migrated; the device needs no support for it.\n\nExample:\n  svq relay run --front unix:/run/vm1-disk.sock --device unix:/run/qsd.sock --name vm1-disk",
  },
  parameters: { flags: runFlags },
  async func(this: CliContext, flags: RunFlags): Promise<void> {
    if (flags.printCapabilities) {
      this.output.write(JSON.stringify({ type: "relay", features: [] }) + "\n");
      return;
    }
    const { signal } = this;
    const socket = this.host.env(UPGRADE_VARIABLE);
    using takeover = socket === undefined ? undefined : await Takeover.connect(socket);
    const front = takeover?.state.front ?? frontOf(flags, passedFds(this.host.env));
    const address = deviceOf(flags);
    const name = takeover?.state.name ?? flags.name ?? `relay-${Deno.pid}`;
    using source = new DeviceSource(address, {
      listener: takeover?.fds.take(takeover.state.deviceListener),
      backing: takeover?.fds.take(takeover.state.backing),
    });
    using manager = new ServiceManager(this.host.env);
    const log = (level: "error" | "warning" | "info" | "debug", message: string) => {
      this.output.log(level, `${name}: ${message}`);
      if (level !== "debug") manager.status(message);
    };
    await using backEnd = flags.deviceExec === undefined ? undefined : new DeviceProcess(flags.deviceExec, log);
    if (takeover?.state.deviceProcess) backEnd?.adopt(takeover.state.deviceProcess);
    await using service = new RelayService({
      name,
      front,
      device: formatDeviceAddress(address),
      openDevice: (options) => {
        if (backEnd === undefined) return source.open(options);
        if (!source.listens) return backEnd.open(() => source.open(options));
        backEnd.ensure();
        return source.open(options);
      },
      deviceProcess: backEnd,
      deviceConnects: source.listens,
      source,
      args: Deno.args,
      takeover,
      onHandedOver: (pid) => manager.handOver(pid),
      requireSealed: flags.requireSealed,
      ...(flags.drainTimeout === undefined ? {} : { drainTimeoutMs: flags.drainTimeout / 1e6 }),
      onDrainTimeout: () => Deno.exit(EXIT.timeout),
      config: {
        mode: flags.mode,
        forceShadow: flags.forceShadow || flags.resilient,
        switchTimeoutMs: flags.switchTimeout / 1e6,
        stopTimeoutMs: flags.stopTimeout / 1e6,
        ...workerConfig(flags),
        core: flags.core,
        guestRing: flags.guestRing,
        deviceRing: flags.deviceRing,
        ...(flags.deviceRingSize === undefined ? {} : { deviceRingSize: flags.deviceRingSize }),
        indirect: flags.indirect,
        inOrder: flags.inOrder,
        guestIommu: flags.guestIommu,
        ...(flags.mac === undefined ? {} : { mac: flags.mac }),
      },
      log,
    });
    await service.start();
    this.output.info(`${name}: ${takeover === undefined ? "ready" : "goes on"}`);
    manager.ready("waiting for a front-end");
    manager.watch(() => service.status());
    aborted(signal).then(() => {
      manager.stopping();
      service.stop();
    });
    await service.run();
  },
});

const start = buildCommand({
  docs: {
    brief: "Start a relay in the background and wait until it is ready",
    fullDescription: "Takes the flags of svq relay run, except --fd. Its log goes to NAME.log beside the control socket.",
  },
  parameters: { flags: runFlags },
  async func(this: CliContext, flags: RunFlags): Promise<void> {
    const front = frontOf(flags);
    if (front.kind === "fd") throw usageError("A relay in the background cannot inherit a socket", "use svq relay run --fd N");
    const device = formatDeviceAddress(deviceOf(flags));
    workerConfig(flags);
    const name = flags.name ?? `relay-${crypto.randomUUID().slice(0, 8)}`;
    const log = controlPath(name).replace(/\.sock$/, ".log");
    const words = [
      ...["relay", "run", "--name", name, "--device", device, "--mode", flags.mode],
      ...["--front", `${front.kind === "connect" ? "connect" : "unix"}:${front.path}`],
      ...[
        "--switch-timeout",
        `${flags.switchTimeout}ns`,
        "--stop-timeout",
        `${flags.stopTimeout}ns`,
        ...workerWords(flags),
        "--core",
        flags.core,
      ],
      ...["--guest-ring", flags.guestRing, "--device-ring", flags.deviceRing],
      ...["--indirect", flags.indirect, "--in-order", flags.inOrder],
      ...(flags.deviceRingSize === undefined ? [] : ["--device-ring-size", String(flags.deviceRingSize)]),
      ...(flags.guestIommu ? ["--guest-iommu"] : []),
      ...(flags.mac === undefined ? [] : ["--mac", flags.mac]),
      ...(flags.forceShadow ? ["--force-shadow"] : []),
      ...(flags.resilient ? ["--resilient"] : []),
      ...(flags.deviceExec === undefined ? [] : ["--device-exec", flags.deviceExec]),
      ...(flags.requireSealed ? ["--require-sealed"] : []),
      ...(flags.drainTimeout === undefined ? [] : ["--drain-timeout", `${flags.drainTimeout / 1e6}ms`]),
    ];
    const child = spawnDetached(words, log);
    const failed = child.status.then(() => true);
    for (;;) {
      try {
        const status = await askStatus(name);
        if (status.pid !== child.pid) throw new SvqError("RELAY_EXISTS", `A relay "${name}" runs already, as process ${status.pid}`);
        // It answers before it has opened its device and its socket.
        if (status.state !== "starting") {
          child.unref();
          this.output.document({ ...status }, () => `${name} runs as process ${status.pid}`);
          return;
        }
      } catch (error) {
        if (!(error instanceof SvqError) || error.code !== "NO_SUCH_RELAY") throw error;
      }
      if (await Promise.race([failed, new Promise<false>((resolve) => setTimeout(() => resolve(false), 50))])) {
        throw new SvqError("RELAY_FAILED", `The relay did not start: ${lastError(log)}`, { hint: `its log is ${log}` });
      }
    }
  },
});

function lastError(log: string): string {
  try {
    const lines = Deno.readTextFileSync(log).trim().split("\n");
    return (lines.findLast((line) => line.startsWith("error:")) ?? lines.at(-1) ?? "no reason given").replace(/^error: /, "");
  } catch {
    return "no log";
  }
}

// A shell puts the log in place and a session of its own around the relay: it outlives this terminal.
function spawnDetached(words: string[], log: string): Deno.ChildProcess {
  const [command, ...args] = [...selfCommand(), ...words];
  return new Deno.Command("/bin/sh", {
    args: ["-c", 'log=$1; shift; exec setsid "$@" >"$log" 2>&1 </dev/null', "sh", log, command!, ...args],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
}

const stop = buildCommand({
  docs: { brief: "Stop relays: drain, hand the rings back, end" },
  parameters: { positional: { kind: "array", parameter: relayArgument(), minimum: 1 } },
  async func(this: CliContext, _flags: Record<never, never>, ...names: string[]): Promise<void> {
    for (const name of names) {
      using client = ControlClient.connect(name, controlPath(name));
      await client.call("stop");
      // The relay closes the connection as its last act.
      await client.call("status").then(() => client.call("status")).catch(() => {});
      while (relayNames().includes(name) && isLive(name)) await new Promise((resolve) => setTimeout(resolve, 20));
    }
    this.output.document({ schema: "svq.relay-stop/1", stopped: names }, () => `stopped ${names.join(", ")}`);
  },
});

function isLive(name: string): boolean {
  try {
    ControlClient.connect(name, controlPath(name)).close();
    return true;
  } catch {
    return false;
  }
}

const list = buildCommand({
  docs: {
    brief: "List running relays",
    fullDescription:
      "All relays of this user are asked at once. One that was killed leaves its control socket behind, and is listed as dead until a relay of the same name is started; one that does not answer within 2 seconds is listed as such.",
  },
  parameters: {},
  async func(this: CliContext): Promise<void> {
    const { relays, dead } = await askAllRelays();
    this.output.document({ schema: "svq.relay-list/1", relays, dead }, () => {
      if (relays.length + dead.length === 0) {
        this.output.info("no relay runs; svq relay start starts one");
        return;
      }
      this.output.table(
        ["name", "pid", "state", "mode", "front", "device", "queues"],
        [
          ...relays.map((relay) => [relay.name, relay.pid, relay.state, modeText(relay), relay.front, relay.device, relay.queues.length]),
          ...dead.map(({ name, code }) => [name, "-", code === "NO_SUCH_RELAY" ? "dead" : "no answer", "-", "-", "-", "-"]),
        ],
      );
    });
  },
});

function modeText(relay: RelayStatus): string {
  const now = [...new Set(relay.queues.map((queue) => queue.mode))].join("+");
  const wanted = relay.force_shadow ? "shadow (forced)" : relay.mode;
  return now === "" || now === wanted ? wanted : `${wanted} (${now})`;
}

function queueRow(queue: QueueStatus): unknown[] {
  const { drain_us, switch_us, longest_stall_us, count } = queue.switches;
  const switches = count === 0
    ? "-"
    : `${count} (last ${(drain_us / 1000).toFixed(1)}+${(switch_us / 1000).toFixed(1)} ms, longest ${
      (longest_stall_us / 1000).toFixed(1)
    } ms)`;
  return [
    queue.index,
    queue.mode,
    queue.core ?? "-",
    queue.num,
    queue.avail_idx,
    queue.used_idx,
    queue.inflight,
    queue.chains,
    queue.dirty_pages,
    queue.errors,
    switches,
  ];
}

function workerText({ index, cpus, sleeps, polls, poll_hits, poll_us }: WorkerLoad): string {
  const bound = cpus.length === 0 ? "" : ` on CPU ${listText(cpus)}`;
  return `${index}${bound}: ${sleeps} sleeps, ${polls} rounds of polling with ${poll_hits} finds, polls for ${poll_us} us now`;
}

function mapsText({ guest, shadow, waiting, early, adopted, at_start, remapped }: RelayStatus["maps"]): string {
  const parts = [`${guest} guest regions, ${shadow} of shadow rings`];
  if (waiting > 0) parts.push(`${waiting} taken early wait for the VMM`);
  if (early.regions > 0) parts.push(`${early.regions} taken early in ${early.ms} ms, ${adopted} of them found mapped`);
  if (at_start.regions > 0) parts.push(`${at_start.regions} mapped at the start in ${at_start.ms} ms`);
  if (remapped !== null && remapped > 0) parts.push(`${remapped} mapped again after a reset`);
  return parts.join("; ");
}

function printStatus(context: CliContext, status: RelayStatus): void {
  const { output } = context;
  output.document({ ...status }, () => {
    output.line(`${status.name}  process ${status.pid}  ${status.state}  up ${(status.uptime_ms / 1000).toFixed(0)} s`);
    output.line(`  front   ${status.front}`);
    output.line(`  device  ${status.device}`);
    output.line(
      `  mode    ${modeText(status)}${status.logging ? ", dirty log on" : ""}${status.marking_all ? ", all memory marked dirty" : ""}`,
    );
    if (status.queues.some(({ core }) => core === "wasm")) {
      output.line(
        `  core    WebAssembly ${status.wasm_bounds_checks ? "with bounds checks (slower)" : "without bounds checks, its memory guarded"}`,
      );
    }
    output.line(`  memory  ${mapsText(status.maps)}`);
    for (const load of status.workers ?? []) output.line(`  worker  ${workerText(load)}`);
    for (const { feature, reason } of status.masked) output.line(`  masked  ${feature}: ${reason}`);
    if (status.iommu !== null) {
      const { entries, misses, invalidations } = status.iommu;
      output.line(`  iommu   ${entries} ranges known, asked for ${misses}, taken back ${invalidations}`);
    }
    if (status.net !== null) {
      const { control, queue, pairs, refused, not_migratable } = status.net;
      const driver = control === "guest" ? "the guest" : "the relay";
      output.line(`  net     queue ${queue} is the control queue, driven by ${driver}${pairs === null ? "" : `; ${pairs} queue pairs`}`);
      for (const reason of refused) output.line(`  refused ${reason}`);
      for (const name of not_migratable) output.line(`  net     not migratable: ${name}`);
    }
    if (status.masked_protocol_features.length > 0) output.line(`  masked  ${status.masked_protocol_features.join(", ")}`);
    if (status.error !== null) output.line(`  error   ${status.error.message}`);
    if (status.queues.length === 0) return;
    output.line();
    output.table(
      ["queue", "mode", "core", "num", "avail", "used", "inflight", "chains", "dirty", "errors", "switches"],
      status.queues.map(queueRow),
    );
    for (const queue of status.queues) if (queue.error !== null) output.line(`queue ${queue.index} failed: ${queue.error.message}`);
  });
}

const status = buildCommand({
  docs: { brief: "Show what a relay does" },
  parameters: {
    flags: {
      netState: {
        kind: "boolean",
        brief: "Print what was set through a network device's control queue, as JSON: svq relay set takes it",
        default: false,
      },
      metrics: { kind: "boolean", brief: "Print the counters in Prometheus' text form, for a textfile collector", default: false },
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
  },
  async func(
    this: CliContext,
    { metrics, netState }: { readonly metrics: boolean; readonly netState: boolean },
    name: string,
  ): Promise<void> {
    if (metrics && netState) throw usageError("--metrics and --net-state exclude each other", "ask twice");
    if (netState) {
      using client = ControlClient.connect(name, controlPath(name));
      const state = await client.call("net_state") as { schema: string };
      this.output.document({ ...state }, () => this.output.write(JSON.stringify(state, undefined, 2) + "\n"));
      return;
    }
    const answer = await askStatus(name);
    if (metrics) this.output.write(prometheusText([answer]));
    else printStatus(this, answer);
  },
});

interface SetFlags {
  readonly queue?: number;
  readonly mode?: RelayMode;
  readonly forceShadow?: boolean;
  readonly switchTimeout?: number;
  readonly netState?: string;
}

// Checked here too: the error names the file.
function readNetState(path: string): unknown {
  let document: unknown;
  try {
    document = JSON.parse(Deno.readTextFileSync(path));
    NetState.load(document);
    return document;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new SvqError("BAD_NET_STATE", `${path} cannot be used: ${reason}`, {
      hint: "svq relay status NAME --net-state prints such a document",
      cause,
    });
  }
}

const set = buildCommand({
  docs: { brief: "Change a running relay, and wait until every queue has followed" },
  parameters: {
    flags: {
      mode: { kind: "enum", values: MODES, brief: "Mode of all queues, or of --queue", optional: true },
      queue: integerFlag("Only this queue", { optional: true, min: 0, max: 255 }),
      forceShadow: { kind: "boolean", brief: "Stay in shadow mode (--no-force-shadow undoes it)", optional: true },
      switchTimeout: durationFlag("How long turning the dirty log on may keep the VMM waiting", { optional: true }),
      netState: pathFlag("Bring the network device to the state in this file, at once or before its guest starts", { optional: true }),
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
  },
  async func(this: CliContext, flags: SetFlags, name: string): Promise<void> {
    if ([flags.mode, flags.forceShadow, flags.switchTimeout, flags.netState].every((value) => value === undefined)) {
      throw usageError("Nothing to set", "one of --mode, --force-shadow, --switch-timeout or --net-state");
    }
    const netState = flags.netState === undefined ? undefined : readNetState(flags.netState);
    using client = ControlClient.connect(name, controlPath(name));
    const params = {
      ...(flags.mode === undefined ? {} : { mode: flags.mode }),
      ...(flags.queue === undefined ? {} : { queue: flags.queue }),
      ...(flags.forceShadow === undefined ? {} : { force_shadow: flags.forceShadow }),
      ...(flags.switchTimeout === undefined ? {} : { switch_timeout_ms: flags.switchTimeout / 1e6 }),
      ...(netState === undefined ? {} : { net_state: netState }),
    };
    printStatus(this, await client.call("set", params) as RelayStatus);
  },
});

/** All of `svq relay`. */
export const command = buildRouteMap({
  routes: { run, start, stop, list, status, set, premap, upgrade },
  docs: { brief: "Run and steer relays between a VMM and a device" },
});
