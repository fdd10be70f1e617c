/**
 * The one error type that svq raises on purpose. It lies below every room (ffi included), so that a fact is reported where
 * it is known and printed once, by the command line.
 *
 * @module
 */

/** Exit codes of the program; the table is in docs/architecture.md and in the man page. */
export const EXIT = {
  ok: 0,
  failed: 1,
  usage: 2,
  noDevice: 3,
  permission: 4,
  missingFeature: 5,
  checkFailed: 6,
  migrationAborted: 7,
  failedAfterSwitchover: 8,
  timeout: 124,
  interrupted: 130,
  terminated: 143,
} as const;

/** One of the values of {@linkcode EXIT}. */
export type ExitCode = typeof EXIT[keyof typeof EXIT];

/** What an {@linkcode SvqError} carries besides its message. */
export interface SvqErrorOptions {
  /** Exit code of the program when this error ends it (default 1). */
  exitCode?: ExitCode;
  /** What the reader can do about it, as one sentence. */
  hint?: string | undefined;
  /** Linux errno, where a system call failed. */
  errno?: number;
  /** Name of the system call or ioctl that failed. */
  syscall?: string;
  /** The error underneath. */
  cause?: unknown;
}

/** An error with a stable `code` (upper-case words joined by `_`), an exit code and a hint. */
export class SvqError extends Error {
  /** Always `SvqError` or a subclass's name. */
  override readonly name: string = "SvqError";
  /** Stable identifier, e.g. `RING_OUTSIDE_MEMORY`; docs/troubleshooting.md is keyed by it. */
  readonly code: string;
  /** Exit code of the program when this error ends it. */
  readonly exitCode: ExitCode;
  /** What the reader can do about it, as one sentence. */
  readonly hint: string | undefined;
  /** Linux errno, where a system call failed. */
  readonly errno: number | undefined;
  /** Name of the system call or ioctl that failed. */
  readonly syscall: string | undefined;

  /** See {@linkcode SvqErrorOptions} for what goes with code and message. */
  constructor(code: string, message: string, options: SvqErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.exitCode = options.exitCode ?? EXIT.failed;
    this.hint = options.hint;
    this.errno = options.errno;
    this.syscall = options.syscall;
  }
}

/** Plain data of an {@linkcode SvqError}: what crosses a Worker or a control socket. */
export interface ErrorRecord {
  /** Stable identifier, see {@linkcode SvqError.code}. */
  code: string;
  /** One sentence; a stack for foreign errors. */
  message: string;
  /** What the reader can do about it. */
  hint?: string;
  /** Linux errno. */
  errno?: number;
  /** Name of the system call or ioctl. */
  syscall?: string;
  /** Exit code of the program, one of {@linkcode EXIT}. */
  exit_code?: number;
}

/** The plain-data form of any thrown value; foreign errors get the code `INTERNAL`. */
export function toErrorRecord(error: unknown): ErrorRecord {
  if (!(error instanceof SvqError)) {
    return { code: "INTERNAL", message: error instanceof Error ? error.stack ?? error.message : String(error) };
  }
  const record: ErrorRecord = { code: error.code, message: error.message, exit_code: error.exitCode };
  if (error.hint !== undefined) record.hint = error.hint;
  if (error.errno !== undefined) record.errno = error.errno;
  if (error.syscall !== undefined) record.syscall = error.syscall;
  return record;
}

/** The inverse of {@linkcode toErrorRecord}. */
export function fromErrorRecord(record: ErrorRecord): SvqError {
  const options: SvqErrorOptions = { hint: record.hint };
  if (record.exit_code !== undefined) options.exitCode = record.exit_code as ExitCode;
  if (record.errno !== undefined) options.errno = record.errno;
  if (record.syscall !== undefined) options.syscall = record.syscall;
  return new SvqError(record.code, record.message, options);
}
