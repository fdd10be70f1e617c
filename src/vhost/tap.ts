/**
 * A tap interface, opened for vhost-net: packets with a virtio-net header, no packet information.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, ioctl, ioctlValue, O, openFd, type OwnedFd, SysError } from "../ffi/mod.ts";
import { encodeIfreq, IFF, TUN } from "../uapi/tun.ts";

const NODE = "/dev/net/tun";

/** An open tap. It disappears when closed, unless it was made persistent (`ip tuntap add`). */
export class Tap implements Disposable {
  readonly #fd: OwnedFd;

  /**
   * Opens a tap, or makes it.
   *
   * @param name interface name
   * @throws SvqError BAD_INTERFACE_NAME, NO_SUCH_DEVICE, PERMISSION, TAP_IN_USE, TAP_REFUSED
   */
  constructor(readonly name: string) {
    const request = encodeIfreq(name, IFF.TAP | IFF.NO_PI | IFF.VNET_HDR);
    try {
      this.#fd = openFd(NODE, O.RDWR | O.NONBLOCK);
    } catch (error) {
      throw error instanceof SysError ? openError(error) : error;
    }
    try {
      ioctl(this.#fd.fd, TUN.SETIFF, request, "TUNSETIFF");
    } catch (error) {
      this.#fd.close();
      throw error instanceof SysError ? setError(name, error) : error;
    }
  }

  /** The descriptor, borrowed. */
  get fd(): number {
    return this.#fd.fd;
  }

  /** Bytes of the header in front of each packet: 10, 12 or 20. */
  setHeaderSize(bytes: number): void {
    const record = new Uint8Array(4);
    new DataView(record.buffer).setInt32(0, bytes, true);
    ioctl(this.#fd.fd, TUN.SETVNETHDRSZ, record, "TUNSETVNETHDRSZ");
  }

  /** What the receiver of packets can do itself: bits of TUN_F. */
  setOffloads(bits: number): void {
    ioctlValue(this.#fd.fd, TUN.SETOFFLOAD, bits, "TUNSETOFFLOAD");
  }

  /** Closes the tap; harmless when repeated. */
  close(): void {
    this.#fd.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function openError(cause: SysError): SvqError {
  const details = { errno: cause.errno, syscall: cause.syscall, cause };
  if (cause.errno === ERRNO.EACCES || cause.errno === ERRNO.EPERM) {
    return new SvqError("PERMISSION", `${NODE}: permission denied`, { ...details, exitCode: EXIT.permission, hint: "Run as root" });
  }
  return new SvqError("NO_SUCH_DEVICE", `${NODE}: ${cause.message}`, {
    ...details,
    exitCode: EXIT.noDevice,
    hint: "Load the module: modprobe tun",
  });
}

function setError(name: string, cause: SysError): SvqError {
  const details = { errno: cause.errno, syscall: cause.syscall, cause };
  switch (cause.errno) {
    case ERRNO.EPERM:
      return new SvqError("PERMISSION", `Tap ${name}: not permitted`, {
        ...details,
        exitCode: EXIT.permission,
        hint: `Run as root (CAP_NET_ADMIN), or have the tap made for your user: ip tuntap add ${name} mode tap vnet_hdr user USER`,
      });
    case ERRNO.EBUSY:
      return new SvqError("TAP_IN_USE", `Tap ${name}: another process has it open`, {
        ...details,
        hint: "Stop that process, or name another tap",
      });
    case ERRNO.EINVAL:
      return new SvqError("TAP_REFUSED", `Tap ${name}: the interface of that name is no single-queue tap`, {
        ...details,
        hint: `Make one: ip tuntap add ${name} mode tap vnet_hdr`,
      });
    default:
      return cause;
  }
}
