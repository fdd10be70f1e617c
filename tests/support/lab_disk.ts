/**
 * The sectors of a kernel vDPA disk, moved by hand, with nobody else on it.
 *
 * @module
 */
import assert from "node:assert/strict";
import { openDevice } from "../../src/devices/open.ts";
import { HandMemory, HandRing } from "./hand_ring.ts";

const SECTOR = 512;
const [HEAD, STATUS, DATA] = [0x40000, 0x42000, 0x50000];
/** Bytes of one request, at most. */
export const MOVE_MAX = 65536;

/** Reads `bytes` (default 512) from `sector` on, or writes what is given. */
export type Move = (sector: number, write?: Uint8Array, bytes?: number) => Promise<Uint8Array>;

/** Opens a disk for itself, `vdpa:NAME` or `/dev/vhost-vdpa-N`. */
export async function withDisk(address: string, use: (move: Move) => Promise<void>): Promise<void> {
  await using device = await openDevice(address);
  using memory = new HandMemory();
  using ring = new HandRing(memory, 0, 0x10000);
  await device.setMemTable([memory.region]);
  await device.setFeatures(0n);
  await device.startVrings!([ring.start()]);
  await use(async (sector, write, bytes = write?.length ?? SECTOR) => {
    assert.ok(bytes <= MOVE_MAX);
    memory.bytes.fill(0, HEAD, HEAD + 16);
    memory.view.setUint32(HEAD, write === undefined ? 0 : 1, true);
    memory.view.setBigUint64(HEAD + 8, BigInt(sector), true);
    if (write !== undefined) memory.bytes.set(write, DATA);
    memory.bytes[STATUS] = 0xff;
    ring.offer([HEAD, 16, false], [DATA, bytes, write === undefined], [STATUS, 1, true]);
    await ring.taken(`sector ${sector}`);
    assert.equal(memory.bytes[STATUS], 0, `status of sector ${sector}`);
    return memory.bytes.slice(DATA, DATA + bytes);
  });
}

/** The first `bytes` of a disk. */
export async function readDisk(address: string, bytes: number): Promise<Uint8Array> {
  const all = new Uint8Array(bytes);
  await withDisk(address, async (move) => {
    for (let at = 0; at < bytes; at += MOVE_MAX) all.set(await move(at / SECTOR, undefined, Math.min(MOVE_MAX, bytes - at)), at);
  });
  return all;
}

/** Overwrites a disk's beginning. */
export async function writeDisk(address: string, bytes: Uint8Array): Promise<void> {
  await withDisk(address, async (move) => {
    for (let at = 0; at < bytes.length; at += MOVE_MAX) await move(at / SECTOR, bytes.subarray(at, at + MOVE_MAX));
  });
}
