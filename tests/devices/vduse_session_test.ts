import assert from "node:assert/strict";
import { SvqError } from "../../src/errors.ts";
import type { SessionDevice } from "../../src/devices/vduse_session.ts";
import { VduseSession } from "../../src/devices/vduse_session.ts";
import { decodeVduseRequest, VDUSE_MESSAGE_BYTES, VDUSE_REQUEST, type VduseVqInfo } from "../../src/uapi/vduse.ts";
import { viewOf } from "../../src/uapi/vhost.ts";
import { countFds } from "../support/fds.ts";

const DRIVER_OK = 0xf;
const VERSION_1 = 1n << 32n;
const ACCESS_PLATFORM = 1n << 33n;

/** A message as read(2) gives it: struct vduse_dev_request, little-endian, 32-bit words from byte 24 on. */
function message(type: number, id: number, ...payload: number[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VDUSE_MESSAGE_BYTES);
  [type, id, 0, 0, 0, 0, ...payload].forEach((word, i) => viewOf(bytes).setUint32(4 * i, word, true));
  return bytes;
}

function setUp(options: { queues?: number; ready?: number[] } = {}) {
  const { queues = 2, ready = [0, 1] } = options;
  const log: string[] = [];
  const events: string[] = [];
  const positions = Array.from({ length: queues }, (_, index) => 100 + index);
  const say = (what: string) => {
    log.push(what);
    return Promise.resolve();
  };
  const device = {
    info: { queueNum: queues },
    setFeatures: (word: bigint) => say(`features ${word.toString(16)}`),
    setVringNum: (index: number, num: number) => say(`num ${index} ${num}`),
    setVringBase: (index: number, base: number) => say(`base ${index} ${base}`),
    setVringAddresses: (index: number) => say(`addresses ${index}`),
    setVringKick: (index: number) => say(`kick ${index}`),
    setVringEnable: (index: number, on: boolean) => say(`enable ${index} ${on}`),
    getVringBase: (index: number) => say(`stop ${index}`).then(() => positions[index]!),
    vringPosition: (index: number) => Promise.resolve(positions[index]!),
    iotlbChanged: () => say("iotlb"),
    reset: () => say("reset"),
  } as unknown as SessionDevice;
  const state: { fail?: string } = {};
  const info = (index: number): VduseVqInfo => ({
    num: 64,
    addresses: { desc: 0x1000, avail: 0x2000, used: 0x3000 },
    base: 7,
    ready: ready.includes(index),
  });
  const session = new VduseSession(device, {
    features: () => {
      if (state.fail !== undefined) throw new SvqError("KERNEL", state.fail);
      return VERSION_1 | ACCESS_PLATFORM;
    },
    vqInfo: info,
    setKick: (index, fd) => void log.push(`kernel kick ${index} ${fd < 0 ? "none" : "given"}`),
  }, { info: (text) => events.push(text), warn: (what, { message }) => events.push(`${what}: ${message}`) });
  const send = async (type: number, ...payload: number[]) => {
    const answer = viewOf(await session.answer(decodeVduseRequest(message(type, 77, ...payload))));
    assert.equal(answer.getUint32(0, true), 77, "the id comes back");
    for (const reserved of [8, 12, 16, 20]) assert.equal(answer.getUint32(reserved, true), 0, "reserved words are zero");
    return { ok: answer.getUint32(4, true) === 0, word: (at: number) => answer.getUint32(24 + 4 * at, true) };
  };
  return { session, log, events, state, send };
}

Deno.test("with DRIVER_OK the queues that the driver readied start where it says, and with status 0 all stop", async () => {
  const before = countFds();
  const { session, log, events, send } = setUp({ ready: [1] });
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, 0x3)).ok);
  assert.equal(log.length, 0);
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK)).ok);
  assert.deepEqual(log.splice(0), [
    ...["iotlb", "features 100000000", "num 1 64", "base 1 7", "addresses 1", "enable 1 true", "kernel kick 1 given", "kick 1"],
  ]);
  assert.deepEqual(session.running, [1]);
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, 0)).ok);
  assert.deepEqual(log, ["reset"]);
  assert.deepEqual([session.running, events], [[], ["a driver came, 1 queue", "the driver left"]]);
  assert.equal(countFds(), before);
});

