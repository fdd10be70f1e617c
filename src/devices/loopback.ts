/**
 * The loopback device: no virtio device type, but the simplest one that uses every part of a ring.
 *
 * - A chain with readable and writable segments is an echo: the readable bytes are copied into the writable ones, as many
 *   as fit; that many are written.
 * - A chain with readable segments only is consumed; 0 bytes are written.
 * - A chain with writable segments only is filled with the pattern 0, 1, … 255, 0, ….
 *
 * @module
 */
import { copyMemory } from "../ffi/mod.ts";
import type { RangeTable } from "../memory/range_table.ts";
import type { Chain } from "../vring/queue.ts";
import { type DeviceModel, visitParts } from "./model.ts";

/** Echoes chains. */
export class LoopbackModel implements DeviceModel {
  /** Nothing depends on features. */
  configure(): void {}

  /** Serves one chain; see {@linkcode DeviceModel.execute}. */
  execute(chain: Chain, memory: RangeTable): number {
    if (chain.readableBytes === 0) {
      let at = 0;
      return visitParts(chain, true, 0, chain.writableBytes, (gpa, length) => {
        for (let i = 0; i < length; i++) memory.writeByte(gpa + i, at++ & 0xff);
      });
    }
    let done = 0;
    visitParts(chain, false, 0, Math.min(chain.readableBytes, chain.writableBytes), (source, length) => {
      visitParts(chain, true, done, length, (target, part) => {
        copyGuest(memory, target, source, part);
        source += part;
      });
      done += length;
    });
    return done;
  }
}

function copyGuest(memory: RangeTable, target: number, source: number, length: number): void {
  for (let done = 0; done < length;) {
    const runs = Math.min(memory.runLength(target + done), memory.runLength(source + done));
    const part = Math.max(1, Math.min(runs, length - done));
    copyMemory(memory.addressOf(target + done, part), memory.addressOf(source + done, part), part);
    done += part;
  }
}
