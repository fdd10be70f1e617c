/**
 * What a driver has set through the control queue: a model that follows the commands that the device has acknowledged, and
 * gives back the commands that bring a fresh device to the same state.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import {
  decodeNetCommand,
  encodeNetCommand,
  NET_RX_MODES,
  type NetCoalescing,
  type NetCommand,
  type NetHash,
  type NetRss,
  type NetRxMode,
} from "./command.ts";

/** Entry of {@linkcode NetStateDocument.steering}. */
export type NetSteering = { pairs: number } | { rss: NetRss } | { hash: NetHash };

/** The state as JSON, schema `svq.net-state/1`. What the driver has not set is absent. */
export interface NetStateDocument {
  /** Version of the document. */
  schema: "svq.net-state/1";
  /** `xx:xx:xx:xx:xx:xx`. */
  mac?: string;
  /** Modes that the driver has switched. */
  rx: Partial<Record<NetRxMode, boolean>>;
  /** Addresses to receive besides `mac`. */
  mac_table?: { unicast: string[]; multicast: string[] };
  /** VLANs that pass the filter, ascending. */
  vlans: number[];
  /** Queue pairs, RSS and hash report, in the order in which they were set: a later one may undo an earlier one. */
  steering: NetSteering[];
  /** Offloads that the guest accepts, `0x…`. */
  guest_offloads?: string;
  /** When the device may call late: for all queues of a direction, and for single ones (by queue index, ascending). */
  coalescing: { tx?: NetCoalescing; rx?: NetCoalescing; queues: ({ queue: number } & NetCoalescing)[] };
  /** What was set by commands that nobody here knows, so that it cannot be set again elsewhere. */
  not_migratable: string[];
}

/** How an unknown command is called in messages. */
export function nameOfUnknown(command: { class: number; command: number }): string {
  return `class ${command.class} command ${command.command}`;
}

/** Follows acknowledged commands. */
export class NetState {
  #mac: string | undefined;
  #rx = new Map<NetRxMode, boolean>();
  #table: { unicast: string[]; multicast: string[] } | undefined;
  #vlans = new Set<number>();
  #steering: NetSteering[] = [];
  #offloads: bigint | undefined;
  #tx: NetCoalescing | undefined;
  #rxCoalescing: NetCoalescing | undefined;
  #queues = new Map<number, NetCoalescing>();
  #unknown = new Set<string>();

  /** The MAC address that the driver has set. */
  get mac(): string | undefined {
    return this.#mac;
  }

  /** A receive mode; undefined where the driver has not switched it. */
  rxMode(mode: NetRxMode): boolean | undefined {
    return this.#rx.get(mode);
  }

  /** Addresses to receive besides the own one. */
  get macTable(): { readonly unicast: readonly string[]; readonly multicast: readonly string[] } | undefined {
    return this.#table;
  }

  /** Does a VLAN pass the filter? */
  hasVlan(vlan: number): boolean {
    return this.#vlans.has(vlan);
  }

  /** Queue pairs in use, as far as the driver has said it. */
  get pairs(): number | undefined {
    const last = this.#steering.findLast((entry) => !("hash" in entry));
    if (last === undefined) return undefined;
    return "pairs" in last ? last.pairs : (last as { rss: NetRss }).rss.max_tx_vq;
  }

  /** How packets are spread over queues by a hash, where that is what was set last. */
  get rss(): NetRss | undefined {
    const entry = this.#steering.find((entry) => "rss" in entry);
    return entry === undefined ? undefined : (entry as { rss: NetRss }).rss;
  }

  /** Offloads that the guest accepts; undefined: those that were negotiated. */
  get guestOffloads(): bigint | undefined {
    return this.#offloads;
  }

  /** Names of what cannot be set again elsewhere. */
  get notMigratable(): string[] {
    return [...this.#unknown];
  }

  /** Takes over what the device has acknowledged. */
  apply(command: NetCommand): void {
    switch (command.name) {
      case "RX":
        this.#rx.set(command.mode, command.on);
        return;
      case "MAC_TABLE_SET":
        this.#table = { unicast: [...command.unicast], multicast: [...command.multicast] };
        return;
      case "MAC_ADDR_SET":
        this.#mac = command.mac;
        return;
      case "VLAN_ADD":
        this.#vlans.add(command.vlan);
        return;
      case "VLAN_DEL":
        this.#vlans.delete(command.vlan);
        return;
      case "VQ_PAIRS_SET":
        // Turns RSS off (5.1.6.5.5); so does RSS to what was set before it.
        this.#steer({ pairs: command.pairs }, (entry) => "hash" in entry);
        return;
      case "RSS_CONFIG":
        this.#steer({ rss: structuredClone(command.rss) }, () => false);
        return;
      case "HASH_CONFIG":
        this.#steer({ hash: { ...command.hash } }, (entry) => !("hash" in entry));
        return;
      case "GUEST_OFFLOADS_SET":
        this.#offloads = command.offloads;
        return;
      case "NOTF_COAL_TX_SET":
        this.#tx = { ...command.coalescing };
        this.#forgetQueues(1);
        return;
      case "NOTF_COAL_RX_SET":
        this.#rxCoalescing = { ...command.coalescing };
        this.#forgetQueues(0);
        return;
      case "NOTF_COAL_VQ_SET":
        this.#queues.set(command.queue, { ...command.coalescing });
        return;
      case "UNKNOWN":
        this.#unknown.add(nameOfUnknown(command));
        return;
      case "ANNOUNCE_ACK":
      case "NOTF_COAL_VQ_GET":
      case "STATS":
        return;
    }
  }

  #steer(entry: NetSteering, keep: (entry: NetSteering) => boolean): void {
    this.#steering = [...this.#steering.filter(keep), entry];
  }

