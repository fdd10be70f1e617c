/** `svq device`: embedded devices as vhost-user back-ends and as VDUSE devices. @module */
import { buildCommand, buildRouteMap } from "@stricli/core";
import type { SimOptions } from "../../devices/options.ts";
import { SimDevice } from "../../devices/sim_device.ts";
import { toErrorRecord } from "../../errors.ts";
import { listenUnix, OwnedFd, UnixStream } from "../../ffi/mod.ts";
import { suggestionHint } from "../../suggest.ts";
import { BackendServer } from "../../vhost_user/server.ts";
import type { CliContext } from "../context.ts";
import { durationFlag, integerFlag, pathFlag, sizeFlag, textFlag } from "../parameters.ts";
import { aborted } from "../signals.ts";
import { usageError } from "../usage.ts";
import { serveVduse } from "../vduse.ts";

const KINDS = ["blk", "net", "loopback"] as const;
type Kind = typeof KINDS[number];

// `type` is the conventions' word for the device class; `features` names the options of that class that exist.
const CAPABILITIES: Record<Kind, { type: string; features: string[] }> = {
  blk: { type: "block", features: ["read-only", "blk-file"] },
  net: { type: "net", features: [] },
  loopback: { type: "loopback", features: [] },
};

interface Flags {
  readonly socketPath?: string;
  readonly fd?: number;
  readonly vduse?: string;
  readonly add: boolean;
  readonly printCapabilities: boolean;
  readonly file?: string;
  readonly blkFile?: string;
  readonly size?: number;
  readonly readOnly: boolean;
  readonly id?: string;
  readonly tap?: string;
  readonly cable?: string;
  readonly mac?: string;
  readonly mtu?: number;
  readonly latency?: number;
  readonly jitter?: number;
  readonly queues?: number;
  readonly num?: number;
  readonly packed: boolean;
}

const run = buildCommand({
  docs: {
    brief: "Serve an embedded device over vhost-user or VDUSE",
    fullDescription:
      "Serve an embedded device to one VMM (or relay, or svq drive) at a time, until SIGTERM or SIGINT. When a front-end leaves, the next one can come. " +
      "Keeps to the conventions for vhost-user back-ends.\n\n" +
      "With --vduse NAME a disk becomes a vDPA device of this kernel (modules vduse and vhost_vdpa or virtio_vdpa, root): `vdpa dev add name NAME " +
      "mgmtdev vduse`, or --add, puts it on the vdpa bus, and it appears as /dev/vhost-vdpa-N or as a disk of this host. At the end it is taken off " +
      "the bus and destroyed.\n\n" +
      "Examples:\n  svq device run blk --socket-path /run/disk.sock --file disk.img\n  svq device run blk --socket-path /run/slow.sock --size 64MiB --latency 5ms\n" +
      "  svq device run blk --vduse disk0 --add --file disk.img\n  svq device run net --socket-path /run/net.sock --tap tap0",
  },
  parameters: {
    flags: {
      socketPath: pathFlag("Listen on this unix socket", { optional: true }),
      fd: integerFlag("Serve the connected socket that was inherited with this number", { optional: true }),
      vduse: textFlag("blk: be the VDUSE device of this name", { optional: true }),
      add: { kind: "boolean", brief: "With --vduse: put the device on the vdpa bus", default: false },
      printCapabilities: {
        kind: "boolean",
        brief: "Print what this back-end can do, as the vhost-user conventions ask, and exit",
        default: false,
      },
      file: pathFlag("blk: the disk, a file or a block device", { optional: true }),
      blkFile: pathFlag("blk: the same, by the conventions' name", { optional: true }),
      size: sizeFlag("blk: size of the disk; without a file it is in memory (default 64MiB)", { optional: true }),
      readOnly: { kind: "boolean", brief: "blk: the disk cannot be written", default: false },
      id: textFlag("blk: the disk's id, at most 20 bytes", { optional: true }),
      tap: textFlag("net: name of the tap that carries the frames", { optional: true }),
      cable: textFlag("net: `loop`, for a device whose frames come back", { optional: true }),
      mac: textFlag("net: MAC address", { optional: true }),
      mtu: integerFlag("net: largest payload of a frame, bytes", { optional: true, min: 68, max: 65535 }),
      latency: durationFlag("Time that each request takes", { optional: true }),
      jitter: durationFlag("Random time added to each request, at most", { optional: true }),
      queues: integerFlag("Queues; net: two for each pair and one for control (default 3)", { optional: true, min: 1, max: 129 }),
      num: integerFlag("Largest ring, in descriptors", { optional: true, min: 2, max: 32768 }),
      packed: { kind: "boolean", brief: "Offer packed rings", default: false },
    },
    positional: {
      kind: "tuple",
      parameters: [{
        parse(text: string): Kind {
          const kind = KINDS.find((known) => known === text);
          if (kind === undefined) {
            throw usageError(`Unknown embedded device ${JSON.stringify(text)}`, suggestionHint(text, KINDS, "devices"));
          }
          return kind;
        },
        brief: "blk, net or loopback",
        placeholder: "KIND",
        proposeCompletions: (partial: string) => KINDS.filter((kind) => kind.startsWith(partial)),
      }],
    },
  },
  async func(this: CliContext, flags: Flags, kind: Kind): Promise<void> {
    if (flags.printCapabilities) {
      this.output.write(JSON.stringify(CAPABILITIES[kind]) + "\n");
      return;
    }
    const { vduse } = flags;
    if ([flags.socketPath, flags.fd, vduse].filter((place) => place !== undefined).length !== 1) {
      throw usageError("Say once where the front-end is met", "one of --socket-path PATH, --fd N or --vduse NAME");
    }
    if (flags.add && vduse === undefined) throw usageError("--add goes with --vduse", "svq device run blk --vduse NAME --add");
    // Asked for before anybody can meet the device: whoever finds it listening may stop it.
    const { signal } = this;
    await using device = await SimDevice.open(simOptions(kind, flags));
    if (signal.aborted) return;
    if (vduse !== undefined) {
      await serveVduse(this, device, vduse, flags.add);
      return;
    }
    if (flags.fd !== undefined) await serve(this, device, new UnixStream(new OwnedFd(flags.fd)));
    else await listen(this, device, flags.socketPath!);
  },
});

