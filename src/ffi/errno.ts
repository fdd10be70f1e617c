/**
 * errno numbers of Linux (asm-generic/errno-base.h, errno.h) and the error that carries one.
 *
 * @module
 */
import { EXIT, type ExitCode, SvqError } from "../errors.ts";

/** Numbers that this code tests for or names in messages. */
export const ERRNO = {
  EPERM: 1,
  ENOENT: 2,
  ESRCH: 3,
  EINTR: 4,
  EIO: 5,
  ENXIO: 6,
  E2BIG: 7,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EBUSY: 16,
  EEXIST: 17,
  ENODEV: 19,
  ENOTDIR: 20,
  EISDIR: 21,
  EINVAL: 22,
  ENFILE: 23,
  EMFILE: 24,
  ENOTTY: 25,
  ENOSPC: 28,
  EPIPE: 32,
  ENOSYS: 38,
  ENOTSOCK: 88,
  EPROTONOSUPPORT: 93,
  EOPNOTSUPP: 95,
  EADDRINUSE: 98,
  ENOBUFS: 105,
  ENOTCONN: 107,
  ETIMEDOUT: 110,
  ECONNREFUSED: 111,
  ECONNRESET: 104,
  EINPROGRESS: 115,
} as const;

const TEXT: Record<number, string> = {
  1: "operation not permitted",
  2: "no such file or directory",
  3: "no such process",
  4: "interrupted",
  5: "input/output error",
  6: "no such device or address",
  7: "argument list too long",
  9: "bad file descriptor",
  11: "resource temporarily unavailable",
  12: "out of memory",
  13: "permission denied",
  14: "bad address",
  16: "device or resource busy",
  17: "file exists",
  19: "no such device",
  20: "not a directory",
  21: "is a directory",
  22: "invalid argument",
  23: "too many open files in the system",
  24: "too many open files",
  25: "not supported by this device",
  28: "no space left on device",
  32: "broken pipe",
  38: "not in this kernel",
  88: "not a socket",
  93: "protocol not supported",
  95: "operation not supported",
  98: "address already in use",
  104: "connection reset by peer",
  105: "no buffer space",
  107: "not connected",
  110: "timed out",
  111: "connection refused",
  115: "operation in progress",
};

const NAMES = new Map<number, string>(Object.entries(ERRNO).map(([name, number]) => [number, name]));

/** `EBUSY` for 16; `errno 524` for one without a name here. */
export function errnoName(errno: number): string {
  return NAMES.get(errno) ?? `errno ${errno}`;
}

/** The errno in words, lower case. */
export function errnoText(errno: number): string {
  return TEXT[errno] ?? `errno ${errno}`;
}

function exitCodeOf(errno: number): ExitCode {
  switch (errno) {
    case ERRNO.EPERM:
    case ERRNO.EACCES:
      return EXIT.permission;
    case ERRNO.ENOENT:
    case ERRNO.ENODEV:
    case ERRNO.ENXIO:
    case ERRNO.ECONNREFUSED:
      return EXIT.noDevice;
    default:
      return EXIT.failed;
  }
}

/** A system call that failed; `code` is the errno's name (`EBUSY`), `syscall` its name, `what` says on what. */
export class SysError extends SvqError {
  /** Always `SysError`. */
  override readonly name = "SysError";
  /** Linux errno, positive. */
  declare readonly errno: number;
  /** Name of the system call or ioctl. */
  declare readonly syscall: string;

  /** Names call and errno in the message. @param what what the call was done to, for the message */
  constructor(syscall: string, errno: number, what?: string, hint?: string) {
    super(errnoName(errno), `${what ?? syscall}: ${errnoText(errno)} (${syscall}: ${errnoName(errno)})`, {
      exitCode: exitCodeOf(errno),
      errno,
      syscall,
      hint,
    });
  }
}
