/**
 * Device addresses: the same word in every command.
 *
 *     /dev/vhost-vdpa-0  vdpa:NAME  /dev/vhost-net[,tap=IFNAME]      the kernel's devices
 *     unix:PATH  listen:PATH  connect:PATH  fd:N                     vhost-user
 *     sim:blk[,file=PATH|,size=SIZE,…]  sim:net[,…]  sim:loopback    embedded devices
 *
 * Options follow a comma; a comma inside a path or a value is written twice. Pure: nothing is opened here.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { suggest, suggestionHint } from "../suggest.ts";
import { formatDurationExact, formatSizeExact, parseDuration, parseInteger, parseSize, quote } from "../units.ts";

/** A vhost-vdpa character device, by its path. */
export interface VdpaPathAddress {
  /** Discriminator. */
  kind: "vhost-vdpa";
  /** E.g. `/dev/vhost-vdpa-0`. */
  path: string;
}

/** A device on the vdpa bus, by its name there; its character device is looked up in /sys/bus/vdpa. */
export interface VdpaNameAddress {
  /** Discriminator. */
  kind: "vdpa";
  /** E.g. `vdpa0`. */
  name: string;
}

/** The kernel's vhost-net. */
export interface VhostNetAddress {
  /** Discriminator. */
  kind: "vhost-net";
  /** Normally `/dev/vhost-net`. */
  path: string;
  /** Interface name of the tap behind it. */
  tap?: string;
}

/** A vhost-user socket. */
export interface VhostUserAddress {
  /** Discriminator. */
  kind: "vhost-user";
  /**
   * Who opens it: `connect` and `listen` say so; `unix` means the usual way, which is to connect to a device and to listen
   * for a front-end.
   */
  how: "unix" | "connect" | "listen";
  /** Path of the socket. */
  path: string;
}

/** A connected or listening vhost-user socket that this process has inherited. */
export interface FdAddress {
  /** Discriminator. */
  kind: "fd";
  /** Number of the descriptor. */
  fd: number;
}

/** What embedded devices have in common. */
export interface SimCommonOptions {
  /** Queues (net: queues, not pairs). */
  queues?: number;
  /** Largest ring size in descriptors. */
  num?: number;
  /** Time that each request takes at least, ns: stands for real hardware. */
  latency?: number;
  /** Random time added to each request, at most, ns: completions come out of order. */
  jitter?: number;
  /** Offers VIRTIO_F_RING_PACKED. */
  packed?: boolean;
  /** Name in messages and counters. */
  name?: string;
}

/** An embedded block device. */
export interface SimBlkAddress extends SimCommonOptions {
  /** Discriminator. */
  kind: "sim";
  /** What it is. */
  device: "blk";
  /** Image file; without one the disk is in memory. */
  file?: string;
  /** Bytes; with `file`, the file is made that long when it does not exist. */
  size?: number;
  /** Offers VIRTIO_BLK_F_RO. */
  ro?: boolean;
  /** What VIRTIO_BLK_T_GET_ID answers, at most 20 bytes. */
  id?: string;
}

/** An embedded network device. */
export interface SimNetAddress extends SimCommonOptions {
  /** Discriminator. */
  kind: "sim";
  /** What it is. */
  device: "net";
  /** Interface name of a tap that carries its frames. */
  tap?: string;
  /** Name of a cable: two devices of one process with the same name are connected. */
  cable?: string;
  /** MAC address, `xx:xx:xx:xx:xx:xx`, lower case. */
  mac?: string;
  /** Largest frame payload in bytes. */
  mtu?: number;
}

/** An embedded device that returns every buffer: what it reads is written back into the chain's writable part. */
export interface SimLoopbackAddress extends SimCommonOptions {
  /** Discriminator. */
  kind: "sim";
  /** What it is. */
  device: "loopback";
}

/** An embedded device. */
export type SimAddress = SimBlkAddress | SimNetAddress | SimLoopbackAddress;

/** A parsed device address. */
export type DeviceAddress = VdpaPathAddress | VdpaNameAddress | VhostNetAddress | VhostUserAddress | FdAddress | SimAddress;

