import assert from "node:assert/strict";
import { quote, startScript } from "../../scripts/lab/vm_guest.ts";
import { loadOrder } from "../../scripts/lab/vm_initramfs.ts";

Deno.test("modules are loaded after everything they need, each once, built-in ones not at all", () => {
  const modulesDep = [
    "kernel/a/virtio_pci.ko.xz: kernel/a/modern-dev.ko.xz kernel/a/ring.ko.xz kernel/a/virtio.ko.xz",
    "kernel/a/modern-dev.ko.xz: kernel/a/virtio.ko.xz",
    "kernel/a/ring.ko.xz: kernel/a/virtio.ko.xz",
    "kernel/a/virtio.ko.xz:",
    "kernel/b/9p.ko.xz: kernel/a/ring.ko.xz",
    "",
  ].join("\n");
  assert.deepEqual(loadOrder(modulesDep, ["virtio-pci", "9p", "builtin"]).map((path) => path.replace(/^.*\//, "")), [
    "virtio.ko.xz",
    "modern-dev.ko.xz",
    "ring.ko.xz",
    "virtio_pci.ko.xz",
    "9p.ko.xz",
  ]);
});

Deno.test("a quoted word comes back from the shell as it was", async () => {
  for (const word of ["", "plain", "it's", '$HOME `id` \\ "x"', "two\nlines"]) {
    const { stdout } = await new Deno.Command("sh", { args: ["-c", `printf %s ${quote(word)}`] }).output();
    assert.equal(new TextDecoder().decode(stdout), word);
  }
});

Deno.test("the start script is valid shell", async () => {
  const script = startScript({
    command: ["echo", "it's"],
    modules: ["vdpa_sim use_va=0"],
    setup: ["true"],
    env: { A: "b c" },
    checkout: "/some where/svq",
    denoDir: "/cache",
    denoName: "deno",
    epochSeconds: 0,
    lifetimeSeconds: 1,
  });
  const child = new Deno.Command("sh", { args: ["-n"], stdin: "piped" }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(script));
  await writer.close();
  assert.equal((await child.status).code, 0);
});
