/**
 * A VhostBackend that records what it is told, for tests of whoever drives one.
 *
 * @module
 */
import { SvqError } from "../../src/errors.ts";
import { isOpenFd } from "../../src/ffi/fd.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { createMemfd, type OwnedFd } from "../../src/ffi/mod.ts";
import type { BackendInfo, DeviceStateDirection, InflightPlace, LogRegion, VhostBackend, VringAddresses } from "../../src/vhost/backend.ts";

/** One call of a method: its name and plain-data arguments. Descriptors are shown as `fd` (open) or `null`. */
export type Call = [name: string, ...args: unknown[]];

/** VERSION_1, EVENT_IDX, INDIRECT_DESC and some blk bits. */
export const FAKE_FEATURES = bitsOf([2, 6, 9, 28, 29, 32]);

/** A device that does nothing and remembers everything. */
export class FakeBackend implements VhostBackend {
  readonly calls: Call[] = [];
  readonly info: BackendInfo;
  features = FAKE_FEATURES;
  config: Uint8Array<ArrayBuffer> = Uint8Array.from({ length: 60 }, (_, i) => i);
  status = 0;
  bases = new Map<number, number>();
  /** Methods that reject, with how often they still do. */
  failing = new Map<string, number>();
  /** Methods that wait for a promise before they are recorded. */
  delays = new Map<string, Promise<void>>();
  onConfigChange: (() => void) | undefined;
  onFailure: ((error: Error) => void) | undefined;
  sendRarp?: (mac: Uint8Array<ArrayBuffer>) => Promise<void>;
  setMtu?: (mtu: number) => Promise<void>;

  constructor(info: Partial<BackendInfo> & { net?: boolean } = {}) {
    const { net, ...rest } = info;
    this.info = {
      kind: "sim",
      address: "sim:fake",
      queueNum: 4,
      maxMemSlots: 8,
      protocolFeatures: 0n,
      canSuspend: false,
      hasConfig: true,
      ...rest,
    };
    if (net === true) {
      this.sendRarp = (mac) => this.#record("sendRarp", [...mac]);
      this.setMtu = (mtu) => this.#record("setMtu", mtu);
    }
  }

  /** Names of the calls, in order. */
  get names(): string[] {
    return this.calls.map(([name]) => name);
  }

  async #record(name: string, ...args: unknown[]): Promise<void> {
    await this.delays.get(name);
    const failures = this.failing.get(name) ?? 0;
    if (failures > 0) {
      this.failing.set(name, failures - 1);
      throw new SvqError("FAKE", `${name} fails as told`);
    }
    this.calls.push([name, ...args]);
  }

  /** Given back by setDeviceStateFd, once. */
  stateFd: OwnedFd | undefined;
  async setDeviceStateFd(direction: DeviceStateDirection, phase: number, fd: number): Promise<OwnedFd | undefined> {
    await this.#record("setDeviceStateFd", direction, phase, plainFd(fd));
    const given = this.stateFd;
    this.stateFd = undefined;
    return given;
  }
  async createInflight(queues: number, num: number): Promise<{ file: OwnedFd; place: InflightPlace }> {
    await this.#record("createInflight", queues, num);
    const file = createMemfd("in-flight", 4096);
    return { file, place: { fd: file.fd, offset: 0, size: 4096, queues, num } };
  }
  setInflight({ fd, ...place }: InflightPlace): Promise<void> {
    return this.#record("setInflight", plainFd(fd), place);
  }
  checkDeviceState(): Promise<void> {
    return this.#record("checkDeviceState");
  }
  getFeatures(): Promise<bigint> {
    return Promise.resolve(this.features);
  }
  setFeatures(features: bigint): Promise<void> {
    return this.#record("setFeatures", features);
  }
  async getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    await this.#record("getConfig", offset, size);
    if (offset + size > this.config.length) throw new SvqError("OUT_OF_RANGE", "beyond the configuration");
    return this.config.slice(offset, offset + size);
  }
  async setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    await this.#record("setConfig", offset, [...bytes]);
    this.config.set(bytes, offset);
  }
  setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    return this.#record("setMemTable", regions.map(plainRegion));
  }
  addMemRegion(region: MemoryRegion): Promise<void> {
    return this.#record("addMemRegion", plainRegion(region));
  }
  removeMemRegion({ gpa, size, uaddr }: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    return this.#record("removeMemRegion", { gpa, size, uaddr });
  }
  setLogBase({ fd, offset, size }: LogRegion): Promise<void> {
    return this.#record("setLogBase", { fd: plainFd(fd), offset, size });
  }
  setVringNum(index: number, num: number): Promise<void> {
    return this.#record("setVringNum", index, num);
  }
  setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    return this.#record("setVringAddresses", index, { ...addresses });
  }
  setVringBase(index: number, base: number): Promise<void> {
    this.bases.set(index, base);
    return this.#record("setVringBase", index, base);
  }
  async getVringBase(index: number): Promise<number> {
    await this.#record("getVringBase", index);
    return this.bases.get(index) ?? 0;
  }
  setVringKick(index: number, fd: number | null): Promise<void> {
    return this.#record("setVringKick", index, plainFd(fd));
  }
  setVringCall(index: number, fd: number | null): Promise<void> {
    return this.#record("setVringCall", index, plainFd(fd));
  }
  setVringErr(index: number, fd: number | null): Promise<void> {
    return this.#record("setVringErr", index, plainFd(fd));
  }
  setVringEnable(index: number, enabled: boolean): Promise<void> {
    return this.#record("setVringEnable", index, enabled);
  }
  getStatus(): Promise<number> {
    return Promise.resolve(this.status);
  }
  async setStatus(status: number): Promise<void> {
    await this.#record("setStatus", status);
    this.status = status;
  }
  reset(): Promise<void> {
    return this.#record("reset");
  }
  suspend(): Promise<void> {
    return this.#record("suspend");
  }
  resume(): Promise<void> {
    return this.#record("resume");
  }
  close(): Promise<void> {
    return this.#record("close");
  }
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function plainFd(fd: number | null): string | null {
  if (fd === null) return null;
  return isOpenFd(fd) ? "fd" : "closed fd";
}

function plainRegion({ gpa, size, uaddr, fd, fdOffset }: MemoryRegion): unknown {
  return { gpa, size, uaddr, fd: plainFd(fd), fdOffset };
}
