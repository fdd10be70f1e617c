/**
 * The row of the interoperability matrix with a QEMU that libvirt started: a domain with a disk and an interface, and two daemons.
 *
 * @module
 */
import { domainXml, emulator, Libvirt, libvirtMissing, type Serial } from "../tests/support/libvirt.ts";
import { RelayProcess } from "../tests/support/relay_process.ts";
import type { TempDir } from "../tests/support/temp.ts";
import { makeImage, startTestpmd, storageDaemon, verifyImage } from "../tests/support/vm.ts";

/** One host. */
interface Host {
  libvirt: Libvirt;
  disk: RelayProcess;
  net: RelayProcess;
}

/** Changes the modes of a relay one after the other; what it says of that. */
type SwitchModes = (relay: RelayProcess, work: () => Promise<unknown>) => Promise<string>;

/** What a task does with the domain: what there is to say, and the serial line of where the domain is then. */
type Work = (a: Host, second: () => Promise<Host>, serial: Serial) => Promise<[string, Serial]>;

async function start(folder: TempDir, stack: AsyncDisposableStack, name: string, image: string): Promise<Host> {
  const [disk, net] = [folder.join(`${name}.disk`), folder.join(`${name}.net`)];
  stack.use(await storageDaemon({ version: "10", image, socket: disk }));
  await Deno.mkdir(folder.join(`pmd-${name}`));
  stack.use(await startTestpmd({ folder: folder.join(`pmd-${name}`), socket: net }));
  const relay = async (what: string, device: string) =>
    stack.use(await RelayProcess.start({ folder: folder.path, name: `${what}-${name}`, device: `unix:${device}` }));
  const relays = { disk: await relay("disk", disk), net: await relay("net", net) };
  const libvirt = stack.use(await Libvirt.start(`svq-${name}`, folder.path, { disk: relays.disk.front, net: relays.net.front }));
  return { libvirt, ...relays };
}

/** Runs `work` with a domain at work on its disk, and checks the disk. */
async function withDomain(folder: TempDir, work: Work): Promise<string> {
  const missing = await libvirtMissing();
  if (missing !== undefined) throw new Error(`needs ${missing}`);
  await using stack = new AsyncDisposableStack();
  const image = await makeImage(folder.join("disk.img"));
  const a = await start(folder, stack, "a", image);
  const xml = folder.join("domain.xml");
  await Deno.writeTextFile(xml, await domainXml("moved", await emulator(folder.path, "10"), "report=200"));
  await a.libvirt.virsh(["create", xml]);
  const first = stack.use(await a.libvirt.serial());
  await first.log.wait(/SVQ READY .*errors=0/, { timeoutMs: 240_000 });
  const [figures, serial] = await work(a, () => start(folder, stack, "b", image), first);
  if (serial !== first) stack.use(serial);
  await serial.send("stop\n");
  const [line] = await serial.log.wait(/^SVQ DONE .*$/, { timeoutMs: 120_000 });
  if (!line.startsWith("SVQ DONE ok ")) throw new Error(line);
  if ((await verifyImage(image)).digest !== /digest=(\w+)/.exec(line)![1]) throw new Error("The image does not hold what the guest wrote");
  return `${figures}${/\bops=(\d+)/.exec(line)![1]} checked requests`;
}

const beats = (serial: Serial) => serial.log.wait(/^SVQ ops=/, { since: serial.log.lines.length, timeoutMs: 60_000 });

/** What is run for each task. */
export const libvirtTasks = (
  switchModes: SwitchModes,
): Record<"I/O" | "switch under load" | "migrate", (folder: TempDir) => Promise<string>> => ({
  "I/O": (folder) =>
    withDomain(folder, async (_a, _second, serial) => {
      await beats(serial);
      return ["", serial];
    }),
  "switch under load": (folder) =>
    withDomain(folder, async (a, _second, serial) => {
      const disk = await switchModes(a.disk, () => beats(serial));
      await switchModes(a.net, () => beats(serial));
      return [`both devices; disk: ${disk}; `, serial];
    }),
  migrate: (folder) =>
    withDomain(folder, async (a, second) => {
      const b = await second();
      const begun = performance.now();
      await a.libvirt.virsh(["migrate", "--live", "moved", b.libvirt.uri, "--migrateuri", "tcp://127.0.0.1:49200"], 240_000);
      const ms = Math.round(performance.now() - begun);
      const serial = await b.libvirt.serial();
      await beats(serial);
      return [`virsh migrate --live in ${ms} ms; `, serial];
    }),
});
