/**
 * An open kernel device (/dev/vhost-vdpa-N, /dev/vhost-net) as the two back-ends use it: ioctl, write, and errors that say
 * why it could not be opened. An interface, so that the state machines above it can be tested without a kernel.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { dupFd, ERRNO, ioctl, mapFd, type Mapping, O, openFd, type OwnedFd, PROT, SysError, writeFd } from "../ffi/mod.ts";
import { findHolders, formatHolders } from "./holders.ts";

/** What the back-ends ask of an open device. All calls throw SysError with the name of the request. */
export interface KernelDevice extends Disposable {
  /** The path it was opened by, or `fd:N`. */
  readonly path: string;
  /** Issues a request; the kernel may change the record. @returns the return value */
  ioctl(request: number, argument: Uint8Array<ArrayBuffer> | null, name: string): number;
  /** write(2) of one message. */
  write(message: Uint8Array<ArrayBuffer>, name: string): void;
  /** Maps one page of the device write-only, for doorbells. */
  mapPage(offset: number): Mapping;
  /** The descriptor, borrowed. */
  readonly fd: number;
  /** Closes the device; the kernel stops and resets it. Harmless when repeated. */
  close(): void;
}

const PAGE = 4096;

class OpenKernelDevice implements KernelDevice {
  readonly #fd: OwnedFd;

  constructor(fd: OwnedFd, readonly path: string) {
    this.#fd = fd;
  }

  get fd(): number {
    return this.#fd.fd;
  }

  ioctl(request: number, argument: Uint8Array<ArrayBuffer> | null, name: string): number {
    return ioctl(this.#fd.fd, request, argument, name);
  }

  write(message: Uint8Array<ArrayBuffer>, name: string): void {
    try {
      writeFd(this.#fd.fd, message);
    } catch (error) {
      throw error instanceof SysError ? new SysError(name, error.errno, this.path) : error;
    }
  }

  mapPage(offset: number): Mapping {
    return mapFd(this.#fd.fd, { offset, length: PAGE, prot: PROT.WRITE, what: `doorbell of ${this.path}` });
  }

  close(): void {
    this.#fd.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * Opens a device node. Opening a vhost-vdpa node resets the device.
 *
 * @param path of the node
 * @param kind what it should be, for hints
 * @throws SvqError DEVICE_IN_USE, NO_SUCH_DEVICE, MODULE_MISSING, PERMISSION
 */
export function openKernelDevice(path: string, kind: "vhost-vdpa" | "vhost-net"): KernelDevice {
  try {
    return new OpenKernelDevice(openFd(path, O.RDWR), path);
  } catch (error) {
    throw error instanceof SysError ? openError(path, kind, error) : error;
  }
}

/** A device that somebody else opened (`fd:N`); the descriptor is duplicated. */
export function adoptKernelDevice(fd: number): KernelDevice {
  return new OpenKernelDevice(dupFd(fd), `fd:${fd}`);
}

const HOW_TO_GET = {
  "vhost-vdpa":
    "Load vhost_vdpa (modprobe vhost_vdpa) and create a device with `vdpa dev add name NAME mgmtdev DEV`; `vdpa mgmtdev show` lists DEV",
  "vhost-net": "Load the module: modprobe vhost_net",
} as const;

/** What a failure to open a device means. */
export function openError(path: string, kind: "vhost-vdpa" | "vhost-net", error: SysError): SvqError {
  const details = { errno: error.errno, syscall: error.syscall, cause: error };
  switch (error.errno) {
    case ERRNO.EBUSY: {
      const holders = findHolders(path);
      const by = holders.length > 0 ? ` by ${formatHolders(holders)}` : "";
      const hint = holders.length > 0
        ? "A vhost-vdpa device has one user at a time: stop that process, or take another device"
        : "Run as root to learn which process holds it; a vhost-vdpa device has one user at a time";
      return new SvqError("DEVICE_IN_USE", `${path}: in use${by}`, { ...details, hint });
    }
    case ERRNO.ENOENT:
      return new SvqError("NO_SUCH_DEVICE", `${path}: no such device`, { ...details, exitCode: EXIT.noDevice, hint: HOW_TO_GET[kind] });
    case ERRNO.ENODEV:
    case ERRNO.ENXIO:
      return new SvqError("MODULE_MISSING", `${path}: the node is there, but no driver stands behind it`, {
        ...details,
        exitCode: EXIT.noDevice,
        hint: HOW_TO_GET[kind],
      });
    case ERRNO.EACCES:
    case ERRNO.EPERM:
      return new SvqError("PERMISSION", `${path}: permission denied`, {
        ...details,
        exitCode: EXIT.permission,
        hint: `Run as root, or give your user read and write access to ${path} (a udev rule, or the group that owns it)`,
      });
    default:
      return error;
  }
}
