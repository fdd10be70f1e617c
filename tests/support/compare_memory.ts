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
