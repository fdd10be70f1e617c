/**
 * Files that `svq bench` writes.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** Writes a report. @throws SvqError CANNOT_WRITE */
export function writeReport(path: string, text: string): void {
  try {
    Deno.writeTextFileSync(path, text);
  } catch (cause) {
    throw new SvqError("CANNOT_WRITE", `${path} cannot be written: ${(cause as Error).message}`, { cause });
  }
}
