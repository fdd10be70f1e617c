/**
 * An embedded device as a VDUSE device: a vDPA device of this kernel, served by this process. `vdpa dev add name NAME mgmtdev
 * vduse` (or {@linkcode VduseDevice.attach}) puts it on the vdpa bus, where vhost_vdpa or virtio_vdpa takes it.
 *
 * API version 0, which every kernel with VDUSE has, or 1, which adds groups and address spaces, of which an embedded device has
 * one each; SUSPEND and QUEUE_READY where the kernel offers them (vduse_api.ts). The kernel waits for the answer to every message (30 s by default) and gives the device up otherwise: so
 * whatever may send one (adding, removing, a driver's ioctls) must not be called synchronously from this thread.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import {
  cancelWaits,
  ERRNO,
  ioctl,
  O,
  openFd,
  type OwnedFd,
  ReactorCancelled,
  readable,
  readFd,
  setNonblocking,
  SysError,
  writeFd,
} from "../ffi/mod.ts";
import {
  decodeVduseRequest,
  decodeVqInfo,
  encodeVduseConfig,
  encodeVduseName,
  encodeVqConfig,
  encodeVqKick,
  newVqInfo,
  VDUSE,
  VDUSE_MESSAGE_BYTES,
} from "../uapi/vduse.ts";
import { encodeU64, viewOf } from "../uapi/vhost.ts";
import { addVdpaDevice, deleteVdpaDevice } from "../vhost/netlink.ts";
import { scanVdpa, type VdpaListing } from "../vhost/sysfs.ts";
import type { SimDevice } from "./sim_device.ts";
import { agree, type VduseAgreement } from "./vduse_api.ts";
import { ACCESS_PLATFORM, type VduseKernel, VduseSession } from "./vduse_session.ts";

const CONTROL = "/dev/vduse/control";
const RING_ALIGNMENT = 4096;

/** What a running {@linkcode VduseDevice} tells. */
export interface VduseEvents {
  /** Something to know: a driver came or left. */
  info?: (message: string) => void;
  /** Something went wrong; the device goes on as far as it can. */
  warn?: (message: string) => void;
}

/** A VDUSE device in front of an embedded device, which it borrows. */
export class VduseDevice implements AsyncDisposable {
  readonly #control: OwnedFd;
  readonly #fd: OwnedFd;
  readonly #session: VduseSession;
  #closed = false;
  #serving: Promise<void> | undefined;

