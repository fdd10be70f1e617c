/**
 * Ready-made flags and arguments, so that the same thing is written, checked and completed the same way everywhere.
 *
 * @module
 */
import { ADDRESS_OPTIONS, type DeviceAddress, parseDeviceAddress } from "../vhost/address.ts";
import { type IntegerBounds, parseAddress, parseDuration, parseInteger, parseNumberList, parseRate, parseSize } from "../units.ts";
import type { CliContext } from "./context.ts";
import { usageError } from "./usage.ts";

/** How a flag may be left out: optional, with a default, or not at all. */
export interface FlagOptions {
  /** The value may be undefined. */
  readonly optional?: boolean;
  /** As typed. */
  readonly default?: string;
  /** Upper case; each kind of flag has its own. */
  readonly placeholder?: string;
}

/** A flag with a parser, as @stricli/core takes it. OPTIONS is how it may be left out: optional, default, or not at all. */
export type ParsedFlag<T, OPTIONS> = {
  readonly kind: "parsed";
  readonly parse: (this: CliContext, input: string) => T;
  readonly brief: string;
  readonly placeholder: string;
} & OPTIONS;

function flagMaker<T>(placeholder: string, parse: (input: string) => T): {
  <const OPTIONS extends FlagOptions = Record<never, never>>(
    brief: string,
    options?: OPTIONS,
  ): ParsedFlag<T, OPTIONS>;
} {
  return <const OPTIONS extends FlagOptions = Record<never, never>>(brief: string, options?: OPTIONS) =>
    ({ kind: "parsed", parse, brief, placeholder, ...options }) as unknown as ParsedFlag<T, OPTIONS>;
}

/** A flag whose value is any text. */
export const textFlag: ReturnType<typeof flagMaker<string>> = flagMaker("TEXT", String);
/** A flag whose value is a path. */
export const pathFlag: ReturnType<typeof flagMaker<string>> = flagMaker("PATH", String);
/** A flag whose value is a duration, in nanoseconds. */
export const durationFlag: ReturnType<typeof flagMaker<number>> = flagMaker("TIME", parseDuration);
/** A flag whose value is the pause between two rounds that go on without end, in nanoseconds: looking without one takes what is looked at for itself. */
export const pauseFlag: ReturnType<typeof flagMaker<number>> = flagMaker("TIME", (text) => {
  const pause = parseDuration(text);
  if (pause > 0) return pause;
  throw usageError(`${text}: the pause between two rounds cannot be 0`, "for example 100ms");
});
/** A flag whose value is a size, in bytes. */
export const sizeFlag: ReturnType<typeof flagMaker<number>> = flagMaker("SIZE", parseSize);
/** A flag whose value is a list of sizes, `64MiB,1GiB`, in bytes. */
export const sizeListFlag: ReturnType<typeof flagMaker<number[]>> = flagMaker("SIZES", (text) => text.split(",").map(parseSize));
/** A flag whose value is a rate, in bytes per second. */
export const rateFlag: ReturnType<typeof flagMaker<number>> = flagMaker("RATE", parseRate);
/** A flag whose value is a u64 address. */
export const addressFlag: ReturnType<typeof flagMaker<bigint>> = flagMaker("ADDRESS", parseAddress);
/** A flag whose value says how long to poll, in microseconds, or `auto`. */
export const pollFlag: ReturnType<typeof flagMaker<number | "auto">> = flagMaker(
  "N",
  (text) => text === "auto" ? text : parseInteger(text, { max: 1_000_000 }),
);
/** A flag whose value is a list of numbers and ranges: `0-3,8`. */
export const numberListFlag: ReturnType<typeof flagMaker<number[]>> = flagMaker("LIST", (text) => parseNumberList(text));

/** A flag whose value is a whole number within bounds. */
export function integerFlag<const OPTIONS extends FlagOptions = Record<never, never>>(
  brief: string,
  options?: OPTIONS & IntegerBounds,
): ParsedFlag<number, OPTIONS> {
  const { min, max, ...rest } = options ?? {} as FlagOptions & IntegerBounds;
  const bounds = { ...(min === undefined ? {} : { min }), ...(max === undefined ? {} : { max }) };
  return flagMaker("N", (text) => parseInteger(text, bounds))(brief, rest) as unknown as ParsedFlag<number, OPTIONS>;
}