/** How the values of an option are written. */
export type AddressOptionType = "text" | "path" | "size" | "duration" | "count" | "switch" | "mac" | "id";

const COMMON = { queues: "count", num: "count", latency: "duration", jitter: "duration", packed: "switch", name: "text" } as const;

/** Options by what they belong to, for parsing and for completions. */
export const ADDRESS_OPTIONS: Readonly<Record<"vhost-net" | "blk" | "net" | "loopback", Readonly<Record<string, AddressOptionType>>>> = {
  "vhost-net": { tap: "text" },
  blk: { file: "path", size: "size", ro: "switch", id: "id", ...COMMON },
  net: { tap: "text", cable: "text", mac: "mac", mtu: "count", ...COMMON },
  loopback: COMMON,
};

const FORMS = ["/dev/vhost-vdpa-N", "vdpa:NAME", "/dev/vhost-net[,tap=IF]", "unix:PATH", "listen:PATH", "connect:PATH", "fd:N"];
const SIMS = ["blk", "net", "loopback"] as const;
const SCHEMES = ["vdpa", "unix", "listen", "connect", "fd", "sim"] as const;
/** What a device address may look like, for messages. */
export const ADDRESS_FORMS: readonly string[] = [...FORMS, ...SIMS.map((device) => `sim:${device}`)];

function bad(message: string, hint: string): SvqError {
  return new SvqError("USAGE", message, { exitCode: EXIT.usage, hint });
}

/** Parses a device address. @throws SvqError USAGE with the forms or options that exist */
export function parseDeviceAddress(text: string): DeviceAddress {
  const [base = "", ...options] = splitCommas(text);
  if (base.startsWith("/")) return pathAddress(base, options, text);
  const colon = base.indexOf(":");
  const scheme = colon < 0 ? base : base.slice(0, colon);
  const rest = colon < 0 ? "" : base.slice(colon + 1);
  switch (scheme) {
    case "vdpa":
      refuseOptions(options, text);
      if (!/^[^/\s]+$/.test(rest)) throw bad(`Bad device address: ${quote(text)}`, "write vdpa:NAME as in /sys/bus/vdpa/devices");
      return { kind: "vdpa", name: rest };
    case "unix":
    case "listen":
    case "connect":
      refuseOptions(options, text);
      if (rest === "") throw bad(`Bad device address: ${quote(text)}`, `write ${scheme}:PATH`);
      return { kind: "vhost-user", how: scheme, path: rest };
    case "fd":
      refuseOptions(options, text);
      return { kind: "fd", fd: parseInteger(rest, { max: 2 ** 31 - 1 }) };
    case "sim":
      return simAddress(rest, options, text);
    default: {
      const near = suggest(scheme, SCHEMES);
      const known = `an address is one of ${ADDRESS_FORMS.join(", ")}`;
      throw bad(`Bad device address: ${quote(text)}`, near.length > 0 ? `did you mean ${near[0]}:…?` : known);
    }
  }
}

function pathAddress(path: string, options: readonly string[], text: string): DeviceAddress {
  if (/vhost-net$/.test(path)) return { kind: "vhost-net", path, ...parseOptions("vhost-net", options, text) };
  if (/vhost-vdpa[^/]*$/.test(path)) {
    refuseOptions(options, text);
    return { kind: "vhost-vdpa", path };
  }
  throw bad(`Bad device address: ${quote(text)}`, `for a vhost-user socket write unix:${path}; an image file is sim:blk,file=${path}`);
}

function simAddress(device: string, options: readonly string[], text: string): SimAddress {
  switch (device) {
    case "blk":
      return { kind: "sim", device, ...parseOptions("blk", options, text) };
    case "net":
      return { kind: "sim", device, ...parseOptions("net", options, text) };
    case "loopback":
      return { kind: "sim", device, ...parseOptions("loopback", options, text) };
    default:
      throw bad(`Unknown embedded device: ${quote(text)}`, suggestionHint(device, SIMS, "devices"));
  }
}

function refuseOptions(options: readonly string[], text: string): void {
  if (options.length === 0) return;
  throw bad(`${quote(text)}: this kind of address has no options`, "a comma inside a path is written twice");
}