  private constructor(
    /** Name in /dev/vduse and on the vdpa bus. */
    readonly name: string,
    /** What serves the requests. */
    readonly device: SimDevice,
    /** Who is told. */
    readonly events: VduseEvents,
    /** What this kernel's VDUSE has. */
    readonly agreement: VduseAgreement,
    control: OwnedFd,
    fd: OwnedFd,
  ) {
    this.#control = control;
    this.#fd = fd;
    this.#session = new VduseSession(device, kernelOf(fd.fd), {
      info: (message) => events.info?.(`${name}: ${message}`),
      warn: (what, { message }) => events.warn?.(`${name}: ${what}: ${message}`),
    });
  }

  /**
   * Creates the device and begins to answer the kernel. A device of that name that a dead process left behind, and that nobody
   * has, is replaced.
   *
   * @param device a disk; it has no memory and no rings but the driver's from now on
   * @throws SvqError MODULE_MISSING, VDUSE_NAME_TAKEN, BAD_NAME, NO_DEVICE_TYPE; SysError EPERM, EACCES
   */
  static async create(name: string, device: SimDevice, events: VduseEvents = {}): Promise<VduseDevice> {
    encodeVduseName(name);
    const { deviceId, queueNum } = device.info;
    if (deviceId === undefined) {
      throw new SvqError("NO_DEVICE_TYPE", `${device.info.address} is of no virtio device type: VDUSE takes disks and network devices`, {
        exitCode: EXIT.usage,
      });
    }
    const config = await device.getConfig(0, CONFIG_BYTES);
    const features = await device.getFeatures() | ACCESS_PLATFORM;
    const control = openControl();
    let created = false;
    let fd: OwnedFd | undefined;
    try {
      const agreement = agree((request, argument, what) => ioctl(control.fd, request, argument, what));
      const { apiVersion } = agreement;
      const shape = { name, vendorId: 0, deviceId, features, vqNum: queueNum, vqAlign: RING_ALIGNMENT };
      const record = encodeVduseConfig({ ...shape, config, ...(apiVersion === 0 ? {} : { groups: 1, addressSpaces: 1 }) });
      createDevice(control.fd, name, record);
      created = true;
      fd = openFd(`/dev/vduse/${name}`, O.RDWR);
      for (let index = 0; index < queueNum; index++) {
        ioctl(fd.fd, VDUSE.VQ_SETUP, encodeVqConfig(index, device.numMax), "VDUSE_VQ_SETUP");
      }
      setNonblocking(fd.fd, true);
      await device.useIotlb(fd.fd);
      const self = new VduseDevice(name, device, events, agreement, control, fd);
      self.#serving = self.#serve();
      return self;
    } catch (error) {
      fd?.close();
      if (created) destroyDevice(control.fd, name);
      control.close();
      throw error;
    }
  }

  /** The device on the vdpa bus, where somebody put it there. */
  get listing(): VdpaListing | undefined {
    return scanVdpa().find(({ name }) => name === this.name);
  }

  /** Resolves when the kernel has given the device up, or it is closed. */
  get done(): Promise<void> {
    return this.#serving!;
  }

  /** Puts it on the vdpa bus, as `vdpa dev add` does. @throws SysError EPERM, EEXIST when another vDPA device has the name */
  async attach(): Promise<void> {
    await addVdpaDevice("vduse", this.name);
  }

  /** Takes it off the vdpa bus. Waits for whoever has its /dev/vhost-vdpa-N open. */
  async detach(): Promise<void> {
    await deleteVdpaDevice(this.name);
  }

  async #serve(): Promise<void> {
    const bytes = new Uint8Array(VDUSE_MESSAGE_BYTES);
    while (!this.#closed) {
      try {
        await readable(this.#fd.fd);
        if (this.#closed) return;
        if (readFd(this.#fd.fd, bytes) === undefined) continue;
        const response = await this.#session.answer(decodeVduseRequest(bytes));
        writeFd(this.#fd.fd, response);
      } catch (error) {
        if (error instanceof ReactorCancelled) return;
        // The driver did not wait any longer for this answer; the next message may be fine.
        if (error instanceof SysError && error.errno === ERRNO.ENOENT) continue;
        this.#warn(error, "the kernel gave the device up");
        return;
      }
    }
  }

  #warn(error: unknown, what: string): void {
    this.events.warn?.(`${this.name}: ${what}: ${toErrorRecord(error).message}`);
  }

  /** Stops serving and destroys the device; one that is on the vdpa bus still stays there, dead, and a warning says so. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    cancelWaits(this.#fd.fd);
    await this.#serving;
    await this.#session.stop();
    this.#fd.close();
    if (!destroyDevice(this.#control.fd, this.name)) {
      this.events.warn?.(`${this.name} is on the vdpa bus still, without anybody to serve it; take it off: vdpa dev del ${this.name}`);
    }
    this.#control.close();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function kernelOf(fd: number): VduseKernel {
  return {
    features() {
      const word = encodeU64(0n);
      ioctl(fd, VDUSE.DEV_GET_FEATURES, word, "VDUSE_DEV_GET_FEATURES");
      return viewOf(word).getBigUint64(0, true);
    },
    vqInfo(index, packed) {
      const record = newVqInfo(index);
      ioctl(fd, VDUSE.VQ_GET_INFO, record, "VDUSE_VQ_GET_INFO");
      return decodeVqInfo(record, packed);
    },
    setKick: (index, kick) => void ioctl(fd, VDUSE.VQ_SETUP_KICKFD, encodeVqKick(index, kick), "VDUSE_VQ_SETUP_KICKFD"),
  };
}

// A block device's whole configuration space.
const CONFIG_BYTES = 96;

function openControl(): OwnedFd {
  try {
    return openFd(CONTROL, O.RDWR);
  } catch (error) {
    if (!(error instanceof SysError)) throw error;
    if (error.errno === ERRNO.ENOENT || error.errno === ERRNO.ENXIO) {
      throw new SvqError("MODULE_MISSING", `This host has no ${CONTROL}: VDUSE is not loaded`, {
        exitCode: EXIT.noDevice,
        hint: "Load the modules: modprobe vduse vhost_vdpa; `svq doctor --for vduse` says what else is missing",
        cause: error,
      });
    }
    throw new SysError(error.syscall, error.errno, CONTROL, "VDUSE devices are made by root; or give this user the control device");
  }
}

function createDevice(control: number, name: string, record: Uint8Array<ArrayBuffer>): void {
  const create = () => ioctl(control, VDUSE.CREATE_DEV, record, "VDUSE_CREATE_DEV");
  try {
    create();
  } catch (error) {
    if (!(error instanceof SysError && error.errno === ERRNO.EEXIST)) throw error;
    // The kernel destroys none that is open or on the vdpa bus.
    if (!destroyDevice(control, name)) {
      throw new SvqError("VDUSE_NAME_TAKEN", `There is a VDUSE device ${name} already, and it is in use`, {
        hint: `Choose another name; if the process that served it has died: vdpa dev del ${name}, then again`,
        cause: error,
      });
    }
    create();
  }
}

function destroyDevice(control: number, name: string): boolean {
  try {
    ioctl(control, VDUSE.DESTROY_DEV, encodeVduseName(name), "VDUSE_DESTROY_DEV");
    return true;
  } catch (error) {
    if (error instanceof SysError && error.errno === ERRNO.EBUSY) return false;
    throw error;
  }
}
