/**
 * ioctl(2). Requests that take a record get it as bytes, which the kernel may change.
 *
 * @module
 */
import { errno, libc, retrying } from "./libc.ts";
import { SysError } from "./errno.ts";

/**
 * Issues a request that takes a record, or nothing.
 *
 * @param request the number, e.g. 0x8008AF00 (uapi/vhost.ts)
 * @param argument the record it points to, or nothing for requests without one
 * @param name for the error: `VHOST_GET_FEATURES`
 * @returns the return value (0 for most)
 */
export function ioctl(fd: number, request: number, argument: Uint8Array<ArrayBuffer> | null, name: string): number {
  return retrying(() => libc().ioctl(fd, BigInt(request), argument), name);
}

/** For requests whose argument is a value instead of a pointer. */
export function ioctlValue(fd: number, request: number, value: number, name: string): number {
  return retrying(() => libc().ioctl_value(fd, BigInt(request), BigInt(value)), name);
}

/** Like {@linkcode ioctl}, but an errno among `tolerated` is returned as its negative instead of thrown. */
export function ioctlTolerant(
  fd: number,
  request: number,
  argument: Uint8Array<ArrayBuffer> | null,
  name: string,
  tolerated: readonly number[],
): number {
  const result = libc().ioctl(fd, BigInt(request), argument);
  if (result >= 0) return result;
  const number = errno();
  if (tolerated.includes(number)) return -number;
  throw new SysError(name, number);
}
