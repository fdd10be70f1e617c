/**
 * Sizes, durations, addresses and numbers as people write them. Pure; below every room, like errors.ts.
 *
 * Sizes are bytes: `K`, `KiB` and so on are powers of 1024 (as in QEMU), `kB`, `MB`, `GB`, `TB` powers of 1000. Durations
 * are nanoseconds.
 *
 * @module
 */
import { EXIT, SvqError } from "./errors.ts";

function bad(message: string, hint: string): SvqError {
  return new SvqError("USAGE", message, { exitCode: EXIT.usage, hint });
}

const SIZE_UNITS: Record<string, number> = {
  "": 1,
  B: 1,
  K: 2 ** 10,
  KiB: 2 ** 10,
  M: 2 ** 20,
  MiB: 2 ** 20,
  G: 2 ** 30,
  GiB: 2 ** 30,
  T: 2 ** 40,
  TiB: 2 ** 40,
  kB: 1e3,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
};
const SIZE_HINT = "write a size like 4096, 64MiB or 1.5G";

/** Bytes of `64MiB`, `1.5G`, `4096` or `0x1000`. @throws SvqError USAGE */
export function parseSize(text: string): number {
  if (/^0x[0-9a-f]+$/i.test(text)) return exact(Number(text), text);
  const match = /^(\d+(?:\.\d+)?)\s*([A-Za-z]*)$/.exec(text);
  if (match === null) throw bad(`Bad size: ${quote(text)}`, SIZE_HINT);
  const suffix = match[2]!;
  const unit = SIZE_UNITS[suffix] ?? (suffix.length === 1 ? SIZE_UNITS[suffix.toUpperCase()] : undefined);
  if (unit === undefined) throw bad(`Bad size: ${quote(text)} (unit ${suffix})`, SIZE_HINT);
  return exact(Number(match[1]) * unit, text);
}

function exact(bytes: number, text: string): number {
  const whole = Math.round(bytes);
  if (whole > Number.MAX_SAFE_INTEGER) throw bad(`Bad size: ${quote(text)} is too large`, SIZE_HINT);
  if (Math.abs(whole - bytes) > 1e-6) throw bad(`Bad size: ${quote(text)} is not a whole number of bytes`, SIZE_HINT);
  return whole;
}

/** Bytes per second of `32MiB`, `32MiB/s` or `1Gbit` (decimal bits). @throws SvqError USAGE */
export function parseRate(text: string): number {
  const bits = /^(\d+(?:\.\d+)?)\s*([kMG]?)(?:bit|bps)(?:\/s)?$/.exec(text);
  if (bits !== null) {
    return exact(Math.floor(Number(bits[1]) * { "": 1, k: 1e3, M: 1e6, G: 1e9 }[bits[2] as "" | "k" | "M" | "G"] / 8), text);
  }
  return parseSize(text.replace(/\/s$/, ""));
}

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB"] as const;