function parseOptions(owner: keyof typeof ADDRESS_OPTIONS, options: readonly string[], text: string): Record<string, never> {
  const known = ADDRESS_OPTIONS[owner];
  const result: Record<string, unknown> = {};
  for (const option of options) {
    const equals = option.indexOf("=");
    const key = equals < 0 ? option : option.slice(0, equals);
    const value = equals < 0 ? undefined : option.slice(equals + 1);
    const type = Object.hasOwn(known, key) ? known[key] : undefined;
    if (type === undefined) {
      throw bad(`${quote(text)}: unknown option ${JSON.stringify(key)}`, suggestionHint(key, Object.keys(known), "options"));
    }
    if (key in result) throw bad(`${quote(text)}: option ${key} is given twice`, "give it once");
    if (type !== "switch" && (value === undefined || value === "")) {
      throw bad(`${quote(text)}: option ${key} needs a value`, `write ${key}=${EXAMPLES[type]}`);
    }
    result[key] = optionValue(type, key, value);
  }
  // Keys and types are those of the table, which the address types repeat.
  return result as Record<string, never>;
}

const EXAMPLES: Record<AddressOptionType, string> = {
  text: "NAME",
  path: "PATH",
  size: "64MiB",
  duration: "100us",
  count: "4",
  switch: "on",
  mac: "52:54:00:12:34:56",
  id: "serial",
};

function optionValue(type: AddressOptionType, key: string, value = "on"): unknown {
  switch (type) {
    case "size":
      return parseSize(value);
    case "duration":
      return parseDuration(value);
    case "count":
      return parseInteger(value, { min: 1, max: key === "queues" ? 256 : 65535 });
    case "switch":
      if (value !== "on" && value !== "off") throw bad(`Bad value for ${key}: ${quote(value)}`, `write ${key}, ${key}=on or ${key}=off`);
      return value === "on";
    case "mac":
      if (!/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/i.test(value)) throw bad(`Bad MAC address: ${quote(value)}`, `write ${EXAMPLES.mac}`);
      return value.toLowerCase();
    case "id":
      if (new TextEncoder().encode(value).length > 20) throw bad(`Bad id: ${quote(value)} is too long`, "at most 20 bytes");
      return value;
    case "text":
    case "path":
      return value;
  }
}

/** The address as {@linkcode parseDeviceAddress} reads it back. */
export function formatDeviceAddress(address: DeviceAddress): string {
  switch (address.kind) {
    case "vhost-vdpa":
      return escapeCommas(address.path);
    case "vdpa":
      return `vdpa:${escapeCommas(address.name)}`;
    case "vhost-net":
      return escapeCommas(address.path) + formatOptions("vhost-net", address);
    case "vhost-user":
      return `${address.how}:${escapeCommas(address.path)}`;
    case "fd":
      return `fd:${address.fd}`;
    case "sim":
      return `sim:${address.device}${formatOptions(address.device, address)}`;
  }
}

function formatOptions(owner: keyof typeof ADDRESS_OPTIONS, values: object): string {
  let text = "";
  for (const [key, type] of Object.entries(ADDRESS_OPTIONS[owner])) {
    const value: unknown = (values as Record<string, unknown>)[key];
    if (value === undefined) continue;
    if (type === "switch") text += value === true ? `,${key}` : `,${key}=off`;
    else if (type === "size") text += `,${key}=${formatSizeExact(value as number)}`;
    else if (type === "duration") text += `,${key}=${formatDurationExact(value as number)}`;
    else text += `,${key}=${escapeCommas(String(value))}`;
  }
  return text;
}

function escapeCommas(text: string): string {
  return text.replaceAll(",", ",,");
}

/** Splits at single commas; two commas stand for one. */
function splitCommas(text: string): string[] {
  const parts: string[] = [];
  let part = "";
  for (let i = 0; i < text.length; i++) {
    if (text[i] !== ",") {
      part += text[i];
    } else if (text[i + 1] === ",") {
      part += text[i++];
    } else {
      parts.push(part);
      part = "";
    }
  }
  return [...parts, part];
}