/** A flag whose value is a device address. */
export function deviceFlag<const OPTIONS extends FlagOptions = Record<never, never>>(
  brief: string,
  options?: OPTIONS,
): ParsedFlag<DeviceAddress, OPTIONS> {
  const flag = flagMaker("ADDRESS", parseDeviceAddress)(brief, options);
  return { ...flag, proposeCompletions: proposeAddresses } as ParsedFlag<DeviceAddress, OPTIONS>;
}

/** A positional argument as @stricli/core takes it. */
export interface ParsedArgument<T> {
  /** Text to value. */
  readonly parse: (this: CliContext, input: string) => T;
  /** One line. */
  readonly brief: string;
  /** Upper case. */
  readonly placeholder: string;
  /** Values for a partial word. */
  readonly proposeCompletions: (this: CliContext, partial: string) => readonly string[] | Promise<readonly string[]>;
}

/** The argument DEVICE; `SVQ_DEVICE` can hold a default. */
export function deviceArgument(brief = "Device address, e.g. /dev/vhost-vdpa-0, unix:PATH or sim:blk"): ParsedArgument<DeviceAddress> {
  return { parse: parseDeviceAddress, brief, placeholder: "DEVICE", proposeCompletions: proposeAddresses };
}

/** The argument NAME of a running relay. */
export function relayArgument(brief = "Name of a running relay"): ParsedArgument<string> {
  return {
    parse: String,
    brief,
    placeholder: "NAME",
    async proposeCompletions(partial) {
      const { relayNames } = await import("../relay/runtime_dir.ts");
      return relayNames().filter((name) => name.startsWith(partial));
    },
  };
}

/** Device addresses that begin with `partial`: what exists on this host, and the forms. */
export function proposeAddresses(partial: string): string[] {
  const comma = partial.lastIndexOf(",");
  if (comma >= 0) return proposeOptions(partial, comma);
  const path = /^(unix|listen|connect):(.*)$/.exec(partial);
  if (path !== null) return proposePaths(path[2]!).map((found) => `${path[1]}:${found}`);
  const found = [
    ...list("/dev").filter((name) => /^vhost-(vdpa-|net$)/.test(name)).map((name) => `/dev/${name}`),
    ...list("/sys/bus/vdpa/devices").map((name) => `vdpa:${name}`),
    ...["sim:blk", "sim:net", "sim:loopback", "unix:", "listen:", "connect:", "fd:"],
  ];
  return found.filter((address) => address.startsWith(partial));
}

function proposeOptions(partial: string, comma: number): string[] {
  const base = /^sim:(blk|net|loopback),/.exec(partial)?.[1] ?? (partial.startsWith("/dev/vhost-net,") ? "vhost-net" : undefined);
  if (base === undefined) return [];
  const typed = partial.slice(comma + 1);
  const file = /^file=(.*)$/.exec(typed);
  if (file !== null) return proposePaths(file[1]!).map((path) => `${partial.slice(0, comma)},file=${path}`);
  return Object.entries(ADDRESS_OPTIONS[base as keyof typeof ADDRESS_OPTIONS])
    .map(([key, type]) => type === "switch" ? key : `${key}=`)
    .filter((option) => option.startsWith(typed))
    .map((option) => `${partial.slice(0, comma)},${option}`);
}

function proposePaths(partial: string): string[] {
  const directory = partial.slice(0, partial.lastIndexOf("/") + 1);
  const name = partial.slice(directory.length);
  try {
    return [...Deno.readDirSync(directory === "" ? "." : directory)]
      .filter((entry) => entry.name.startsWith(name) && (name !== "" || !entry.name.startsWith(".")))
      .map((entry) => directory + entry.name + (entry.isDirectory ? "/" : ""))
      .sort();
  } catch {
    return [];
  }
}

function list(directory: string): string[] {
  try {
    return [...Deno.readDirSync(directory)].map((entry) => entry.name).sort();
  } catch {
    return [];
  }
}