Deno.test("a position is answered with the queue's number, and an IOTLB change when nothing uses the old ranges any more", async () => {
  const { log, send } = setUp();
  await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK);
  const answer = await send(VDUSE_REQUEST.GET_VQ_STATE, 1);
  assert.deepEqual([answer.ok, answer.word(0), answer.word(1)], [true, 1, 101]);
  log.length = 0;
  assert.ok((await send(VDUSE_REQUEST.UPDATE_IOTLB, 0, 0, 0xffff, 0)).ok);
  assert.deepEqual(log, ["iotlb"]);
  await send(VDUSE_REQUEST.SET_STATUS, 0);
});

Deno.test("API 1: the one group can be in the one address space, and nowhere else", async () => {
  const { events, send } = setUp();
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_GROUP_ASID, 0, 0)).ok);
  assert.ok(!(await send(VDUSE_REQUEST.SET_VQ_GROUP_ASID, 0, 1)).ok);
  assert.ok(!(await send(VDUSE_REQUEST.SET_VQ_GROUP_ASID, 1, 0)).ok);
  assert.match(events.join(), /no group 0 with address space 1/);
});

Deno.test("QUEUE_READY: a queue that is readied after DRIVER_OK starts, one that is not ready any more is drained and stops", async () => {
  const { session, log, send } = setUp({ ready: [0] });
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_READY, 1, 1)).ok, "before DRIVER_OK the record will say it");
  assert.equal(log.length, 0);
  await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK);
  assert.deepEqual(session.running, [0]);
  log.length = 0;
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_READY, 1, 1)).ok);
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_READY, 1, 1)).ok, "twice is harmless");
  assert.deepEqual(session.running, [0, 1]);
  assert.equal(log.filter((line) => line.startsWith("enable 1")).length, 1);
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_READY, 0, 0)).ok);
  assert.deepEqual(log.slice(-2), ["stop 0", "kernel kick 0 none"]);
  assert.deepEqual(session.running, [1]);
  assert.ok(!(await send(VDUSE_REQUEST.SET_VQ_READY, 9, 1)).ok, "no such queue");
  await send(VDUSE_REQUEST.SET_STATUS, 0);
});

Deno.test("SUSPEND stops every queue when its requests are back, positions stay, and only a reset starts anything again", async () => {
  const before = countFds();
  const { session, log, send } = setUp();
  await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK);
  log.length = 0;
  assert.ok((await send(VDUSE_REQUEST.SUSPEND)).ok);
  assert.deepEqual(log.splice(0), ["stop 0", "kernel kick 0 none", "stop 1", "kernel kick 1 none"]);
  assert.equal((await send(VDUSE_REQUEST.GET_VQ_STATE, 0)).word(1), 100);
  assert.ok((await send(VDUSE_REQUEST.SET_VQ_READY, 0, 1)).ok);
  assert.ok((await send(VDUSE_REQUEST.SUSPEND)).ok, "twice is harmless");
  assert.deepEqual([session.running, log], [[], []]);
  await send(VDUSE_REQUEST.SET_STATUS, 0);
  await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK);
  assert.deepEqual(session.running, [0, 1]);
  await send(VDUSE_REQUEST.SET_STATUS, 0);
  assert.equal(countFds(), before);
});

Deno.test("a status that loses bits without a reset is refused: the rings that run would be started a second time (found by fuzzing)", async () => {
  const before = countFds();
  const { session, log, events, send } = setUp();
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK)).ok);
  log.length = 0;
  assert.ok(!(await send(VDUSE_REQUEST.SET_STATUS, 0x3)).ok);
  assert.match(events.join(), /from 0xf to 0x3/);
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK)).ok, "it is as it was");
  assert.deepEqual([session.running, log], [[0, 1], []]);
  await send(VDUSE_REQUEST.SET_STATUS, 0);
  assert.equal(countFds(), before);
});

Deno.test("what cannot be done is answered so and told, and a message of an unknown type is refused", async () => {
  const before = countFds();
  const { session, log, events, state, send } = setUp();
  state.fail = "the kernel says no";
  assert.ok(!(await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK)).ok);
  assert.deepEqual([session.running, log], [[], ["reset"]]);
  assert.match(events.join(), /could not be obeyed: the kernel says no/);
  assert.ok(!(await send(6)).ok);
  assert.match(events.join(), /Type 6 is not known/);
  delete state.fail;
  assert.ok((await send(VDUSE_REQUEST.SET_STATUS, DRIVER_OK)).ok, "it goes on");
  await send(VDUSE_REQUEST.SET_STATUS, 0);
  assert.equal(countFds(), before);
});
