/**
 * Schemas of what describes rings: vring, vring-diff, vring-image.
 *
 * @module
 */
import { choice, count, document, flag, hex, type JsonSchema, list, map, nullable, number, object, optional, text } from "./build.ts";

const chain = object({
  head: count("Split: head index; packed: buffer id"),
  position: optional(count("Split: avail index at which it was made available; packed: slot")),
  length: count("Buffers, those of an indirect table included"),
  readable_bytes: count(),
  writable_bytes: count(),
  direction: optional(choice(["read", "write", "read+write", "none"], "What the device may do")),
  descriptors: optional(list(count(), "Indices in the ring")),
  indirect: optional(nullable(object({ address: hex(), bytes: count(), entries: count("0: the table was not read") }))),
  in_flight: optional(nullable(flag("null: the ring does not tell"))),
  certain: optional(flag("False: the likely reading of the ring, not the only one")),
  likelihood: optional(number("How much of the past that the ring holds speaks for it, 0 to 1")),
  taken: optional(nullable(flag("The device has taken it; null: not known"))),
  in_flight_ms: optional(nullable(number("At least so long: since svq vring first saw it; null: this is the first time"))),
});

const anomaly = object({
  rule: text("Stable name of the broken rule"),
  spec: text("Section of the virtio specification"),
  index: optional(nullable(count("Where in the ring"))),
  detail: text(),
});

const side = choice(["guest", "shadow", "device"], "The guest's ring, or the relay's own at the device");

const ring = object({
  index: count("Queue"),
  side,
  mode: optional(text("Relay mode of the queue")),
  layout: choice(["split", "packed"]),
  num: count("Ring size in descriptors"),
  consistent: optional(flag("False: the ring moved while it was read")),
  avail_idx: nullable(count("Packed: the driver's next slot; null where it cannot be told")),
  used_idx: nullable(count("Packed: the device's next used slot; null where it cannot be told")),
  last_avail_idx: optional(nullable(count("What the device takes next; null: not known"))),
  in_flight: optional(nullable(count("Chains between avail and used; null: not known"))),
  flags: optional(nullable(map(true))),
  wrap_counters: optional(nullable(map(true))),
  suppression: optional(nullable(map(true, "kicks: what the device wants; calls: what the driver wants"))),
  features: optional(map(true)),
  addresses: optional(nullable(object({ desc: hex(), avail: hex(), used: hex() }))),
  descriptors: optional(list(map(true))),
  chains: optional(list(chain)),
  window: optional(map(true, "Entries around the indices")),
  anomalies: list(anomaly),
});

const name = object({ head: count(), position: count() });
const origin = object({ source: text("Image file, or name of a relay"), read_at: text("ISO 8601") });

/** By document name. */
export const VRING_SCHEMAS: Readonly<Record<string, JsonSchema>> = {
  "svq.vring/1": document("svq.vring/1", "State of vrings", {
    relay: optional(text("Name of the relay")),
    source: optional(text("Image file or device")),
    read_at: optional(text("ISO 8601")),
    consistent: flag("False: the rings moved while they were read"),
    queues: list(ring),
    unreadable: optional(list(object({ index: count(), side, code: text(), message: text() }), "Rings that could not be read")),
  }),
  "svq.vring-diff/1": document("svq.vring-diff/1", "What moved between two looks at rings", {
    a: origin,
    b: origin,
    identical: flag(),
    queues: list(object({
      index: count("Queue"),
      side,
      only_in: nullable(choice(["a", "b"])),
      identical: flag(),
      torn: flag("One of the two was torn"),
      unit: choice(["chains", "slots"]),
      avail_moved: nullable(count()),
      used_moved: nullable(count()),
      returned: list(name),
      added: list(name),
      stayed: list(name, "In flight in both"),
      descriptors_changed: list(count()),
      changes: list(object({ field: text() })),
    })),
  }),
  "svq.vring-image/1": document("svq.vring-image/1", "Memory of rings, as svq vring dump --save writes it", {
    created: text("ISO 8601"),
    relay: optional(text("Name of the relay")),
    device: optional(text("Device address")),
    queues: list(object({
      index: count("Queue"),
      side: choice(["guest", "shadow"]),
      mode: text("Relay mode of the queue"),
      error: optional(object({ code: text(), message: text() })),
      ring: optional(object({
        layout: choice(["split", "packed"]),
        num: count("Ring size in descriptors"),
        event_idx: flag(),
        indirect: flag(),
        in_order: flag(),
        max_chain: optional(count("Segments")),
        consistent: flag(),
        attempts: count(),
        addresses: optional(object({ desc: hex(), avail: hex(), used: hex() })),
        positions: object({ last_avail: nullable(count()), used: nullable(count()), last_used: nullable(count()) }),
        memory: optional(list(object({ address: hex(), size: hex() }))),
        desc: text("base64"),
        avail: text("base64; packed: driver event area"),
        used: text("base64; packed: device event area"),
        tables: list(object({ address: hex(), data: text("base64") })),
      })),
      seen: optional(list(object({ head: count(), position: count(), ms: nullable(number()) }))),
    })),
  }),
};
