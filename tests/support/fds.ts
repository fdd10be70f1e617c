import { createEventfd, onBusFault, readable, signalEventfd } from "../../src/ffi/mod.ts";

// The reactor opens two descriptors of its own when somebody first waits, and keeps them.
{
  using event = createEventfd();
  signalEventfd(event.fd);
  await readable(event.fd);
}

// So does the guard of memory that shrinks.
onBusFault(() => {})[Symbol.dispose]();

/** Descriptors that this process has open, the one that reads the list included. */
export function countFds(): number {
  return [...Deno.readDirSync("/proc/self/fd")].length;
}
