/**
 * Reads pcapng files as strictly as the format is written down: what Wireshark forgives is an error here.
 *
 * @module
 */
import assert from "node:assert/strict";

/** A frame in a file. */
export interface PcapngFrame {
  timeNs: bigint;
  length: number;
  bytes: Uint8Array;
  direction: "in" | "out" | undefined;
  queue: number | undefined;
  dropped: number;
}

/** What a file has. */
export interface Pcapng {
  interface: { name: string; linkType: number; snapLength: number };
  frames: PcapngFrame[];
  /** Of the interface statistics; undefined without. */
  dropped: number | undefined;
}

/** Parses a whole file. @throws AssertionError where it breaks a rule of the format */
export function decodePcapng(bytes: Uint8Array): Pcapng {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found: Pcapng = { interface: { name: "", linkType: -1, snapLength: 0 }, frames: [], dropped: undefined };
  let resolution = 6;
  let interfaces = 0;
  const options = (from: number, to: number): Map<number, Uint8Array> => {
    const map = new Map<number, Uint8Array>();
    for (let at = from; at < to;) {
      const code = view.getUint16(at, true);
      const length = view.getUint16(at + 2, true);
      if (code === 0) {
        assert.equal(length, 0);
        assert.equal(at + 4, to, "nothing follows the end of the options");
        break;
      }
      map.set(code, bytes.subarray(at + 4, at + 4 + length));
      at += 4 + (length + 3 & ~3);
    }
    return map;
  };
  const number = (option: Uint8Array | undefined): number =>
    option === undefined ? 0 : [...option].reduce((sum, byte, i) => sum + byte * 2 ** (8 * i), 0);
  for (let at = 0; at < bytes.length;) {
    const type = view.getUint32(at, true);
    const length = view.getUint32(at + 4, true);
    assert.ok(length >= 12 && length % 4 === 0 && at + length <= bytes.length, `block of ${length} bytes at ${at}`);
    assert.equal(view.getUint32(at + length - 4, true), length, "both lengths of a block are the same");
    const body = at + 8;
    const end = at + length - 4;
    if (at === 0) {
      assert.equal(type, 0x0a0d_0d0a, "a section begins");
      assert.equal(view.getUint32(body, true), 0x1a2b_3c4d);
      assert.deepEqual([view.getUint16(body + 4, true), view.getUint16(body + 6, true)], [1, 0], "version 1.0");
      options(body + 16, end);
    } else if (type === 1) {
      interfaces++;
      const list = options(body + 8, end);
      resolution = number(list.get(9) ?? Uint8Array.of(6));
      found.interface = {
        name: new TextDecoder().decode(list.get(2)),
        linkType: view.getUint16(body, true),
        snapLength: view.getUint32(body + 4, true),
      };
    } else if (type === 6) {
      assert.ok(view.getUint32(body, true) < interfaces, "the interface was described before");
      const units = BigInt(view.getUint32(body + 4, true)) << 32n | BigInt(view.getUint32(body + 8, true));
      const kept = view.getUint32(body + 12, true);
      const list = options(body + 20 + (kept + 3 & ~3), end);
      const flags = number(list.get(2)) & 3;
      found.frames.push({
        timeNs: units * 10n ** BigInt(9 - resolution),
        length: view.getUint32(body + 16, true),
        bytes: bytes.slice(body + 20, body + 20 + kept),
        direction: flags === 1 ? "in" : flags === 2 ? "out" : undefined,
        queue: list.has(6) ? number(list.get(6)) : undefined,
        dropped: number(list.get(4)),
      });
    } else if (type === 5) found.dropped = number(options(body + 12, end).get(5));
    else assert.fail(`block of type ${type}`);
    at += length;
  }
  return found;
}
