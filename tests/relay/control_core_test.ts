import assert from "node:assert/strict";
import { createMemfd, mapFd, type Mapping } from "../../src/ffi/mod.ts";
import { encodeNetCommand } from "../../src/net/command.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import { ControlCore } from "../../src/relay/control_core.ts";
import { Counters } from "../../src/relay/counters.ts";
import type { ControlEvent, QueueStart } from "../../src/relay/messages.ts";
import { bit } from "../../src/uapi/bits.ts";
import { VIRTIO_NET_CTRL_ACK, VIRTIO_NET_FEATURE_BITS } from "../../src/uapi/virtio_net.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

const RAM = 1 << 20;
const NUM = 64;
const COMMAND_AT = 0x10000;
const ANSWER_AT = 0x20000;

/** A control queue with its guest and its device, all in one thread. */
class Rig implements Disposable {
  readonly #stack = new DisposableStack();
  readonly #ram: Mapping;
  readonly bytes: Uint8Array;
  readonly events: ControlEvent[] = [];
  readonly core: ControlCore;
  readonly driver: SplitDriver;
  readonly device: SplitDevice;
  readonly chain = new Chain(8);
  readonly #arena: Arena;

  constructor(features: bigint) {
    using fd = createMemfd("ram", RAM);
    this.#ram = this.#stack.use(mapFd(fd.fd, { length: RAM }));
    const buffer = this.#ram.buffer();
    this.bytes = new Uint8Array(buffer);
    const arena = this.#arena = this.#stack.use(new Arena(1, 2 ** 45, slotSize(NUM)));
    arena.place(0, NUM);
    const { desc, avail, used } = splitLayout(NUM);
    const guest = { desc: desc.offset, avail: avail.offset, used: used.offset };
    const shape = { num: NUM, packed: false, eventIdx: false, indirect: false, inOrder: false };
    const local = arena.local(0, NUM);
    const start: QueueStart = {
      ...{ index: 2, mode: "shadow", kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false },
      guest: { ...shape, ...guest },
      device: { ...shape, ...local },
      guestBase: 0,
      logUsedGpa: -1,
      control: { features, guestless: false, first: [], answers: true },
    };
    const memory = new RangeTable([{ gpa: 0, size: RAM, uaddr: 0, address: this.#ram.address }]);
    const path = { memory, translation: undefined, dirty: undefined };
    this.core = new ControlCore(start, path, new Counters(1).of(0), (event) => this.events.push(event));
    const part = (byteOffset: number) => ({ buffer, byteOffset });
    this.driver = new SplitDriver({ num: NUM, desc: part(guest.desc), avail: part(guest.avail), used: part(guest.used), eventIdx: false });
    const slot = arena.slot(0);
    const own = (address: number) => ({ buffer: slot, byteOffset: address - local.desc });
    this.device = new SplitDevice({
      ...{ num: NUM, desc: own(local.desc), avail: own(local.avail), used: own(local.used), eventIdx: false, indirect: false },
      memory: { contains: () => true, buffer: (address, length) => slot.slice(address - arena.iova, address - arena.iova + length) },
    });
  }

  /** The guest sends this, with room for one byte of answer. */
  offer(command: Uint8Array): void {
    this.bytes.set(command, COMMAND_AT);
    this.bytes[ANSWER_AT] = 0xee;
    const id = this.driver.add([{ address: COMMAND_AT, length: command.length }], [{ address: ANSWER_AT, length: 1 }]);
    assert.ok(id >= 0);
    this.driver.publish();
  }

  /** What the device finds at `iova`. */
  toDevice(iova: number, length: number): Uint8Array {
    return new Uint8Array(this.#arena.slot(0), iova - this.#arena.iova, length);
  }

  [Symbol.dispose](): void {
    this.core.close();
    this.#stack.dispose();
  }
}

const CTRL_RX = bit(VIRTIO_NET_FEATURE_BITS.CTRL_RX);
const PROMISC = encodeNetCommand({ name: "RX", mode: "promisc", on: true });

Deno.test("a device that changes its answer while it is read tells the guest and the record the same", () => {
  using rig = new Rig(CTRL_RX);
  rig.offer(PROMISC);
  assert.equal(rig.core.forward(), 1);
  assert.ok(rig.device.pop(rig.chain));
  rig.device.push(rig.chain.id, 1);
  rig.device.flush();
  // Every look at the shared page but the first finds another answer: whoever looks twice sees both.
  const slice = Uint8Array.prototype.slice;
  const told: number[] = [];
  Uint8Array.prototype.slice = function (this: Uint8Array, from?: number, to?: number) {
    this[from!] = VIRTIO_NET_CTRL_ACK.OK;
    const copy = slice.call(this, from, to);
    told.push(copy[0]!);
    this[from!] = VIRTIO_NET_CTRL_ACK.ERR;
    return copy;
  } as typeof slice;
  try {
    assert.equal(rig.core.returnUsed(), 1);
  } finally {
    Uint8Array.prototype.slice = slice;
  }
  assert.deepEqual(told, [VIRTIO_NET_CTRL_ACK.OK], "it was copied once");
  assert.equal(rig.bytes[ANSWER_AT], rig.events[0]!.ack);
});

Deno.test("a guest that sends nothing but what is refused is answered each time, and few of them are told", () => {
  using rig = new Rig(0n);
  for (let i = 0; i < 1000; i++) {
    rig.offer(PROMISC);
    assert.equal(rig.core.forward(), 1);
    assert.ok(rig.driver.take() >= 0);
    assert.equal(rig.bytes[ANSWER_AT], VIRTIO_NET_CTRL_ACK.ERR);
  }
  assert.ok(rig.events.length >= 16 && rig.events.length < 200, `${rig.events.length} events`);
});

Deno.test("a command that the guest changes after it was taken reaches the device as it was checked", () => {
  using rig = new Rig(CTRL_RX);
  rig.offer(PROMISC);
  assert.equal(rig.core.forward(), 1);
  rig.bytes.fill(0xff, COMMAND_AT, COMMAND_AT + 64);
  assert.ok(rig.device.pop(rig.chain));
  assert.deepEqual([...rig.toDevice(rig.chain.addresses[0]!, rig.chain.lengths[0]!)], [...PROMISC]);
  rig.device.push(rig.chain.id, 1);
  rig.device.flush();
  rig.core.returnUsed();
  assert.deepEqual([...rig.events[0]!.bytes], [...PROMISC], "and is on record so");
});
