/**
 * A vhost-vdpa device without a kernel: keeps the rules that the kernel keeps (which requests are legal when, what a reset
 * drops, that the IOTLB answers EFAULT to everything), and writes down what it was asked.
 */
import { type Mapping, SysError } from "../../src/ffi/mod.ts";
import { BACKEND_FEATURE, IOTLB, VHOST, VHOST_VDPA } from "../../src/uapi/vhost.ts";
import { VIRTIO_STATUS } from "../../src/uapi/virtio.ts";
import type { KernelDevice } from "../../src/vhost/kernel_device.ts";

const [EPERM, EFAULT, EBUSY, EINVAL, EOPNOTSUPP, ENOBUFS] = [1, 14, 16, 22, 95, 105];

export interface FakeOptions {
  /** vdpa_sim: takes addresses on an enable edge. other: ignores them under SUSPEND. vp: no SUSPEND, no positions. */
  driver?: "sim" | "other" | "vp";
  deviceId?: number;
  features?: bigint;
  backendFeatures?: bigint;
  vqs?: number;
  numMax?: number;
  range?: [bigint, bigint];
  /** Bytes that may be mapped before the kernel refuses. */
  pinLimit?: number;
}

interface FakeRing {
  num: number;
  base: number;
  addresses: [desc: number, used: number, avail: number];
  /** What the device really works on. */
  inForce: [desc: number, used: number, avail: number] | undefined;
  enabled: boolean;
  kick: number;
  call: number;
}

const NAMES = new Map<number, string>([...Object.entries(VHOST), ...Object.entries(VHOST_VDPA)].map(([name, number]) => [number, name]));

function features(...numbers: number[]): bigint {
  return numbers.reduce((word, number) => word | 1n << BigInt(number), 0n);
}

const F = BACKEND_FEATURE;
export const SIM_BACKEND_FEATURES = features(
  F.IOTLB_MSG_V2,
  F.IOTLB_BATCH,
  F.IOTLB_ASID,
  F.SUSPEND,
  F.RESUME,
  F.ENABLE_AFTER_DRIVER_OK,
  F.IOTLB_PERSIST,
);

export class FakeVdpa implements KernelDevice {
  readonly path = "/dev/vhost-vdpa-9";
  readonly fd = -1;
  readonly log: string[] = [];
  readonly rings: FakeRing[];
  /** What the kernel's table holds. */
  readonly table = new Map<number, { iova: number; size: number; asid: number }>();
  /** What the driver has of it. */
  readonly driverTable = new Set<number>();
  status = 0;
  acked = 0n;
  ackedBackend = 0n;
  owned = false;
  suspended = false;
  configCall = -1;
  closed = false;
  readonly #options: Required<FakeOptions>;

  constructor(options: FakeOptions = {}) {
    const driver = options.driver ?? "sim";
    this.#options = {
      driver,
      deviceId: 2,
      features: 0x308007646n,
      backendFeatures: driver === "vp" ? features(F.IOTLB_MSG_V2, F.IOTLB_BATCH, F.IOTLB_ASID) : SIM_BACKEND_FEATURES,
      vqs: 2,
      numMax: 256,
      range: [0n, 2n ** 64n - 1n],
      pinLimit: Infinity,
      ...options,
    };
    this.rings = Array.from({ length: this.#options.vqs }, () => this.#freshRing());
  }

  #freshRing(): FakeRing {
    return { num: 0, base: 0, addresses: [0, 0, 0], inForce: undefined, enabled: false, kick: -1, call: -1 };
  }

  /** Rings that the device works on now: index -> descriptor table. */
  get active(): Record<number, number> {
    const found: Record<number, number> = {};
    if ((this.status & VIRTIO_STATUS.DRIVER_OK) === 0 || this.suspended) return found;
    this.rings.forEach((ring, index) => {
      if (ring.enabled && ring.inForce !== undefined) found[index] = ring.inForce[0];
    });
    return found;
  }

