/**
 * Network guests (SeaBIOS + iPXE) in nested QEMUs on the kernel's vDPA devices through svq relay run, in the lab VM: their
 * frames are counted, and they are migrated to a second QEMU on a second device.
 */
import assert from "node:assert/strict";
import { labRelay, startSvq, svqJson } from "../../support/lab_svq.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { inVm, vdpaNode, vmTest, type VmTestOptions } from "../../support/lab_vm.ts";
import { Process } from "../../support/process.ts";
import { waitUntil } from "../../support/wait.ts";

const { pair } = labMachines(import.meta.url);

const PATIENCE_MS = 400_000;
const MAC = "02:00:00:00:00:01";

function ipxe(relay: string, name: string, ...args: string[]): Process {
  return new Process("qemu-system-x86_64", {
    name: `nested QEMU ${name}`,
    args: [
      ...["-accel", "tcg", "-M", "pc,graphics=off,memory-backend=m,hpet=off", "-m", "64", "-nodefaults", "-display", "none"],
      ...["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-serial", "stdio", "-boot", "order=n,reboot-timeout=500"],
      ...["-chardev", `socket,id=c,path=${relay}`, "-netdev", "vhost-user,id=n,chardev=c"],
      ...["-device", `virtio-net-pci,netdev=n,mac=${MAC}`, "-qmp", `unix:/tmp/${name}.qmp,server=on,wait=off`],
      ...args,
    ],
  });
}

/** Frames that vdpa_sim_net counts of one of its queues (0: receive, 1: transmit); 0 while no driver has it. */
async function vstats(name: string, queue: number): Promise<number> {
  const { code, stdout, stderr } = await new Deno.Command("vdpa", { args: ["-j", "dev", "vstats", "show", name, "qidx", `${queue}`] })
    .output();
  if (/feature negotiation not complete/.test(new TextDecoder().decode(stderr))) return 0;
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  const text = new TextDecoder().decode(stdout);
  const found = new RegExp(`"${queue === 0 ? "rx" : "tx"} packets": ?(\\d+)`).exec(text);
  assert.ok(found !== null, text);
  return Number(found[1]);
}

/** Chains that a relay has carried in one of its queues; only rings of the relay's own are counted. */
async function chains(relay: string, queue: number): Promise<number> {
  const { queues } = await svqJson<{ queues: { index: number; chains: number }[] }>("relay", "status", relay);
  return queues.find(({ index }) => index === queue)?.chains ?? 0;
}

async function migrate(from: string, to: string): Promise<void> {
  const exists = (name: string) => () => Array.from(Deno.readDirSync("/tmp")).some((entry) => entry.name === `${name}.qmp`);
  for (const name of [from, to]) await waitUntil("the monitor", exists(name), PATIENCE_MS);
  const words = ["--source", `/tmp/${from}.qmp`, "--destination", `/tmp/${to}.qmp`, "--source-relay", from, "--destination-relay", to];
  const { ended, texts } = startSvq("migrate", "vm", ...words, "--uri", `unix:/tmp/${from}.migration`, "-j");
  assert.equal(await ended, 0, texts.stderr + texts.stdout);
  const document = JSON.parse(texts.stdout);
  assert.equal(document.outcome, "completed");
  assert.ok(document.positions.every(({ agree }: { agree: boolean }) => agree), JSON.stringify(document.positions));
}

vmTest("the frames of an iPXE guest go through vdpa_sim_net, and through the second one after svq migrate vm", pair, async () => {
  await using from = await labRelay(vdpaNode("net0"), "net-from");
  await using to = await labRelay(vdpaNode("net1"), "net-to");
  await using source = ipxe(from.path, "net-from");
  const sent = () => vstats("net0", 1);
  await waitUntil("frames to leave", async () => await sent() >= 2, PATIENCE_MS).catch((error) =>
    Promise.reject(new Error(`${error.message}\n${source.stdout.text}\n${from.log()}`))
  );
  assert.ok(await vstats("net0", 0) >= 1, "what is sent to everybody comes back from this device");
  assert.equal(await vstats("net1", 1), 0);
  await using _destination = ipxe(to.path, "net-to", "-incoming", "defer");
  await migrate("net-from", "net-to");
  const before = await sent();
  await waitUntil("frames to leave through the second device", async () => await vstats("net1", 1) >= 2, PATIENCE_MS);
  assert.equal(await sent(), before, "and none through the first one any more");
});

/** A guest in an emulator in an emulator, whose memory is pinned page by page behind an emulated IOMMU: minutes. */
function soakVmTest(name: string, options: VmTestOptions, body: () => Promise<void>): void {
  if (inVm || Deno.env.get("SVQ_SOAK") === "1") vmTest(name, options, body);
  else Deno.test({ name: `${name} (left out, run by the soak only: it takes minutes)`, ignore: true, fn: () => {} });
}

const behindIommu: VmTestOptions = {
  file: import.meta.url,
  modules: ["vhost_vdpa"],
  setup: ["lab-vp 06 vpnet", "lab-vp 08 vpnet2"],
  vp: { net: true, secondNet: true },
  timeoutMs: 1_800_000,
};

soakVmTest(
  "an iPXE guest gets an address through vp_vdpa, and goes on through a second one after svq migrate vm",
  behindIommu,
  async () => {
    // The driver pins the guest's memory, more than the 8 MiB that the kernel allows at first.
    await new Deno.Command("prlimit", { args: ["--pid", String(Deno.pid), "--memlock=unlimited:unlimited"] }).output();
    await using from = await labRelay(vdpaNode("vpnet"), "vp-from");
    await using to = await labRelay(vdpaNode("vpnet2"), "vp-to");
    await using source = ipxe(from.path, "vp-from");
    await waitUntil("a lease", () => /10\.0\.2\.15/.test(source.stdout.text), PATIENCE_MS).catch((error) =>
      Promise.reject(new Error(`${error.message}\n${source.stdout.text}\n${from.log()}`))
    );
    assert.ok(await chains("vp-from", 1) >= 2 && await chains("vp-from", 0) >= 2, "DISCOVER, OFFER, REQUEST, ACK");
    await using _destination = ipxe(to.path, "vp-to", "-incoming", "defer");
    await migrate("vp-from", "vp-to").catch((error) => Promise.reject(new Error(`${error.message}\n${from.log()}\n${to.log()}`)));
    await waitUntil("frames to leave through the second device", async () => await chains("vp-to", 1) >= 1, PATIENCE_MS);
  },
);
