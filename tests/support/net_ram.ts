/** A copy of a guest's RAM, as a migration would make it. */
import { createMemfd, mapFd, type OwnedFd } from "../../src/ffi/mod.ts";
export type { OwnedFd };

export function copyFile(from: OwnedFd, size: number): OwnedFd {
  const to = createMemfd("ram-copy", size);
  using source = mapFd(from.fd, { length: size, what: "RAM" });
  using target = mapFd(to.fd, { length: size, what: "copy" });
  new Uint8Array(target.buffer()).set(new Uint8Array(source.buffer()));
  return to;
}
