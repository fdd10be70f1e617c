/** `svq vring`: dump, verify, watch, diff. @module */
import { buildCommand, buildRouteMap } from "@stricli/core";
import { EXIT } from "../../errors.ts";
import { diffImages } from "../../vring/diff.ts";
import type { RingSide, VringImage } from "../../vring/image.ts";
import type { CliContext } from "../context.ts";
import { ExitWith } from "../exit_with.ts";
import { durationFlag, integerFlag, numberListFlag, pathFlag, pauseFlag, relayArgument } from "../parameters.ts";
import { pauseUnless } from "../signals.ts";
import { usageError } from "../usage.ts";
import { askRelay, confirm, readImage, saveImage, type Selection, type VringDocument, vringDocument } from "../vring_document.ts";
import { printDiff, printDump, printVerify, watchLine } from "../vring_text.ts";

/** Between the two looks of verify at a running relay, ms: far longer than a batch takes. */
const SECOND_LOOK_MS = 20;

interface SelectFlags {
  readonly queue?: number[];
  readonly side: RingSide | "both";
}

interface SourceFlags extends SelectFlags {
  readonly image?: string;
}

const selectFlags = {
  queue: numberListFlag("Queues, e.g. 0-3,8 (default: all that are set up)", { optional: true }),
  side: {
    kind: "enum",
    values: ["guest", "shadow", "both"] as const,
    brief: "The guest's ring, or the relay's own at the device",
    default: "both",
  },
} as const;

const sourceFlags = {
  ...selectFlags,
  image: pathFlag("Read a saved image instead of a running relay", { optional: true }),
} as const;

const optionalRelay = { kind: "tuple", parameters: [{ ...relayArgument(), optional: true as const }] } as const;

function selection({ queue, side }: SelectFlags): Selection {
  return { queues: queue, side };
}

/** Either a relay's name or an image file, and not both. */
function sourceOf(flags: SourceFlags, name: string | undefined): { relay: string } | { path: string } {
  if (name !== undefined && flags.image === undefined) return { relay: name };
  if (name === undefined && flags.image !== undefined) return { path: flags.image };
  if (name !== undefined) throw usageError(`The rings of ${name}, or those of the image: one at a time`, "leave out the name, or --image");
  throw usageError("Say whose rings: the name of a relay, or --image FILE", "svq relay list shows the running relays");
}

async function load(source: { relay: string } | { path: string }, wanted: Selection): Promise<VringImage> {
  return "path" in source ? await readImage(source.path, wanted) : (await askRelay(source.relay, wanted)).image;
}

const dump = buildCommand({
  docs: {
    brief: "Show the rings of a relay or of a saved image",
    fullDescription:
      'Indices, flags, notification suppression, chains in flight and the entries around each index. Reading does not touch the data path; a ring that moved while it was read is shown as torn. Of a split ring the memory does not always tell which chains are in flight: what is not sure is marked as likely. Of a device without a relay nobody can say where its rings are but who set them up: "svq drive --save-rings" for a driver of svq\'s own.\n\nExample:\n  svq vring dump vm1-disk --queue 0 --save rings.json',
  },
  parameters: {
    flags: {
      ...sourceFlags,
      all: { kind: "boolean", brief: "All descriptors, and chains that were returned", default: false },
      save: pathFlag("Also write an image file, for --image and svq vring diff", { optional: true }),
    },
    positional: optionalRelay,
  },
  async func(this: CliContext, flags: SourceFlags & { readonly all: boolean; readonly save?: string }, name?: string): Promise<void> {
    const source = sourceOf(flags, name);
    const image = await load(source, selection(flags));
    const document = vringDocument(image, { all: flags.all, history: false, source: flags.image });
    this.output.document(document, () => printDump(this.output, document));
    // What was seen may never be seen again: a file that cannot be written takes nothing of it away.
    if (flags.save !== undefined) {
      await saveImage(flags.save, image);
      this.output.info(`saved ${flags.save}`);
    }
    if (document.unreadable.length > 0) throw new ExitWith(EXIT.failed);
  },
});

