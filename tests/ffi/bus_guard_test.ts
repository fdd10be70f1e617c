import assert from "node:assert/strict";
import { busGuardWorks } from "../../src/ffi/mod.ts";
import { bufferAt, libc, pointer } from "../../src/ffi/libc.ts";
import { busHandler } from "./bus_handler.ts";

const PAGE = 4096;
const READ_WRITE = 3;
const READ_EXEC = 5;
const PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 0x10_0022;

// Two tables would each know half of the memory: a fault in the other half ends the process.
const name = "every thread finds the one handler, also when the kernel shows its page and the page before as one";
Deno.test({ name, ignore: !busGuardWorks() }, async () => {
  const handler = busHandler();
  // What a JIT does at any time: code right beneath. Where it has done so already, that place is taken.
  const before = Deno.UnsafePointer.value(
    libc().mmap(pointer(handler - PAGE), BigInt(PAGE), READ_WRITE, PRIVATE_ANONYMOUS_FIXED_NOREPLACE, -1, 0n),
  );
  const placed = Number(before) === handler - PAGE;
  if (placed) {
    new Uint8Array(bufferAt(handler - PAGE, PAGE)).fill(0xcc);
    assert.equal(libc().mprotect(pointer(handler - PAGE), BigInt(PAGE), READ_EXEC), 0);
  }
  try {
    const found = await new Promise((resolve, reject) => {
      const worker = new Worker(new URL("./bus_guard_thread.ts", import.meta.url), { type: "module" });
      worker.onmessage = ({ data }) => {
        worker.terminate();
        resolve(data);
      };
      worker.onerror = reject;
    });
    assert.equal(found, handler);
  } finally {
    if (placed) libc().munmap(pointer(handler - PAGE), BigInt(PAGE));
  }
});
