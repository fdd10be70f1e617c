/**
 * Memory maps as people have them at hand, turned into guest regions for {@linkcode planIova}:
 *
 * - lines `FIRST-LAST` (inclusive) or `START+SIZE`, then optionally `=IOVA` (fixed placement) and a name; `#` begins a comment;
 * - /proc/iomem of the guest: lines named `System RAM` count, others are passed over;
 * - QEMU's `info mtree -f`: the `ram` lines of the flat view of address space `memory`;
 * - JSON: `[{"gpa": "0x0", "size_bytes": 2147483648}]`, or a document with such an array under `regions` (`svq.iova/1`).
 *
 * The maps of a real machine (iomem, mtree) may end inside a page: such ends are left out, because nobody maps them.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";
import { parseAddress, quote } from "../units.ts";
import type { RegionRequest } from "./plan.ts";
import { checkRange, type IovaRange, type ReservedRange, shrinkToPages } from "./range.ts";

const IOMEM_LINE = /^\s*([0-9a-f]{2,16})-([0-9a-f]{2,16}) : (.*?)\s*$/;
const MTREE_LINE = /^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]+)\): (.*?)\s*$/;
const PAGE = 4096n;

/** As {@linkcode parseAddress}, with a hint for hexadecimal digits without 0x. */
function parseNumber(text: string): bigint {
  const word = text.trim();
  if (/^[0-9a-f]+$/i.test(word) && /[a-f]/i.test(word)) {
    throw new SvqError("USAGE", `Bad address: ${word}`, { exitCode: EXIT.usage, hint: `hexadecimal numbers begin with 0x: 0x${word}` });
  }
  return parseAddress(word);
}

/**
 * A range `FIRST-LAST` (both inclusive) or `START+SIZE`.
 *
 * @throws {SvqError} USAGE, IOVA_INVALID
 */
export function parseRange(text: string): IovaRange {
  const match = /^\s*([^\s+-]+)\s*([-+])\s*([^\s+-]+)\s*$/.exec(text);
  if (match === null) {
    throw new SvqError("USAGE", `Bad range: ${quote(text)}`, {
      exitCode: EXIT.usage,
      hint: "Write FIRST-LAST (both inclusive), e.g. 0x0-0x7fffffff, or START+SIZE, e.g. 0x100000000+2GiB.",
    });
  }
  const first = parseNumber(match[1]!);
  const second = parseNumber(match[3]!);
  const range = { first, last: match[2] === "-" ? second : first + second - 1n };
  checkRange(range);
  return range;
}

/** A reserved hole: a range with an optional `=NAME`, e.g. `0xfee00000-0xfeefffff=msi`. @throws {SvqError} as {@linkcode parseRange} */
export function parseReserved(text: string): ReservedRange {
  const at = text.indexOf("=");
  return at < 0 ? parseRange(text) : { ...parseRange(text.slice(0, at)), tag: text.slice(at + 1) };
}

/**
 * One guest region: a range, then optionally `=IOVA` and a name after a space.
 *
 * @throws {SvqError} as {@linkcode parseRange}; IOVA_ADDRESS_LIMIT above 2^52
 */
export function parseRegion(text: string): RegionRequest {
  const match = /^\s*([^\s=+-]+\s*[-+]\s*[^\s=]+)(?:\s*=\s*(\S+))?(?:\s+(.*?))?\s*$/.exec(text);
  const region = toRegion(parseRange(match?.[1] ?? text));
  if (match?.[2] !== undefined) region.iova = toNumber(parseNumber(match[2]));
  if (match?.[3]) region.name = match[3].replace(/^:\s*/, "");
  return region;
}

/**
 * Guest regions of a memory map in any of the forms above, in the map's order.
 *
 * @throws {SvqError} MEMORY_MAP_INVALID naming the line or entry, MEMORY_MAP_EMPTY
 */