function simOptions(kind: Kind, flags: Flags): SimOptions {
  const { size, id, queues, num, latency, jitter, readOnly, packed } = flags;
  if (flags.file !== undefined && flags.blkFile !== undefined) {
    throw usageError("The disk is named twice", "--file and --blk-file mean the same");
  }
  const file = flags.file ?? flags.blkFile;
  if (kind !== "blk" && readOnly) throw usageError(`A ${kind} device cannot be read-only`);
  const { tap, cable, mac, mtu } = flags;
  if (kind !== "net" && (tap ?? cable ?? mac ?? mtu) !== undefined) {
    throw usageError("--tap, --cable, --mac and --mtu are of network devices");
  }
  return {
    kind,
    ...(file === undefined ? {} : { file }),
    ...(size === undefined ? {} : { size }),
    ...(id === undefined ? {} : { id }),
    ...(tap === undefined ? {} : { tap }),
    ...(cable === undefined ? {} : { cable }),
    ...(mac === undefined ? {} : { mac }),
    ...(mtu === undefined ? {} : { mtu }),
    // The kernel takes no VDUSE network device with a control queue.
    ...(queues !== undefined ? { queues } : kind === "net" && flags.vduse !== undefined ? { queues: 2 } : {}),
    ...(num === undefined ? {} : { num }),
    ...(latency === undefined ? {} : { latencyUs: latency / 1000 }),
    ...(jitter === undefined ? {} : { jitterUs: jitter / 1000 }),
    ...(readOnly ? { readOnly } : {}),
    ...(packed ? { packed } : {}),
  };
}

async function listen(context: CliContext, device: SimDevice, path: string): Promise<void> {
  const { signal, output } = context;
  using listener = listenUnix(path);
  aborted(signal).then(() => listener.close());
  output.info(`${device.info.address}: ready on ${path}`);
  while (!signal.aborted) {
    let stream: UnixStream;
    try {
      stream = await listener.accept();
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
    await serve(context, device, stream);
  }
}

// The disk outlives a front-end; rings and memory are the front-end's and go with it.
async function serve({ signal, output }: CliContext, device: SimDevice, stream: UnixStream): Promise<void> {
  const warn = (error: Error) => output.warn(`${device.info.address}: ${toErrorRecord(error).message}`);
  const server = new BackendServer(stream, device, { onError: warn });
  const stop = () => server.close();
  signal.addEventListener("abort", stop, { once: true });
  output.info(`${device.info.address}: a front-end came`);
  const error = await server.run();
  signal.removeEventListener("abort", stop);
  for (const reason of device.errors) warn(reason);
  if (error !== undefined && !signal.aborted) warn(error);
  await device.reset();
  await device.setMemTable([]);
  output.info(`${device.info.address}: the front-end left`);
}

/** Embedded devices. */
export const command = buildRouteMap({ routes: { run }, docs: { brief: "Run an embedded device" } });