const verify = buildCommand({
  docs: {
    brief: "Check rings against the rules of the specification",
    fullDescription:
      "Names each broken rule with its section of virtio 1.3, and ends with 6 when there is one. What a running relay's rings show is looked at again, so that a batch in the making is not mistaken. A ring that could not be read without tearing, or not at all, ends with 1.",
  },
  parameters: { flags: sourceFlags, positional: optionalRelay },
  async func(this: CliContext, flags: SourceFlags, name?: string): Promise<void> {
    const source = sourceOf(flags, name);
    const wanted = selection(flags);
    const image = await load(source, wanted);
    const look = (image: VringImage, history: boolean) => vringDocument(image, { history, source: flags.image });
    const document = look(image, true);
    const suspicious = document.queues.some((ring) => ring.anomalies.length > 0);
    if ("relay" in source && suspicious) {
      await pauseUnless(SECOND_LOOK_MS);
      confirm(document, look(image, false), look(await load(source, wanted), true));
    }
    for (const ring of document.queues) delete ring.descriptors;
    this.output.document(document, () => printVerify(this.output, document));
    if (document.queues.some((ring) => ring.anomalies.length > 0)) throw new ExitWith(EXIT.checkFailed);
    if (!document.consistent || document.unreadable.length > 0) throw new ExitWith(EXIT.failed);
  },
});

interface WatchFlags extends SelectFlags {
  readonly interval: number;
  readonly count?: number;
}

const watch = buildCommand({
  docs: {
    brief: "Show how the rings of a relay move",
    fullDescription: "On a terminal the picture is redrawn; elsewhere each round prints a line per ring, under -j a document per round.",
  },
  parameters: {
    flags: {
      ...selectFlags,
      interval: pauseFlag("Time between two rounds", { default: "1s" }),
      count: integerFlag("Rounds (default: until stopped)", { optional: true, min: 1 }),
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
  },
  async func(this: CliContext, flags: WatchFlags, name: string): Promise<void> {
    const { output, signal } = this;
    let before: VringDocument | undefined;
    for (let round = 1; !signal.aborted; round++) {
      const document = vringDocument((await askRelay(name, selection(flags))).image, { history: false });
      output.record(document, () => {
        const same = (index: number, side: RingSide) => before?.queues.find((ring) => ring.index === index && ring.side === side);
        const lines = [
          ...document.queues.map((ring) => watchLine(ring, same(ring.index, ring.side))),
          ...document.unreadable.map(({ index, side, message }) => `queue ${index} ${side}: cannot be read: ${message}`),
        ];
        if (lines.length === 0) lines.push("no ring is set up");
        const time = String(document.read_at).slice(11, 23);
        if (!output.interactive) return lines.map((line) => `${time}  ${line}`).join("\n");
        // Home, clear: the picture stands still.
        return `\x1b[H\x1b[2J${output.paint.bold(name)}  ${time}\n${lines.join("\n")}`;
      });
      before = document;
      if (round === flags.count) return;
      await pauseUnless(flags.interval / 1e6, signal);
    }
  },
});

async function isImage(word: string): Promise<boolean> {
  if (word.includes("/")) return true;
  return await Deno.stat(word).then((info) => info.isFile, () => false);
}

const diff = buildCommand({
  docs: {
    brief: "Show what moved between two images, or in a relay over time",
    fullDescription:
      "A and B are image files or names of relays; a word with a slash, or that names a file, is an image. With one relay only, it is looked at twice.\n\nExample:\n  svq vring diff before.json after.json\n  svq vring diff vm1-disk --interval 5s",
  },
  parameters: {
    flags: { ...selectFlags, interval: durationFlag("Time between the two looks at one relay", { default: "1s" }) },
    positional: {
      kind: "tuple",
      parameters: [
        { ...relayArgument("Image file, or name of a relay"), placeholder: "A" },
        { ...relayArgument("Image file, or name of a relay"), placeholder: "B", optional: true as const },
      ],
    },
  },
  async func(this: CliContext, flags: SelectFlags & { readonly interval: number }, first: string, second?: string): Promise<void> {
    const wanted = selection(flags);
    const source = async (word: string) => await isImage(word) ? { path: word } : { relay: word };
    const a = await source(first);
    if (second === undefined && "path" in a) throw usageError("An image is compared with another one", "name a second image, or a relay");
    const before = await load(a, wanted);
    if (second === undefined) {
      await pauseUnless(flags.interval / 1e6, this.signal);
      if (this.signal.aborted) throw this.signal.reason;
    }
    const after = await load(second === undefined ? a : await source(second), wanted);
    const queues = diffImages(before, after);
    const side = (word: string, image: VringImage) => ({ source: word, read_at: image.created });
    const document = {
      schema: "svq.vring-diff/1",
      a: side(first, before),
      b: side(second ?? first, after),
      identical: queues.every(({ identical }) => identical),
      queues,
    };
    this.output.document(document, () => printDiff(this.output, queues));
  },
});

/** All of `svq vring`. */
export const command = buildRouteMap({
  routes: { dump, verify, watch, diff },
  docs: { brief: "Show and check the rings of a relay" },
});