  ioctl(request: number, argument: Uint8Array<ArrayBuffer> | null, name: string): number {
    const short = NAMES.get(request) ?? `0x${request.toString(16)}`;
    const fail = (errno: number): never => {
      this.log.push(`${short} !${errno}`);
      throw new SysError(name, errno);
    };
    const view = argument === null
      ? new DataView(new ArrayBuffer(64))
      : new DataView(argument.buffer, argument.byteOffset, argument.length);
    const u64 = (value: bigint) => (view.setBigUint64(0, value, true), 0);
    const u32 = (value: number) => (view.setUint32(0, value, true), 0);
    const { driver } = this.#options;
    const running = (this.status & VIRTIO_STATUS.DRIVER_OK) !== 0;
    if (!this.owned && request !== VHOST.SET_OWNER && request === VHOST_VDPA.GET_VRING_GROUP) return fail(EPERM);
    switch (request) {
      case VHOST.SET_OWNER:
        if (this.owned) return fail(EBUSY);
        this.owned = true;
        break;
      case VHOST.GET_FEATURES:
        return u64(this.#options.features);
      case VHOST.SET_FEATURES: {
        if ((this.status & VIRTIO_STATUS.FEATURES_OK) !== 0) return fail(EBUSY);
        const wanted = view.getBigUint64(0, true);
        if ((wanted >> 33n & 1n) === 0n) return fail(EINVAL);
        this.acked = wanted;
        break;
      }
      case VHOST.GET_BACKEND_FEATURES:
        return u64(this.#options.backendFeatures);
      case VHOST.SET_BACKEND_FEATURES:
        this.ackedBackend = view.getBigUint64(0, true);
        if ((this.ackedBackend & ~this.#options.backendFeatures) !== 0n) return fail(EOPNOTSUPP);
        break;
      case VHOST_VDPA.GET_DEVICE_ID:
        return u32(this.#options.deviceId);
      case VHOST_VDPA.GET_STATUS:
        view.setUint8(0, this.status);
        return 0;
      case VHOST_VDPA.SET_STATUS: {
        const status = view.getUint8(0);
        if (status !== 0 && (this.status & ~status) !== 0) return fail(EINVAL);
        if (status === 0) this.#reset();
        else if ((status & VIRTIO_STATUS.DRIVER_OK) !== 0) {
          // Some drivers forget that they were suspended.
          if (driver === "sim") this.suspended = false;
          if (!running) { for (const ring of this.rings) if (ring.enabled) ring.inForce = [...ring.addresses]; }
        }
        this.status = status;
        this.log.push(`STATUS ${status}`);
        return 0;
      }
      case VHOST_VDPA.GET_CONFIG_SIZE:
        return u32(96);
      case VHOST_VDPA.GET_CONFIG:
        if (view.getUint32(0, true) + view.getUint32(4, true) > 96) return fail(EINVAL);
        for (let i = 0; i < view.getUint32(4, true); i++) view.setUint8(8 + i, view.getUint32(0, true) + i);
        return 0;
      case VHOST_VDPA.GET_VRING_NUM:
        view.setUint16(0, this.#options.numMax, true);
        return 0;
      case VHOST_VDPA.GET_VQS_COUNT:
        return u32(this.#options.vqs);
      case VHOST_VDPA.GET_IOVA_RANGE:
        view.setBigUint64(8, this.#options.range[1], true);
        return u64(this.#options.range[0]);
      case VHOST_VDPA.GET_AS_NUM:
      case VHOST_VDPA.GET_GROUP_NUM:
        return u32(2);
      case VHOST_VDPA.SET_CONFIG_CALL:
        this.configCall = view.getInt32(0, true);
        break;
      case VHOST_VDPA.SUSPEND:
        if (driver === "vp") return running ? fail(EOPNOTSUPP) : 0;
        if (running) this.suspended = true;
        break;
      case VHOST_VDPA.RESUME:
        if (driver === "vp") return fail(EOPNOTSUPP);
        this.suspended = false;
        break;
      default:
        return this.#ringRequest(request, short, view, fail);
    }
    this.log.push(short);
    return 0;
  }

  #ringRequest(request: number, short: string, view: DataView, fail: (errno: number) => never): number {
    const index = view.getUint32(0, true);
    const num = view.getUint32(4, true);
    const ring = this.rings[index];
    if (ring === undefined) return fail(ENOBUFS);
    const { driver } = this.#options;
    const locked = (this.status & VIRTIO_STATUS.DRIVER_OK) !== 0 && !this.suspended;
    this.log.push(`${short} ${index}${request === VHOST_VDPA.SET_VRING_ENABLE ? ` ${num}` : ""}`);
    switch (request) {
      case VHOST.SET_VRING_NUM:
        ring.num = num;
        return 0;
      case VHOST.SET_VRING_ADDR:
        if (locked) return fail(EINVAL);
        ring.addresses = [Number(view.getBigUint64(8, true)), Number(view.getBigUint64(16, true)), Number(view.getBigUint64(24, true))];
        return 0;
      case VHOST.SET_VRING_BASE:
        if (locked) return fail(EINVAL);
        if (driver === "vp" && num !== 0 && num !== 0x80008000) return fail(EOPNOTSUPP);
        ring.base = num;
        return 0;
      case VHOST.GET_VRING_BASE:
        if (driver === "vp") return fail(EOPNOTSUPP);
        view.setUint32(4, ring.base, true);
        return 0;
      case VHOST.SET_VRING_KICK:
        ring.kick = view.getInt32(4, true);
        return 0;
      case VHOST.SET_VRING_CALL:
        ring.call = view.getInt32(4, true);
        return 0;
      case VHOST.SET_VRING_ERR:
        return 0;
      case VHOST_VDPA.SET_VRING_ENABLE: {
        const edge = num === 1 && !ring.enabled;
        ring.enabled = num === 1;
        if (edge && driver === "sim") ring.inForce = [...ring.addresses];
        return 0;
      }
      case VHOST_VDPA.GET_VRING_GROUP:
        view.setUint32(4, 0, true);
        return 0;
      default:
        return fail(25);
    }
  }

  #reset(): void {
    for (let i = 0; i < this.rings.length; i++) this.rings[i] = this.#freshRing();
    this.suspended = false;
    this.acked = 0n;
    this.configCall = -1;
    if ((this.ackedBackend >> BigInt(F.IOTLB_PERSIST) & 1n) === 0n) this.driverTable.clear();
  }

  write(message: Uint8Array<ArrayBuffer>, name: string): void {
    const view = new DataView(message.buffer, message.byteOffset, message.length);
    const asid = view.getUint32(4, true);
    const iova = Number(view.getBigUint64(8, true));
    const size = Number(view.getBigUint64(16, true));
    const type = view.getUint8(33);
    const fail = () => {
      this.log.push(`${name} !`);
      throw new SysError(name, EFAULT);
    };
    if (!this.owned) return fail();
    if (type === IOTLB.UPDATE) {
      const last = BigInt(iova) + BigInt(size) - 1n;
      if (BigInt(iova) < this.#options.range[0] || last > this.#options.range[1]) return fail();
      const sameSpace = [...this.table.values()].filter((map) => map.asid === asid);
      if (sameSpace.some((map) => iova < map.iova + map.size && map.iova < iova + size)) return fail();
      if ([...this.table.values()].reduce((sum, map) => sum + map.size, size) > this.#options.pinLimit) return fail();
      this.table.set(iova, { iova, size, asid });
      this.driverTable.add(iova);
      this.log.push(`MAP ${iova.toString(16)}+${size.toString(16)}`);
    } else if (type === IOTLB.INVALIDATE) {
      this.table.delete(iova);
      this.driverTable.delete(iova);
      this.log.push(`UNMAP ${iova.toString(16)}`);
    } else {
      this.log.push(type === IOTLB.BATCH_BEGIN ? "BEGIN" : "END");
    }
  }

  mapPage(): Mapping {
    throw new SysError("mmap", 524);
  }

  close(): void {
    this.closed = true;
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
