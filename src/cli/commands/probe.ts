/** `svq probe`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { openSim } from "../../devices/open.ts";
import { EXIT, fromErrorRecord, SvqError } from "../../errors.ts";
import { type DeviceAddress, formatDeviceAddress } from "../../vhost/address.ts";
import {
  describeBackend,
  describeFailure,
  describeSocket,
  describeVdpa,
  describeVhostNet,
  missingFeatures,
  type ProbedDevice,
  scanHost,
} from "../../vhost/probe.ts";
import { findByNode, nodeOfName } from "../../vhost/sysfs.ts";
import type { CliContext } from "../context.ts";
import { deviceArgument, durationFlag } from "../parameters.ts";
import { describeDevice, deviceTable } from "../probe_text.ts";
import { usageError } from "../usage.ts";

interface Flags {
  readonly open: boolean;
  readonly require?: readonly string[];
  readonly timeout: number;
}

const HOW_TO_GET_ONE = "No vhost or vDPA device is visible on this host.\n" +
  "  vDPA:      modprobe vhost_vdpa, then `vdpa mgmtdev show` and `vdpa dev add name NAME mgmtdev DEV`\n" +
  "  vhost-net: modprobe vhost_net\n" +
  "  sockets are found only by name:  svq probe unix:PATH\n" +
  "  without any hardware:            svq probe sim:blk";

/** Lists or describes devices. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "List vhost and vDPA devices, and say what each can do",
    fullDescription:
      "Without arguments lists what this host has; nothing is opened. With --open, or for devices that are named, asks each device: " +
      "features, queues, address range, configuration, and which relay modes and migration are possible, with what is missing.\n\n" +
      "Opening a vhost-vdpa device resets it: do not do that while a VM is about to use it. A vhost-user socket is sent GET messages only; " +
      "daemons that serve one connection exit after it.\n\n" +
      "With --require, exit 5 when a device lacks a feature.\n\n" +
      "Examples:\n  svq probe\n  svq probe --open -j\n  svq probe /dev/vhost-vdpa-0 --require EVENT_IDX,backend:SUSPEND",
  },
  parameters: {
    flags: {
      open: { kind: "boolean", brief: "Ask every device that is found, too", default: false },
      require: {
        kind: "parsed",
        parse: String,
        brief: "Features that each device must have; backend:NAME for backend and protocol features",
        placeholder: "FEATURE",
        variadic: ",",
        optional: true,
      },
      timeout: durationFlag("How long a vhost-user back-end may take for an answer", { default: "2s" }),
    },
    positional: { kind: "array", parameter: deviceArgument() },
  },
  async func(this: CliContext, flags: Flags, ...addresses: DeviceAddress[]): Promise<void> {
    const wanted = flags.require ?? [];
    if (wanted.length > 0 && addresses.length === 0 && !flags.open) {
      throw usageError("--require needs devices that are asked", "name devices, or add --open");
    }
    const timeoutMs = Math.max(1, flags.timeout / 1e6);
    const devices = addresses.length > 0
      ? await Promise.all(addresses.map((address) => describe(address, timeoutMs)))
      : scanHost().map((device) => flags.open ? open(device) : device);
    const document = { schema: "svq.probe/1", devices, ...(devices.length === 0 ? { hint: HOW_TO_GET_ONE } : {}) };
    this.output.document(document, () => {
      if (devices.length === 0) return HOW_TO_GET_ONE;
      if (addresses.length === 0 && !flags.open) return deviceTable(devices, this.output.paint);
      return devices.map((device) => describeDevice(device, this.output.paint)).join("\n\n");
    });
    check(devices, wanted, addresses.length > 0);
  },
});

async function describe(address: DeviceAddress, timeoutMs: number): Promise<ProbedDevice> {
  const text = formatDeviceAddress(address);
  try {
    switch (address.kind) {
      case "vhost-vdpa":
        return describeVdpa(address.path, findByNode(address.path));
      case "vdpa": {
        const listing = nodeOfName(address.name);
        return describeVdpa(listing.node, listing);
      }
      case "vhost-net":
        return describeVhostNet(address.path);
      case "sim": {
        await using device = await openSim(address);
        return await describeBackend(text, device);
      }
      case "vhost-user":
        if (address.how === "listen") break;
        return await describeSocket(address.path, text, timeoutMs);
    }
  } catch (error) {
    return describeFailure(text, address.kind, error);
  }
  throw usageError(`${text} cannot be probed`, "name a node, vdpa:NAME, unix:PATH of a listening back-end, or sim:…");
}

function open(device: ProbedDevice): ProbedDevice {
  if (device.kind === "vhost-net") return describeVhostNet(device.address);
  if (device.kind !== "vhost-vdpa") return device;
  return describeVdpa(device.address, findByNode(device.address));
}

// One device that fails hides no other: all is printed before this. In a scan a device in use is no failure.
function check(devices: readonly ProbedDevice[], wanted: readonly string[], named: boolean): void {
  const failed = devices.find((device) => device.error !== null);
  if (failed?.error && (named || wanted.length > 0)) throw fromErrorRecord(failed.error);
  for (const device of devices) {
    if (!device.opened) continue;
    const missing = missingFeatures(device, wanted);
    if (missing.length > 0) {
      throw new SvqError("MISSING_FEATURE", `${device.address} lacks ${missing.join(", ")}`, {
        exitCode: EXIT.missingFeature,
        hint: `It offers ${[...device.feature_names ?? [], ...device.backend_feature_names ?? []].join(", ")}`,
      });
    }
  }
}