/** A size for people, rounded to three digits: `64 MiB`, `1.46 GiB`. */
export function formatSize(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < BINARY.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${rounded(value)} ${BINARY[unit]}`;
}

/** A size that {@linkcode parseSize} reads back to the same number: `64MiB`, `4097`. */
export function formatSizeExact(bytes: number): string {
  for (let unit = BINARY.length - 1; unit > 0; unit--) {
    if (bytes >= 1024 ** unit && bytes % 1024 ** unit === 0) return `${bytes / 1024 ** unit}${BINARY[unit]}`;
  }
  return String(bytes);
}

const DURATION_UNITS: Record<string, number> = { ns: 1, us: 1e3, µs: 1e3, μs: 1e3, ms: 1e6, s: 1e9, m: 60e9, min: 60e9, h: 3600e9 };
const DURATION_HINT = "write a duration like 8s, 500ms, 100us or 1m30s";

/** Nanoseconds of `8s`, `500ms`, `100us`, `1m30s`; a number without unit is refused, except 0. @throws SvqError USAGE */
export function parseDuration(text: string): number {
  if (text === "0") return 0;
  const part = /(\d+(?:\.\d+)?)(ns|us|µs|μs|ms|min|s|m|h)/g;
  let total = 0;
  let end = 0;
  for (let match = part.exec(text); match !== null; match = part.exec(text)) {
    if (match.index !== end) break;
    total += Number(match[1]) * DURATION_UNITS[match[2]!]!;
    end = part.lastIndex;
  }
  if (text === "" || end !== text.length) throw bad(`Bad duration: ${quote(text)}`, DURATION_HINT);
  if (total > Number.MAX_SAFE_INTEGER) throw bad(`Bad duration: ${quote(text)} is too long`, DURATION_HINT);
  return Math.round(total);
}

/** A duration for people, rounded to three digits: `1.5 ms`, `8 s`, `2 min 5 s`. */
export function formatDuration(ns: number): string {
  if (ns < 1e3) return `${rounded(ns)} ns`;
  if (ns < 1e6) return `${rounded(ns / 1e3)} us`;
  if (ns < 1e9) return `${rounded(ns / 1e6)} ms`;
  if (ns < 120e9) return `${rounded(ns / 1e9)} s`;
  const seconds = Math.round(ns / 1e9);
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
}

/** A duration that {@linkcode parseDuration} reads back to the same number: `500ms`, `1500us`. */
export function formatDurationExact(ns: number): string {
  if (ns === 0) return "0";
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]] as const) if (ns % size === 0) return `${ns / size}${unit}`;
  return `${ns}ns`;
}

function rounded(value: number): string {
  const digits = value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}

/** A number for people: `1,234,567`. */
export function formatCount(value: number): string {
  return String(value).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** A u64 as documents carry it: `0x1f`. */
export function hexU64(value: bigint | number): string {
  const unsigned = BigInt.asUintN(64, BigInt(value));
  return `0x${unsigned.toString(16)}`;
}

/** A u64: `0x1000`, decimal, or with a size unit (`4GiB`). @throws SvqError USAGE */
export function parseAddress(text: string): bigint {
  if (/^(0x[0-9a-f]{1,16}|\d{1,20})$/i.test(text)) {
    const value = BigInt(text);
    if (value < 1n << 64n) return value;
  } else if (/^\d/.test(text)) {
    return BigInt(parseSize(text));
  }
  throw bad(`Bad address: ${quote(text)}`, "write an address like 0x100000000 or 4GiB, below 2^64");
}

/** Bounds for {@linkcode parseInteger}. */
export interface IntegerBounds {
  /** Lowest number allowed (default 0). */
  min?: number;
  /** Highest number allowed (default 2^53 - 1). */
  max?: number;
}

/** A whole number, decimal or `0x…`, within bounds. @throws SvqError USAGE */
export function parseInteger(text: string, bounds: IntegerBounds = {}): number {
  const { min = 0, max = Number.MAX_SAFE_INTEGER } = bounds;
  const value = /^(-?\d+|0x[0-9a-f]+)$/i.test(text) ? Number(text) : NaN;
  if (!Number.isSafeInteger(value)) throw bad(`Bad number: ${quote(text)}`, "write a whole number");
  if (value < min || value > max) {
    const upper = max === Number.MAX_SAFE_INTEGER ? "" : ` and at most ${max}`;
    throw bad(`Bad number: ${quote(text)} is out of range`, `it must be at least ${min}${upper}`);
  }
  return value;
}

/** A list of numbers and ranges: `0-3,8` gives 0, 1, 2, 3, 8. @throws SvqError USAGE */
export function parseNumberList(text: string, bounds: IntegerBounds = { max: 65535 }): number[] {
  const numbers = new Set<number>();
  for (const part of text.split(",")) {
    const [first, last, rest] = part.split("-");
    if (rest !== undefined) throw bad(`Bad list of numbers: ${quote(text)}`, "write a list like 0-3,8");
    const low = parseInteger(first!, bounds);
    const high = last === undefined ? low : parseInteger(last, bounds);
    if (high < low) throw bad(`Bad list of numbers: ${quote(text)}`, "a range goes upwards: 0-3");
    for (let i = low; i <= high; i++) numbers.add(i);
  }
  return [...numbers];
}

/** `text` in quotes where it would be hard to see otherwise. */
export function quote(text: string): string {
  return /^[\w./:=,@+-]+$/.test(text) ? text : JSON.stringify(text);
}
