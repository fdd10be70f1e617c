import assert from "node:assert/strict";

// The net of the fuzzer holds: without this its runs would show nothing.
for (
  const [what, touch] of [["a mapping", "new Uint8Array(bufferAt(m.address, 8192))[4096]"], [
    "a mapping, downwards",
    "new Uint8Array(bufferAt(m.address - 1, 1))[0]",
  ]]
) {
  Deno.test(`a process with guard pages dies when it reads beyond ${what}`, async () => {
    const at = (path: string) => JSON.stringify(new URL(path, import.meta.url).href);
    const code = `import ${at("../support/guard_pages.ts")};
      import { createMemfd, mapFd } from ${at("../../src/ffi/mod.ts")};
      import { bufferAt } from ${at("../../src/ffi/libc.ts")};
      using fd = createMemfd("g", 4096);
      const m = mapFd(fd.fd, { length: 4096 });
      console.log(new Uint8Array(m.buffer())[4095]);
      console.log(${touch});`;
    const args = ["run", "-A", "--quiet", "--no-check", `data:text/javascript,${encodeURIComponent(code)}`];
    const { signal, stdout } = await new Deno.Command(Deno.execPath(), { args, stdin: "null", stderr: "null" }).output();
    assert.deepEqual([signal, new TextDecoder().decode(stdout)], ["SIGSEGV", "0\n"]);
  });
}
