/**
 * Which vDPA devices this host has, from /sys/bus/vdpa, /dev and netlink: a look that opens no device. Opening a free
 * vhost-vdpa device would reset it, and could make a VM that is about to start fail.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { listVdpaDevices, type NetlinkVdpa } from "./netlink.ts";

/** A device on the vdpa bus. */
export interface VdpaListing {
  /** Name on the bus. */
  name: string;
  /** `vhost_vdpa`, `virtio_vdpa`; undefined: no driver bound. */
  busDriver: string | undefined;
  /** `/dev/vhost-vdpa-N`, where vhost_vdpa has it. */
  node: string | undefined;
  /** The device that it belongs to: a PCI address, or the name of a virtual device; undefined: none. */
  parent: string | undefined;
  /** Parent driver: `vp-vdpa`, `vdpasim_blk`, `vduse`, `mlx5_core.sf`. */
  driver: string | undefined;
  /** Management device, as `vdpa mgmtdev show` names it. */
  managementDevice: string | undefined;
  /** Virtio device id, where netlink told it. */
  deviceId: number | undefined;
  /** Addresses that the IOMMU in front of it keeps for itself (interrupts, firmware); absent where none are known. */
  reserved?: readonly { first: bigint; last: bigint; tag: string }[];
}

/** Where to look; tests give trees of their own. */
export interface SysfsPlaces {
  /** Default /sys. */
  sys?: string;
  /** Default /dev. */
  dev?: string;
  /** Default {@linkcode listVdpaDevices}. */
  netlink?: () => NetlinkVdpa[];
}

/** All devices on the vdpa bus, by name. */
export function scanVdpa(places: SysfsPlaces = {}): VdpaListing[] {
  const { sys = "/sys", dev = "/dev", netlink = listVdpaDevices } = places;
  const bus = `${sys}/bus/vdpa/devices`;
  const devices = names(bus).sort();
  if (devices.length === 0) return [];
  let known: NetlinkVdpa[] = [];
  try {
    known = netlink();
  } catch (error) {
    // sysfs alone tells most of it.
    if (!(error instanceof SvqError)) throw error;
  }
  return devices.map((name) => {
    const info = known.find((one) => one.name === name);
    const place = `${bus}/${name}`;
    const node = names(place).find((entry) => /^vhost-vdpa-\d+$/.test(entry));
    return {
      name,
      busDriver: linkName(`${place}/driver`),
      node: node === undefined ? undefined : `${dev}/${node}`,
      parent: parentOf(place, sys),
      driver: parentDriver(place, info),
      managementDevice: info?.managementDevice,
      deviceId: info?.deviceId,
      ...reservedOf(place),
    };
  });
}

/** The listing behind a node (`/dev/vhost-vdpa-0`); undefined where sysfs has none. */
export function findByNode(path: string, places?: SysfsPlaces): VdpaListing | undefined {
  return scanVdpa(places).find((device) => device.node === path);
}

/**
 * The node of a device on the vdpa bus.
 *
 * @throws SvqError NO_SUCH_DEVICE, MODULE_MISSING (no driver has it), NOT_VHOST (another driver has it)
 */
export function nodeOfName(name: string, places?: SysfsPlaces): VdpaListing & { node: string } {
  const all = scanVdpa(places);
  const found = all.find((device) => device.name === name);
  if (found === undefined) {
    const hint = all.length > 0
      ? `There are: ${all.map((device) => device.name).join(", ")}`
      : "There are none: modprobe vhost_vdpa, then `vdpa dev add name NAME mgmtdev DEV`; `vdpa mgmtdev show` lists DEV";
    throw new SvqError("NO_SUCH_DEVICE", `There is no vDPA device ${name}`, { exitCode: EXIT.noDevice, hint });
  }
  const { node, busDriver } = found;
  if (node !== undefined) return { ...found, node };
  if (busDriver === undefined) {
    throw new SvqError("MODULE_MISSING", `vDPA device ${name} has no driver, so it has no node in /dev`, {
      exitCode: EXIT.noDevice,
      hint: "Load the module: modprobe vhost_vdpa",
    });
  }
  throw new SvqError("NOT_VHOST", `vDPA device ${name} is used by ${busDriver}, so it has no node in /dev`, {
    exitCode: EXIT.noDevice,
    hint:
      `Give it to vhost_vdpa: echo ${name} > /sys/bus/vdpa/drivers/${busDriver}/unbind; echo ${name} > /sys/bus/vdpa/drivers/vhost_vdpa/bind`,
  });
}

// /sys/bus/vdpa/devices/NAME -> ../../../devices/pci0000:00/0000:00:05.0/NAME
function parentOf(place: string, sys: string): string | undefined {
  const parent = realPath(place)?.replace(/\/[^/]*$/, "");
  if (parent === undefined || parent === `${realPath(sys)}/devices` || parent.endsWith("/virtual")) return undefined;
  return parent.replace(/^.*\//, "");
}

function parentDriver(place: string, info: NetlinkVdpa | undefined): string | undefined {
  const own = realPath(place);
  const bound = own === undefined ? undefined : linkName(`${own}/../driver`);
  if (bound !== undefined) return bound;
  // Virtual devices have no driver of their own; their management device is named after it.
  const device = info?.managementDevice;
  return device === undefined || device.includes("/") ? undefined : device;
}

// Lines like "0x00000000fee00000 0x00000000feefffff msi". What firmware once used and does not any more (direct-relaxable) is free.
function reservedOf(place: string): Pick<VdpaListing, "reserved"> {
  const own = realPath(place);
  if (own === undefined) return {};
  let text: string;
  try {
    text = Deno.readTextFileSync(`${own}/../iommu_group/reserved_regions`);
  } catch {
    return {};
  }
  const found = text.split("\n").map((line) => /^(0x[0-9a-f]+) (0x[0-9a-f]+) (\S+)$/i.exec(line)).filter((match) => match !== null);
  const reserved = found.filter((match) => match[3] !== "direct-relaxable")
    .map((match) => ({ first: BigInt(match[1]!), last: BigInt(match[2]!), tag: match[3]! }));
  return reserved.length === 0 ? {} : { reserved };
}

function names(directory: string): string[] {
  try {
    return Array.from(Deno.readDirSync(directory), (entry) => entry.name);
  } catch {
    return [];
  }
}

function linkName(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path).replace(/^.*\//, "");
  } catch {
    return undefined;
  }
}

function realPath(path: string): string | undefined {
  try {
    return Deno.realPathSync(path);
  } catch {
    return undefined;
  }
}
