import { O, openFd } from "../../src/ffi/fd.ts";
import { equalMemory, mapFd, PAGE_SIZE, PROT } from "../../src/ffi/mapping.ts";

const CHUNK = 256 * PAGE_SIZE;

/**
 * Compares two files of whole pages.
 *
 * @param a path, e.g. of a guest's RAM ({@linkcode Vm.memoryPath})
 * @returns numbers of the pages that differ
 * @throws Error when their sizes differ
 */
export function differingPages(a: string, b: string): number[] {
  const size = Deno.statSync(a).size;
  if (size === 0 || size !== Deno.statSync(b).size) throw new Error(`${a} has ${size} bytes, ${b} ${Deno.statSync(b).size}`);
  using fdA = openFd(a, O.RDONLY);
  using fdB = openFd(b, O.RDONLY);
  using left = mapFd(fdA.fd, { length: size, prot: PROT.READ });
  using right = mapFd(fdB.fd, { length: size, prot: PROT.READ });
  const found: number[] = [];
  for (let chunk = 0; chunk < size; chunk += CHUNK) {
    const end = Math.min(size, chunk + CHUNK);
    if (equalMemory(left.address + chunk, right.address + chunk, end - chunk)) continue;
    for (let at = chunk; at < end; at += PAGE_SIZE) {
      if (!equalMemory(left.address + at, right.address + at, PAGE_SIZE)) found.push(at / PAGE_SIZE);
    }
  }
  return found;
}

const SECTOR_BYTES = 512;
/** What the guest's workload writes to the start of every sector of a buffer before it is read into (guest/svq_guest.c). */
export const POISON = 0xdeadfeedbadc0ffen;

/**
 * Is the processor's poison all that a page lacks at `b`? QEMU under TCG forgets such stores now and then, also where no
 * vhost device and no svq is there: every sector's first word is affected and nothing of what the device wrote. A device's
 * write that was forgotten looks different: it is the source then that holds the data.
 *
 * @param a path of the source's memory
 * @param b path of the destination's
 * @param page number of the page
 */
export function lacksPoisonOnly(a: string, b: string, page: number): boolean {
  const [left, right] = [a, b].map((path) => {
    using file = Deno.openSync(path);
    const words = new BigUint64Array(PAGE_SIZE / 8);
    file.seekSync(page * PAGE_SIZE, Deno.SeekMode.Start);
    if (file.readSync(new Uint8Array(words.buffer)) !== PAGE_SIZE) throw new Error(`${path} has no page ${page}`);
    return words;
  });
  return left!.every((word, i) => word === right![i] || (i % (SECTOR_BYTES / 8) === 0 && word === POISON));
}
