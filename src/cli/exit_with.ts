/**
 * Ending with an exit code without an error message.
 *
 * @module
 */
import type { ExitCode } from "../errors.ts";

/** Thrown by a command whose printed result is the message, e.g. a check that found problems (exit 6). */
export class ExitWith extends Error {
  /** Always `ExitWith`. */
  override readonly name = "ExitWith";

  /** Ends the program without a message. @param exitCode what the program ends with */
  constructor(readonly exitCode: ExitCode) {
    super(`exit ${exitCode}`);
  }
}
