/**
 * What a user chooses of a relay, and what its owner hears from it.
 *
 * @module
 */
import type { ErrorRecord } from "../errors.ts";
import type { CoreChoice } from "./core.ts";
import type { PollChoice } from "./polling.ts";
import type { RunningMode } from "./queue_steps.ts";

/** Modes that can be asked for: `auto` is passthrough until the VMM turns the dirty log on. */
export type RelayMode = "auto" | RunningMode;

/** How a ring format is chosen. */
export type RingChoice = "auto" | "split" | "packed";

/**
 * What becomes of the indirect tables of a guest in mode `shadow`. `copy`: the chain is rebuilt in a table of the relay's own.
 * `pass`: the device is given the guest's table itself, where guest memory keeps its addresses. `flatten`: the device is
 * not offered tables; chains lie in its ring.
 */
export type IndirectChoice = "copy" | "pass" | "flatten";

/**
 * Does the guest see IN_ORDER? `auto`: where the device has it. `on`: always; where the device has it not, the relay puts what
 * comes back in order. `off`: never.
 */
export type InOrderChoice = "auto" | "on" | "off";

/** What the user chooses; may be changed while the relay runs (then call `Relay.applyMode`). */
export interface RelayConfig {
  /** Mode of all queues. */
  mode: RelayMode;
  /** Modes of single queues, instead of `mode`. */
  queueModes?: Map<number, RelayMode>;
  /** Stay in shadow mode, whatever the modes say. */
  forceShadow: boolean;
  /** How long turning the dirty log on may keep the VMM waiting, ms. */
  switchTimeoutMs: number;
  /**
   * How long the device may hold requests of a ring that the front-end stops, ms; after that its connection is closed, and the device
   * counts as lost. Infinity: as long as it likes. vhost-user devices only: no other can be taken its rings from outside.
   */
  stopTimeoutMs: number;
  /** Worker threads. */
  workers: number;
  /** How long a Worker looks for more before it sleeps, us; `auto`: as long as it has shown to be worth it. */
  pollUs: PollChoice;
  /** CPUs for the Workers, in turn; absent: the kernel's choice. */
  cpus?: readonly number[];
  /** What runs the data path: WebAssembly where it can be (`auto`, `wasm`), or JavaScript. */
  core: CoreChoice;
  /** Ring format that the guest is offered: the device's, or one of them whatever the device has. */
  guestRing: RingChoice;
  /** Ring format of the device: the guest's, or one of them whatever the guest has. */
  deviceRing: RingChoice;
  /** Descriptors in the device's rings; the guest's number where it is absent, or the most that the device takes. */
  deviceRingSize?: number;
  /** What becomes of indirect tables in mode `shadow`. */
  indirect: IndirectChoice;
  /** Is the guest offered IN_ORDER? */
  inOrder: InOrderChoice;
  /** Is a guest with an IOMMU (ACCESS_PLATFORM) relayed? All of its queues run in mode `shadow` then. */
  guestIommu: boolean;
  /**
   * Address of the guest's network device, `xx:xx:xx:xx:xx:xx`, for VMMs that do not tell it: where the relay drives the control queue,
   * the device is told this address instead of being made promiscuous.
   */
  mac?: string;
}

/** The defaults of {@linkcode RelayConfig}. */
export const DEFAULT_RELAY_CONFIG: RelayConfig = {
  mode: "auto",
  forceShadow: false,
  switchTimeoutMs: 500,
  stopTimeoutMs: 300_000,
  workers: 1,
  pollUs: "auto",
  core: "auto",
  guestRing: "auto",
  deviceRing: "auto",
  indirect: "copy",
  inOrder: "auto",
  guestIommu: false,
};

/** What a relay reports to its owner. */
export interface RelayEvents {
  /** A line for the log. */
  log(message: string): void;
  /** A queue stopped, or the device is gone. */
  error(error: ErrorRecord): void;
  /** The device is gone: `Relay.attach` another connection to it, or `Relay.giveUp`. Absent: queues fail. */
  deviceLost?: (error: Error) => void;
}
