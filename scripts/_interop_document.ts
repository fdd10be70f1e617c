/**
 * docs/interop.md: one row for each pair, with the day on which it was run. A run of some pairs replaces their rows only.
 *
 * @module
 */

const FILE = new URL("../docs/interop.md", import.meta.url);

/** One row: the pair and its cells. */
export interface Row {
  front: string;
  device: string;
  cells: string[];
}

/** The rows of the file, by `front × device`, as they stand there. */
function rowsOf(text: string): Map<string, string> {
  const rows = text.split("\n").filter((line) => line.startsWith("| ") && !line.startsWith("| front-end"));
  return new Map(rows.map((line) => {
    const [, front, device] = line.split("|").map((word) => word.trim());
    return [`${front} × ${device}`, line];
  }));
}

/**
 * Writes the document.
 *
 * @param order all pairs, as `front × device`; rows of others are dropped
 * @param fresh rows that were run now
 * @param versions of what was run, for the line above the table
 */
export async function writeDocument(
  order: readonly string[],
  fresh: readonly Row[],
  tasks: readonly string[],
  versions: string,
): Promise<void> {
  const rows = rowsOf(await Deno.readTextFile(FILE));
  const day = new Date().toISOString().slice(0, 10);
  for (const { front, device, cells } of fresh) {
    const words = [front, device, day, ...cells].map((cell) => cell.replaceAll("|", "/"));
    rows.set(`${front} × ${device}`, `| ${words.join(" | ")} |`);
  }
  const text = [
    "# Interoperability",
    "",
    `Written by \`deno run -A scripts/interop.ts [--write] [WORD]...\`: ${versions}. QEMU runs under TCG; kernel devices are those of Linux ` +
    "6.12 in the lab VM.",
    "",
    "A relay stands between front-end and device. *switch under load* goes through the modes shadow, passthrough, used, notify and " +
    "passthrough while work goes on. What works was checked: disks by checksums of every block and a comparison with the image, " +
    "files by comparison, networks by answers. – means that nothing was run, and why.",
    "",
    `| front-end | device | run on | ${tasks.join(" | ")} |`,
    `|---|---|---|${tasks.map(() => "---|").join("")}`,
    ...order.map((name) => rows.get(name)).filter((row) => row !== undefined),
    "",
    "## Seen on the way",
    "",
    "- vhost-device-vsock ends the thread of its rings, silently and for good, when data from the host or a kick meets a " +
    "ring that is stopped: any stop of rings with data in full flow can do it, of svq's mode switches as of QEMU alone (QMP " +
    "`stop` and `cont` about 60 times under a 2 MiB echo, without svq: the thread `vring_worker` was gone). The connection " +
    "in this matrix rests while modes change; a relay that is started with `--mode shadow` and stays there stops no ring " +
    "until its VMM does. The device also keeps state of its own without DEVICE_STATE, and QEMU does not migrate it.",
    "- Back-ends on rust-vmm's crates refuse a memory table that is not in the order of addresses; svq sorts it.",
    "",
  ].join("\n");
  await Deno.writeTextFile(FILE, text);
}
