/**
 * Errors of the one who typed.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

/** An error of the one who typed: exit code 2. */
export function usageError(message: string, hint?: string): SvqError {
  return new SvqError("USAGE", message, { exitCode: EXIT.usage, hint });
}
