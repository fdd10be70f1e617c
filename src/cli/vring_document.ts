/**
 * The document `svq.vring/1`, made from an image of rings, and where images come from: relays and files.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ControlClient } from "../relay/control.ts";
import { controlPath } from "../relay/runtime_dir.ts";
import { dumpRing, type RingDump } from "../vring/dump.ts";
import { decodeImage, encodeImage, type ImageQueue, type RingSide, type VringImage } from "../vring/image.ts";
import type { Anomaly } from "../vring/rules.ts";
import { verifyRing } from "../vring/verify.ts";
import type { Document } from "./output.ts";

/** What of a relay is wanted. */
export interface Selection {
  /** Queue indices; default all that are set up. */
  queues?: readonly number[] | undefined;
  /** Default both. */
  side: RingSide | "both";
}

/** One ring of the document. */
export interface RingEntry extends Partial<RingDump> {
  /** Which queue. */
  index: number;
  /** Whose ring. */
  side: RingSide;
  /** Relay mode of the queue. */
  mode: string;
  /** Broken rules. */
  anomalies: Anomaly[];
}

/** The document. */
export interface VringDocument extends Document {
  /** No ring is torn. */
  consistent: boolean;
  /** Rings that could be read. */
  queues: RingEntry[];
  /** Rings that could not, and why. */
  unreadable: { index: number; side: RingSide; code: string; message: string }[];
}

/** Writes an image file. @throws SvqError UNWRITABLE_FILE */
export async function saveImage(path: string, image: VringImage): Promise<void> {
  try {
    await Deno.writeTextFile(path, JSON.stringify(encodeImage(image)) + "\n");
  } catch (cause) {
    throw new SvqError("UNWRITABLE_FILE", `Cannot write ${path}: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
}

const KERNEL_DEVICE = /^(?:vdpa:|\/dev\/)/;
const DEVICE = /^(?:unix|fd|sim|listen):/;

// Names of relays have no colon and no slash.
function refuseDevice(name: string): void {
  if (!KERNEL_DEVICE.test(name) && !DEVICE.test(name)) return;
  const why = KERNEL_DEVICE.test(name)
    ? "the kernel gives positions to the one process that has the device open, and addresses to none"
    : "a back-end answers one front-end, and tells nobody where that one has put its rings";
  throw new SvqError("RINGS_UNKNOWN", `${name} is a device, and its rings are in the memory of whoever drives it: ${why}`, {
    exitCode: EXIT.missingFeature,
    hint: `For a VMM, put a relay between (svq relay run --mode passthrough costs nothing) and name that; for a driver of svq's own: ` +
      `svq drive ${name} --save-rings FILE, then --image FILE`,
  });
}

/** Copies the rings of a running relay. @throws SvqError NO_SUCH_RELAY, NO_SUCH_QUEUE, RINGS_UNKNOWN for a device's address */
export async function askRelay(name: string, selection: Selection): Promise<{ raw: unknown; image: VringImage }> {
  refuseDevice(name);
  using client = ControlClient.connect(name, controlPath(name));
  const { queues, side } = selection;
  const raw = await client.call("vrings", { side, ...(queues === undefined ? {} : { queues }) });
  return { raw, image: decodeImage(raw, `the answer of relay "${name}"`) };
}

/** Reads an image file, and takes of it what is selected. @throws SvqError NO_SUCH_FILE, BAD_IMAGE, NO_SUCH_QUEUE */
export async function readImage(path: string, selection: Selection): Promise<VringImage> {
  let text: string;
  try {
    text = await Deno.readTextFile(path);
  } catch (cause) {
    const missing = cause instanceof Deno.errors.NotFound;
    throw new SvqError(
      missing ? "NO_SUCH_FILE" : "UNREADABLE_FILE",
      missing ? `There is no file ${path}` : `Cannot read ${path}: ${cause instanceof Error ? cause.message : cause}`,
      {
        exitCode: cause instanceof Deno.errors.PermissionDenied ? EXIT.permission : EXIT.usage,
        cause,
      },
    );
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new SvqError("BAD_IMAGE", `${path} is no ring image: it is not JSON`, {
      hint: "images are written by svq vring dump --save",
      cause,
    });
  }
  const image = decodeImage(value, path);
  for (const index of selection.queues ?? []) {
    if (!image.queues.some((queue) => queue.index === index)) {
      const there = [...new Set(image.queues.map((queue) => queue.index))].join(", ") || "none";
      throw new SvqError("NO_SUCH_QUEUE", `${path} holds no queue ${index}; these are in it: ${there}`, { exitCode: EXIT.noDevice });
    }
  }
  const wanted = (queue: ImageQueue) =>
    (selection.queues?.includes(queue.index) ?? true) && (selection.side === "both" || queue.side === selection.side);
  return { ...image, queues: image.queues.filter(wanted) };
}

/** How {@linkcode vringDocument} looks at an image. */
export interface DocumentOptions {
  /** All descriptors, and chains that came back. */
  all?: boolean;
  /** Apply the rules that need the past in the ring: see verifyRing. */
  history: boolean;
  /** The image's file. */
  source?: string | undefined;
}

/** The rings of an image in words, with the rules that they break. */
export function vringDocument(image: VringImage, options: DocumentOptions): VringDocument {
  const queues: RingEntry[] = [];
  const unreadable: VringDocument["unreadable"] = [];
  for (const { index, side, mode, ring, error, seen } of image.queues) {
    if (ring === undefined) {
      unreadable.push({ index, side, code: error!.code, message: error!.message });
      continue;
    }
    const anomalies = verifyRing(ring, { history: options.history });
    const dump = dumpRing(ring, { all: options.all ?? false });
    if (dump === undefined) {
      const { layout, num, consistent } = ring;
      queues.push({ index, side, mode, layout, num, consistent, avail_idx: null, used_idx: null, anomalies });
      continue;
    }
    for (const chain of dump.chains) {
      const known = seen.find(({ head, position }) => head === chain.head && (position & positionMask(ring.layout)) === chain.position);
      if (chain.in_flight !== false) chain.in_flight_ms = known?.ms ?? null;
    }
    queues.push({ index, side, mode, ...dump, anomalies });
  }
  return {
    schema: "svq.vring/1",
    ...(image.relay === undefined ? {} : { relay: image.relay }),
    ...(options.source === undefined ? {} : { source: options.source }),
    read_at: image.created,
    consistent: queues.every((queue) => queue.consistent === true),
    queues,
    unreadable,
  };
}

function positionMask(layout: "split" | "packed"): number {
  return layout === "split" ? 0xffff : 0x7fff;
}

/**
 * Keeps of each ring the broken rules that are sure at once, and those that a second look shows in the same place: a ring
 * in motion may look wrong for a moment.
 *
 * @param sure the first image, looked at without the rules that need the past
 */
export function confirm(first: VringDocument, sure: VringDocument, second: VringDocument): void {
  const key = ({ rule, index, detail }: Anomaly) => `${rule} ${index} ${detail}`;
  for (const ring of first.queues) {
    const same = ({ queues }: VringDocument) => queues.filter(({ index, side }) => index === ring.index && side === ring.side);
    const known = new Set([...same(sure), ...same(second)].flatMap(({ anomalies }) => anomalies.map(key)));
    ring.anomalies = ring.anomalies.filter((anomaly) => known.has(key(anomaly)));
  }
}