  // What is set for a whole direction holds for all of its queues.
  #forgetQueues(parity: number): void {
    for (const queue of [...this.#queues.keys()]) if (queue % 2 === parity) this.#queues.delete(queue);
  }

  /** Forgets everything: the device was reset. */
  reset(): void {
    this.#mac =
      this.#table =
      this.#offloads =
      this.#tx =
      this.#rxCoalescing =
        undefined;
    this.#rx.clear();
    this.#vlans.clear();
    this.#steering = [];
    this.#queues.clear();
    this.#unknown.clear();
  }

  /** The commands that bring a fresh device to this state, in an order that works. Unknown ones are not among them. */
  replay(): NetCommand[] {
    const commands: NetCommand[] = [];
    if (this.#mac !== undefined) commands.push({ name: "MAC_ADDR_SET", mac: this.#mac });
    for (const mode of NET_RX_MODES) {
      const on = this.#rx.get(mode);
      if (on !== undefined) commands.push({ name: "RX", mode, on });
    }
    if (this.#table !== undefined) commands.push({ name: "MAC_TABLE_SET", ...structuredClone(this.#table) });
    for (const vlan of this.#sortedVlans()) commands.push({ name: "VLAN_ADD", vlan });
    for (const entry of this.#steering) {
      if ("pairs" in entry) commands.push({ name: "VQ_PAIRS_SET", pairs: entry.pairs });
      else if ("rss" in entry) commands.push({ name: "RSS_CONFIG", rss: structuredClone(entry.rss) });
      else commands.push({ name: "HASH_CONFIG", hash: { ...entry.hash } });
    }
    if (this.#offloads !== undefined) commands.push({ name: "GUEST_OFFLOADS_SET", offloads: this.#offloads });
    if (this.#tx !== undefined) commands.push({ name: "NOTF_COAL_TX_SET", coalescing: { ...this.#tx } });
    if (this.#rxCoalescing !== undefined) commands.push({ name: "NOTF_COAL_RX_SET", coalescing: { ...this.#rxCoalescing } });
    for (const [queue, coalescing] of this.#sortedQueues()) {
      commands.push({ name: "NOTF_COAL_VQ_SET", queue, coalescing: { ...coalescing } });
    }
    return commands;
  }

  #sortedVlans(): number[] {
    return [...this.#vlans].sort((a, b) => a - b);
  }

  #sortedQueues(): [number, NetCoalescing][] {
    return [...this.#queues].sort(([a], [b]) => a - b);
  }

  /** The state as JSON. */
  save(): NetStateDocument {
    return structuredClone({
      schema: "svq.net-state/1",
      ...(this.#mac === undefined ? {} : { mac: this.#mac }),
      rx: Object.fromEntries(NET_RX_MODES.filter((mode) => this.#rx.has(mode)).map((mode) => [mode, this.#rx.get(mode)!])),
      ...(this.#table === undefined ? {} : { mac_table: this.#table }),
      vlans: this.#sortedVlans(),
      steering: this.#steering,
      ...(this.#offloads === undefined ? {} : { guest_offloads: `0x${this.#offloads.toString(16)}` }),
      coalescing: {
        ...(this.#tx === undefined ? {} : { tx: this.#tx }),
        ...(this.#rxCoalescing === undefined ? {} : { rx: this.#rxCoalescing }),
        queues: this.#sortedQueues().map(([queue, coalescing]) => ({ queue, ...coalescing })),
      },
      not_migratable: this.notMigratable,
    });
  }

  /**
   * The state that a document describes. Every part is checked by making the command of it that a driver would have sent.
   *
   * @throws SvqError BAD_NET_STATE
   */
  static load(document: unknown): NetState {
    try {
      return loadState(document);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      throw new SvqError("BAD_NET_STATE", `The state of a network device cannot be used: ${reason}`, { cause: error });
    }
  }

  /** Names what cannot be set again, when a document is loaded. */
  markNotMigratable(name: string): void {
    this.#unknown.add(name);
  }
}

function whole(value: unknown, most: number, what: string): number {
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value > most) {
    throw new Error(`${what} is ${JSON.stringify(value)}`);
  }
  return value;
}

function list<T>(value: unknown, what: string, most: number, item: (value: unknown) => T): T[] {
  if (!Array.isArray(value) || value.length > most) throw new Error(`${what} is no list of at most ${most} entries`);
  return value.map(item);
}

function record(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(`${what} is no object`);
  return value as Record<string, unknown>;
}

function text(value: unknown, what: string): string {
  if (typeof value !== "string" || value.length > 512) throw new Error(`${what} is no text`);
  return value;
}

const U16 = 0xffff;
const U32 = 0xffff_ffff;

function coalescingOf(value: unknown): NetCoalescing {
  const { max_packets, max_usecs } = record(value, "coalescing");
  return { max_packets: whole(max_packets, U32, "max_packets"), max_usecs: whole(max_usecs, U32, "max_usecs") };
}

function steeringOf(value: unknown): NetCommand {
  const entry = record(value, "steering");
  if ("pairs" in entry) return { name: "VQ_PAIRS_SET", pairs: whole(entry.pairs, U16, "pairs") };
  if ("hash" in entry) {
    const { hash_types, key } = record(entry.hash, "hash");
    return { name: "HASH_CONFIG", hash: { hash_types: whole(hash_types, U32, "hash_types"), key: text(key, "key") } };
  }
  const { hash_types, unclassified_queue, indirection, max_tx_vq, key } = record(entry.rss, "rss");
  return {
    name: "RSS_CONFIG",
    rss: {
      hash_types: whole(hash_types, U32, "hash_types"),
      unclassified_queue: whole(unclassified_queue, U16, "unclassified_queue"),
      indirection: list(indirection, "indirection", 8192, (queue) => whole(queue, U16, "indirection")),
      max_tx_vq: whole(max_tx_vq, U16, "max_tx_vq"),
      key: text(key, "key"),
    },
  };
}

function loadState(value: unknown): NetState {
  const document = record(value, "it");
  if (document.schema !== "svq.net-state/1") throw new Error(`its schema is ${JSON.stringify(document.schema)}`);
  const state = new NetState();
  // Encoding and decoding checks as a device would.
  const apply = (command: NetCommand) => state.apply(decodeNetCommand(encodeNetCommand(command)));
  const { mac, rx, mac_table, vlans, steering, guest_offloads, coalescing, not_migratable } = document;
  if (mac !== undefined) apply({ name: "MAC_ADDR_SET", mac: text(mac, "mac") });
  for (const [mode, on] of Object.entries(record(rx, "rx"))) {
    const known = NET_RX_MODES.find((name) => name === mode);
    if (known === undefined || typeof on !== "boolean") throw new Error(`rx.${mode} is ${JSON.stringify(on)}`);
    apply({ name: "RX", mode: known, on });
  }
  if (mac_table !== undefined) {
    const { unicast, multicast } = record(mac_table, "mac_table");
    const macs = (value: unknown) => list(value, "mac_table", 4096, (mac) => text(mac, "mac"));
    apply({ name: "MAC_TABLE_SET", unicast: macs(unicast), multicast: macs(multicast) });
  }
  for (const vlan of list(vlans, "vlans", 4096, (vlan) => whole(vlan, 4095, "vlan"))) apply({ name: "VLAN_ADD", vlan });
  for (const command of list(steering, "steering", 3, steeringOf)) apply(command);
  if (guest_offloads !== undefined) {
    const offloads = text(guest_offloads, "guest_offloads");
    if (!/^0x[0-9a-f]{1,16}$/i.test(offloads)) throw new Error(`guest_offloads is ${JSON.stringify(offloads)}`);
    apply({ name: "GUEST_OFFLOADS_SET", offloads: BigInt(offloads) });
  }
  const { tx, rx: receive, queues } = record(coalescing, "coalescing");
  if (tx !== undefined) apply({ name: "NOTF_COAL_TX_SET", coalescing: coalescingOf(tx) });
  if (receive !== undefined) apply({ name: "NOTF_COAL_RX_SET", coalescing: coalescingOf(receive) });
  list(queues, "coalescing.queues", U16, (entry) => {
    const queue = whole(record(entry, "queue").queue, U16, "queue");
    apply({ name: "NOTF_COAL_VQ_SET", queue, coalescing: coalescingOf(entry) });
  });
  for (const name of list(not_migratable, "not_migratable", 65536, (name) => text(name, "not_migratable"))) state.markNotMigratable(name);
  return state;
}