export function parseMemoryMap(text: string): RegionRequest[] {
  let regions: RegionRequest[];
  if (/^\s*[[{]/.test(text)) regions = parseJson(text);
  else if (/\(prio -?\d+, /.test(text)) regions = parseMtree(text);
  else regions = parseLines(text);
  if (regions.length > 0) return regions;
  throw new SvqError("MEMORY_MAP_EMPTY", "The memory map holds no guest memory", {
    exitCode: EXIT.usage,
    hint: "Give lines like 0x0-0x7fffffff, /proc/iomem read as root in the guest, QEMU's info mtree -f, or JSON [{gpa, size_bytes}].",
  });
}

function parseLines(text: string): RegionRequest[] {
  const regions: RegionRequest[] = [];
  let hidden = false;
  text.split(/\r?\n/).forEach((line, index) => {
    const content = line.replace(/#.*/, "");
    if (content.trim() === "") return;
    const iomem = IOMEM_LINE.exec(content);
    at(`Line ${index + 1}`, line, () => {
      if (iomem === null) {
        regions.push(parseRegion(content));
      } else if (iomem[3]!.startsWith("System RAM")) {
        hidden ||= /^0+$/.test(iomem[2]!);
        pushPages(regions, iomem[1]!, iomem[2]!, iomem[3]!);
      }
    });
  });
  if (hidden) {
    throw new SvqError("MEMORY_MAP_INVALID", "The addresses in this /proc/iomem are all zero: the kernel hid them", {
      exitCode: EXIT.usage,
      hint: "Read /proc/iomem as root in the guest.",
    });
  }
  return regions;
}

/** One flat view follows the other; each begins with the address spaces that have it. */
function parseMtree(text: string): RegionRequest[] {
  const regions: RegionRequest[] = [];
  const hasViews = /^FlatView/m.test(text);
  let wanted = !hasViews;
  text.split(/\r?\n/).forEach((line, index) => {
    if (/^FlatView/.test(line)) wanted = false;
    else if (/^\s*AS "memory"/.test(line)) wanted = true;
    const match = MTREE_LINE.exec(line);
    if (match === null || !wanted || match[3] !== "ram") return;
    at(`Line ${index + 1}`, line, () => pushPages(regions, match[1]!, match[2]!, match[4]!.replace(/ (@[0-9a-f]+|KVM)/g, "")));
  });
  return regions;
}

function parseJson(text: string): RegionRequest[] {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw mapError(`The memory map is not JSON: ${(cause as Error).message}`, undefined, cause);
  }
  if (isRecord(value) && Array.isArray(value.regions)) value = value.regions;
  if (!Array.isArray(value)) throw mapError("The memory map is neither an array of regions nor an object with one under regions");
  return value.map((entry: unknown, index) =>
    at(`Entry ${index + 1}`, JSON.stringify(entry), () => {
      if (!isRecord(entry)) throw mapError("not an object", "Each entry is {gpa, size_bytes}, optionally with fixed_iova, asid and name.");
      const first = jsonNumber(entry, "gpa");
      const region = toRegion({ first, last: first + jsonNumber(entry, "size_bytes") - 1n });
      if (entry.fixed_iova !== undefined) region.iova = toNumber(jsonNumber(entry, "fixed_iova"));
      if (entry.asid !== undefined) region.asid = Number(jsonNumber(entry, "asid"));
      if (typeof entry.name === "string") region.name = entry.name;
      return region;
    })
  );
}

function jsonNumber(entry: Record<string, unknown>, key: string): bigint {
  const value = entry[key];
  if (typeof value === "number" && Number.isSafeInteger(value) && value >= 0) return BigInt(value);
  if (typeof value === "string") return parseNumber(value);
  throw mapError(value === undefined ? `${key} is missing` : `${key} is not an address`, 'Write a number, or a string like "0x1000".');
}

function pushPages(regions: RegionRequest[], first: string, last: string, name: string): void {
  const range = { first: BigInt(`0x${first}`), last: BigInt(`0x${last}`) };
  checkRange(range);
  const pages = shrinkToPages(range, PAGE);
  if (pages !== undefined) regions.push({ ...toRegion(pages), name });
}

function toRegion(range: IovaRange): RegionRequest {
  checkRange(range);
  toNumber(range.last + 1n);
  return { gpa: toNumber(range.first), size: toNumber(range.last + 1n - range.first) };
}

function toNumber(value: bigint): number {
  if (value <= BigInt(ADDRESS_LIMIT)) return Number(value);
  throw new SvqError("IOVA_ADDRESS_LIMIT", `0x${value.toString(16)} is above 2^52`, {
    exitCode: EXIT.usage,
    hint: "svq handles addresses below 2^52 (4 PiB).",
  });
}

/** Runs `parse` and puts the place and the text in front of what it throws. */
function at<T>(place: string, text: string, parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    if (!(error instanceof SvqError)) throw error;
    throw mapError(`${place} (${text.trim().slice(0, 80)}): ${error.message}`, error.hint, error);
  }
}

function mapError(message: string, hint?: string, cause?: unknown): SvqError {
  return new SvqError("MEMORY_MAP_INVALID", message, { exitCode: EXIT.usage, hint, cause });
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
