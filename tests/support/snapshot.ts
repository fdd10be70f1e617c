/**
 * Texts that are compared with files in tests/cli/snapshots. `UPDATE_SNAPSHOTS=1 deno task test:unit` writes them anew.
 *
 * @module
 */
import assert from "node:assert/strict";

const DIRECTORY = new URL("../cli/snapshots/", import.meta.url).pathname;

/** Compares `actual` with the file `name`, or writes the file when UPDATE_SNAPSHOTS is set. */
export async function assertSnapshot(name: string, actual: string): Promise<void> {
  // The version changes with every release, and no text with it.
  const text = actual.replace(/svq \d+\.\d+\.\d+/g, "svq VERSION");
  if (Deno.env.get("UPDATE_SNAPSHOTS")) {
    await Deno.mkdir(DIRECTORY, { recursive: true });
    await Deno.writeTextFile(DIRECTORY + name, text);
    return;
  }
  assert.equal(text, await Deno.readTextFile(DIRECTORY + name), `${name} differs; UPDATE_SNAPSHOTS=1 accepts the change`);
}
