/**
 * The interoperability matrix: front-ends and devices with a relay between them, doing I/O, switching modes under load, and
 * migrating. Runs real programs and writes docs/interop.md.
 *
 *     deno run -A scripts/interop.ts                     all pairs
 *     deno run -A scripts/interop.ts [--write] WORD...   only pairs whose name contains all words (`a,b`: one of them); writes only
 *     with --write
 *
 * @module
 */
import { qemuProgram, type QemuVersion } from "./lab/host.ts";
import { KERNEL_PAIRS } from "./_interop_kernel.ts";
import { libvirtTasks } from "./_interop_libvirt.ts";
import { MISSING_PAIRS } from "./_interop_missing.ts";
import { writeDocument } from "./_interop_document.ts";
import { echoOn, startPasst, startVirtiofsd, startVsock, vsockRests } from "../tests/support/daemons.ts";
import { MAIN } from "../tests/support/cli.ts";
import { BRIDGE_ADDRESS, NetSpace } from "../tests/support/net_space.ts";
import { Process } from "../tests/support/process.ts";
import { RelayProcess } from "../tests/support/relay_process.ts";
import { TempDir } from "../tests/support/temp.ts";
import { makeImage, migrate, startTestpmd, startVirtioUser, startVm, storageDaemon, verifyImage, type Vm } from "../tests/support/vm.ts";
import { VERSION } from "../src/version.ts";

const TASKS = ["I/O", "switch under load", "migrate"] as const;
type Task = typeof TASKS[number];

/** One front-end with one device: what is run for each task. A reason in words: it is impossible. */
export interface Pair {
  front: string;
  device: string;
  tasks: Record<Task, string | ((folder: TempDir) => Promise<string>)>;
}

const MODES = ["shadow", "passthrough", "used", "notify", "passthrough"] as const;

async function switchModes(relay: RelayProcess, work: () => Promise<unknown>): Promise<string> {
  let stall = 0;
  for (const mode of MODES) {
    const status = await relay.setMode(mode);
    for (const queue of status.queues) {
      if (queue.error !== null) throw new Error(queue.error.message);
      stall = Math.max(stall, queue.switches.longest_stall_us);
    }
    await work();
  }
  return `${MODES.length} switches, longest stall ${(stall / 1000).toFixed(0)} ms`;
}

// ---- disks under QEMU

const DISK = { run: "workload", workload: { report: 100, blocks: 1024, hold: 64 } } as const;

async function finishDisk(vm: Vm, image: string | undefined): Promise<string> {
  const result = await vm.finishWorkload();
  if (!result.ok) throw new Error(result.line);
  if (image !== undefined && (await verifyImage(image, { blocks: DISK.workload.blocks })).digest !== result.digest) {
    throw new Error("The image does not hold what the guest wrote");
  }
  return `${result.ops} checked requests`;
}

async function disk(folder: TempDir, sim: boolean, name = "d", image?: string): Promise<AsyncDisposable & { relay: RelayProcess }> {
  await using stack = new AsyncDisposableStack();
  const socket = folder.join(`${name}.device`);
  if (!sim) stack.use(await storageDaemon({ version: "10", image: image!, socket }));
  const relay = stack.use(
    await RelayProcess.start({ folder: folder.path, name, device: sim ? `sim:blk,file=${image}` : `unix:${socket}` }),
  );
  const kept = stack.move();
  return { relay, [Symbol.asyncDispose]: () => kept.disposeAsync() };
}

function diskTasks(qemu: QemuVersion, sim: boolean): Pair["tasks"] {
  const image = (folder: TempDir) => makeImage(folder.join("disk.img"));
  const guest = (folder: TempDir, relay: RelayProcess) => startVm({ ...DISK, qemu, folder: folder.path, disk: { socket: relay.front } });
  return {
    "I/O": async (folder) => {
      const file = await image(folder);
      await using side = await disk(folder, sim, "d", file);
      await using vm = await guest(folder, side.relay);
      await vm.waitReady();
      await vm.nextHeartbeat();
      return await finishDisk(vm, file);
    },
    "switch under load": async (folder) => {
      const file = await image(folder);
      await using side = await disk(folder, sim, "d", file);
      await using vm = await guest(folder, side.relay);
      await vm.waitReady();
      const figures = await switchModes(side.relay, () => vm.nextHeartbeat());
      return `${figures}; ${await finishDisk(vm, file)}`;
    },
    migrate: async (folder) => {
      const file = await image(folder);
      await using a = await disk(folder, sim, "a", file);
      await using b = await disk(folder, sim, "b", file);
      const uri = `unix:${folder.join("migrate")}`;
      await using source = await startVm({ ...DISK, qemu, folder: folder.path, name: "va", disk: { socket: a.relay.front } });
      await using target = await startVm({
        ...DISK,
        qemu,
        folder: folder.path,
        name: "vb",
        incoming: uri,
        disk: { socket: b.relay.front },
      });
      await source.waitReady();
      const { totalMs, downtimeMs } = await migrate(source, target, uri, { stopGuest: qemu === "7.2" });
      await target.nextHeartbeat();
      const how = qemu === "7.2" ? "stopped guest: under TCG it forgets guest writes by itself" : `live, downtime ${downtimeMs} ms`;
      return `${totalMs} ms, ${how}; ${await finishDisk(target, file)}`;
    },
  };
}

// ---- network cards under QEMU

const GUEST_IP = "ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0";

async function ping(vm: Vm): Promise<void> {
  await vm.shell("ping -c 3 -W 5 -A 10.77.0.1");
}

function testpmdTasks(qemu: QemuVersion): Pair["tasks"] {
  const side = async (folder: TempDir, stack: AsyncDisposableStack, name: string) => {
    const socket = folder.join(`${name}.device`);
    const runtime = folder.join(name);
    await Deno.mkdir(runtime);
    stack.use(await startTestpmd({ folder: runtime, socket }));
    return stack.use(await RelayProcess.start({ folder: folder.path, name, device: `unix:${socket}` }));
  };
  const guest = (folder: TempDir, relay: RelayProcess, name: string, incoming?: string) =>
    startVm({
      qemu,
      folder: folder.path,
      name,
      nets: [{ socket: relay.front }],
      run: "shell",
      ...(incoming === undefined ? {} : { incoming }),
    });
  return {
    "I/O": async (folder) => {
      await using stack = new AsyncDisposableStack();
      await using vm = await guest(folder, await side(folder, stack, "d"), "vm");
      await vm.shell(GUEST_IP);
      await ping(vm);
      return "pings";
    },
    "switch under load": async (folder) => {
      await using stack = new AsyncDisposableStack();
      const relay = await side(folder, stack, "d");
      await using vm = await guest(folder, relay, "vm");
      await vm.shell(GUEST_IP);
      await vm.shell("{ ping -A 10.77.0.1 >/dev/null & }");
      return await switchModes(relay, () => ping(vm));
    },
    migrate: async (folder) => {
      await using stack = new AsyncDisposableStack();
      const [a, b] = [await side(folder, stack, "a"), await side(folder, stack, "b")];
      const uri = `unix:${folder.join("migrate")}`;
      await using source = await guest(folder, a, "va");
      await using target = await guest(folder, b, "vb", uri);
      await source.shell(GUEST_IP);
      await ping(source);
      const { totalMs, downtimeMs } = await migrate(source, target, uri, { stopGuest: qemu === "7.2" });
      const since = target.serial.lines.length;
      await target.send("ping -c 3 -W 5 -A 10.77.0.1; echo PINGED\n");
      await target.waitSerial(/ 3 packets received/, { since });
      return `${totalMs} ms, ${qemu === "7.2" ? "stopped guest" : `live, downtime ${downtimeMs} ms`}; pings after it`;
    },
  };
}

const SIM_MAC = "52:54:00:00:00:01";

function simNetTasks(qemu: QemuVersion): Pair["tasks"] {
  const side = async (folder: TempDir, stack: AsyncDisposableStack, space: NetSpace, tap: string) =>
    stack.use(
      await RelayProcess.start({ folder: folder.path, name: tap, device: `sim:net,tap=${tap},mac=${SIM_MAC}`, within: space.enter }),
    );
  const guest = (folder: TempDir, relay: RelayProcess, name: string, incoming?: string) =>
    startVm({
      ...{ qemu, folder: folder.path, name, nets: [{ socket: relay.front, mac: SIM_MAC }], run: "shell" },
      ...(incoming === undefined ? {} : { incoming }),
    });
  const pinged = (vm: Vm) => vm.shell(`ping -c 5 -w 60 ${BRIDGE_ADDRESS}`, 120_000);
  return {
    "I/O": async (folder) => {
      await using stack = new AsyncDisposableStack();
      const space = stack.use(await NetSpace.start(1));
      await using vm = await guest(folder, await side(folder, stack, space, "tap0"), "vm");
      await vm.shell(GUEST_IP);
      await pinged(vm);
      return "pings over a tap";
    },
    "switch under load": async (folder) => {
      await using stack = new AsyncDisposableStack();
      const space = stack.use(await NetSpace.start(1));
      const relay = await side(folder, stack, space, "tap0");
      await using vm = await guest(folder, relay, "vm");
      await vm.shell(GUEST_IP);
      await vm.shell(`{ ping -A ${BRIDGE_ADDRESS} >/dev/null & }`);
      return await switchModes(relay, () => pinged(vm));
    },
    migrate: async (folder) => {
      await using stack = new AsyncDisposableStack();
      const space = stack.use(await NetSpace.start(2));
      const [a, b] = [await side(folder, stack, space, "tap0"), await side(folder, stack, space, "tap1")];
      const uri = `unix:${folder.join("migrate")}`;
      await using source = await guest(folder, a, "va");
      await using target = await guest(folder, b, "vb", uri);
      await source.shell(GUEST_IP);
      await pinged(source);
      const { totalMs, downtimeMs } = await migrate(source, target, uri, { stopGuest: qemu === "7.2" });
      const since = target.serial.lines.length;
      await target.send(`ping -c 5 -w 60 ${BRIDGE_ADDRESS}\n`);
      await target.waitSerial(/ 5 packets received/, { since, timeoutMs: 120_000 });
      return `${totalMs} ms, ${qemu === "7.2" ? "stopped guest" : `live, downtime ${downtimeMs} ms`}; pings after it`;
    },
  };
}

const PASST_ECHO =
  `deno eval 'for await (const c of Deno.listen({hostname: "127.0.0.1", port: 7777})) c.readable.pipeTo(c.writable).catch(() => {})'`;

async function withPasst(folder: TempDir, body: (vm: Vm, relay: RelayProcess, talk: () => Promise<unknown>) => Promise<string>) {
  const passt = await startPasst(folder.join("passt.sock"), PASST_ECHO);
  await using _process = passt.process;
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${folder.join("passt.sock")}` });
  await using vm = await startVm({ qemu: "10", folder: folder.path, nets: [{ socket: relay.front }], run: "shell" });
  await vm.shell(`ip link set eth0 up && ip addr add ${passt.address}/24 dev eth0 && ip route add default via ${passt.gateway}`);
  await vm.shell("dd if=/dev/urandom of=/tmp/sent bs=1024 count=64 2>/dev/null");
  return await body(
    vm,
    relay,
    () => vm.shell(`(cat /tmp/sent; sleep 2) | nc -w 10 ${passt.gateway} 7777 >/tmp/came; cmp /tmp/sent /tmp/came`),
  );
}

const PASST: Pair["tasks"] = {
  "I/O": (folder) =>
    withPasst(folder, async (_vm, _relay, talk) => {
      await talk();
      return "64 KiB echoed over TCP";
    }),
  "switch under load": (folder) => withPasst(folder, (_vm, relay, talk) => switchModes(relay, talk)),
  migrate: "not run by this script",
};

// ---- file systems

const fsArgs = (socket: string) => ["-chardev", `socket,id=fs0,path=${socket}`, "-device", "vhost-user-fs-pci,chardev=fs0,tag=share"];

function virtiofsTasks(qemu: QemuVersion): Pair["tasks"] {
  const side = async (folder: TempDir, stack: AsyncDisposableStack, name: string) => {
    await Deno.mkdir(folder.join("share"), { recursive: true });
    stack.use(await startVirtiofsd(folder.join(`${name}.device`), folder.join("share")));
    return stack.use(await RelayProcess.start({ folder: folder.path, name, device: `unix:${folder.join(`${name}.device`)}` }));
  };
  const guest = (folder: TempDir, relay: RelayProcess, name: string, incoming?: string) =>
    startVm({
      ...{ qemu, folder: folder.path, name, run: "shell", modules: ["fs"], extraArgs: fsArgs(relay.front) },
      ...(incoming === undefined ? {} : { incoming }),
    });
  const write = (vm: Vm) =>
    vm.shell("dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null; cp /tmp/data /mnt/data; sync; cmp /tmp/data /mnt/data");
  return {
    "I/O": async (folder) => {
      await using stack = new AsyncDisposableStack();
      await using vm = await guest(folder, await side(folder, stack, "d"), "vm");
      await vm.shell("mount -t virtiofs share /mnt");
      await write(vm);
      return "mounts, writes, reads";
    },
    "switch under load": async (folder) => {
      await using stack = new AsyncDisposableStack();
      const relay = await side(folder, stack, "d");
      await using vm = await guest(folder, relay, "vm");
      await vm.shell("mount -t virtiofs share /mnt");
      return await switchModes(relay, () => write(vm));
    },
    migrate: qemu === "7.2" ? "QEMU 7.2 cannot migrate vhost-user-fs: it knows no device state" : async (folder) => {
      await using stack = new AsyncDisposableStack();
      const [a, b] = [await side(folder, stack, "a"), await side(folder, stack, "b")];
      const uri = `unix:${folder.join("migrate")}`;
      await using source = await guest(folder, a, "va");
      await using target = await guest(folder, b, "vb", uri);
      await source.shell("mount -t virtiofs share /mnt; exec 5>/mnt/log; echo before >&5");
      const { totalMs, downtimeMs } = await migrate(source, target, uri);
      const since = target.serial.lines.length;
      await target.send("echo after >&5; echo WRITTEN\n");
      await target.waitSerial(/^WRITTEN$/, { since });
      const log = await Deno.readTextFile(`${folder.join("share")}/log`);
      if (log !== "before\nafter\n") throw new Error(`The open file holds ${JSON.stringify(log)}`);
      return `${totalMs} ms, live, downtime ${downtimeMs} ms; an open file goes on`;
    },
  };
}

// ---- front-ends without a VMM

async function drive(relay: RelayProcess, words: string[]): Promise<string> {
  await using process = new Process(Deno.execPath(), {
    name: "svq drive",
    args: ["run", "-A", "--quiet", MAIN, "drive", `unix:${relay.front}`, "-j", ...words],
  });
  await process.expectExit(0);
  const { requests } = JSON.parse(process.stdout.text);
  return `${requests.completed} checked requests`;
}

function embeddedTasks(device: "qsd" | "sim:blk" | "sim:loopback"): Pair["tasks"] {
  const open = async (folder: TempDir, stack: AsyncDisposableStack) => {
    if (device === "sim:loopback") return stack.use(await RelayProcess.start({ folder: folder.path, device }));
    return stack.use(await disk(folder, device === "sim:blk", "d", await makeImage(folder.join("disk.img")))).relay;
  };
  return {
    "I/O": async (folder) => {
      await using stack = new AsyncDisposableStack();
      return await drive(await open(folder, stack), ["--requests", "5000"]);
    },
    "switch under load": async (folder) => {
      await using stack = new AsyncDisposableStack();
      const relay = await open(folder, stack);
      const driven = drive(relay, ["--duration", "6s"]);
      await relay.waitStatus("runs", (status) => status.state === "running");
      const figures = await switchModes(relay, () => new Promise((resolve) => setTimeout(resolve, 500)));
      return `${figures}; ${await driven}`;
    },
    migrate: device === "sim:blk" ? "not run by this script: `svq migrate run` has tests of its own" : "not run by this script",
  };
}

const VIRTIO_USER: Pair["tasks"] = {
  "I/O": (folder) => virtioUser(folder, (_relay, packets) => packets()),
  "switch under load": (folder) =>
    virtioUser(folder, async (relay, packets) => {
      const figures = await switchModes(relay, packets);
      return `${figures}; ${await packets()}`;
    }),
  migrate: "virtio-user is a driver in an application: nothing that migrates",
};

const VIRTIO_USER_SIM: Pair["tasks"] = {
  "I/O": (folder) => virtioUser(folder, (_relay, packets) => packets(), "sim:net,cable=loop"),
  "switch under load": (folder) =>
    virtioUser(folder, async (relay, packets) => {
      const figures = await switchModes(relay, packets);
      return `${figures}; ${await packets()}`;
    }, "sim:net,cable=loop"),
  migrate: "virtio-user is a driver in an application: nothing that migrates",
};

async function virtioUser(
  folder: TempDir,
  body: (relay: RelayProcess, packets: () => Promise<string>) => Promise<string>,
  sim?: string,
): Promise<string> {
  const [back, front] = [folder.join("back"), folder.join("front")];
  await Deno.mkdir(back);
  await Deno.mkdir(front);
  const socket = folder.join("net.device");
  await using stack = new AsyncDisposableStack();
  if (sim === undefined) stack.use(await startTestpmd({ folder: back, socket, mode: "rxonly" }));
  const relay = stack.use(await RelayProcess.start({ folder: folder.path, device: sim ?? `unix:${socket}` }));
  await using _driver = await startVirtioUser({ folder: front, socket: relay.front });
  // The used index of the card's transmit ring goes round and round.
  return await body(relay, async () => {
    let packets = 0;
    let last: number | undefined;
    const deadline = performance.now() + 60_000;
    while (packets < 2000) {
      if (performance.now() > deadline) throw new Error(`Within a minute ${packets} of 2000 packets were taken`);
      const { used_idx } = (await relay.status()).queues[1]!;
      packets += last === undefined ? 0 : (used_idx - last) & 0xffff;
      last = used_idx;
    }
    return "packets sent and taken";
  });
}

// ---- vsock

async function withVsock(folder: TempDir, body: (relay: RelayProcess, talk: () => Promise<void>) => Promise<string>): Promise<string> {
  const [socket, uds] = [folder.join("vsock.device"), folder.join("vsock")];
  using _echo = echoOn(`${uds}_7777`);
  await using daemon = await startVsock(socket, uds, 7);
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
  await using vm = await startVm({
    ...{ qemu: "10", folder: folder.path, run: "shell", modules: ["vsock"] },
    extraArgs: ["-chardev", `socket,id=vsock0,path=${relay.front}`, "-device", "vhost-user-vsock-pci,chardev=vsock0"],
  });
  await vm.shell("mkfifo /tmp/ctl; exec 3<>/tmp/ctl; { vsock_talk 7777 </tmp/ctl & }");
  return await body(relay, async () => {
    const since = vm.serial.lines.length;
    await vm.send("echo >&3\n");
    const [line] = await vm.waitSerial(/^VSOCK .*$/, { since });
    if (!line.startsWith("VSOCK ok")) throw new Error(line);
    await vsockRests(daemon);
  });
}

const VSOCK: Pair["tasks"] = {
  "I/O": (folder) =>
    withVsock(folder, async (_relay, talk) => {
      await talk();
      return "256 KiB echoed by the host";
    }),
  "switch under load": (folder) =>
    withVsock(folder, async (relay, talk) => {
      await talk();
      return `${await switchModes(relay, talk)}; one connection, 256 KiB echoed after each switch, none during it (see below)`;
    }),
  migrate: "impossible: the device has no DEVICE_STATE, and QEMU does not migrate it",
};

/** All rows, in the document's order. */
export const PAIRS: Pair[] = [
  ...(["7.2", "10"] as const).flatMap((qemu): Pair[] => [
    { front: `QEMU ${qemu}`, device: "storage daemon", tasks: diskTasks(qemu, false) },
    { front: `QEMU ${qemu}`, device: "sim:blk", tasks: diskTasks(qemu, true) },
    { front: `QEMU ${qemu}`, device: "testpmd", tasks: testpmdTasks(qemu) },
    { front: `QEMU ${qemu}`, device: "sim:net", tasks: simNetTasks(qemu) },
    { front: `QEMU ${qemu}`, device: "virtiofsd", tasks: virtiofsTasks(qemu) },
  ]),
  { front: "QEMU 10", device: "passt", tasks: PASST },
  { front: "QEMU 10", device: "vhost-device-vsock", tasks: VSOCK },
  { front: "libvirt", device: "storage daemon, testpmd", tasks: libvirtTasks(switchModes) },
  { front: "DPDK virtio-user", device: "testpmd", tasks: VIRTIO_USER },
  { front: "DPDK virtio-user", device: "sim:net", tasks: VIRTIO_USER_SIM },
  { front: "embedded driver", device: "storage daemon", tasks: embeddedTasks("qsd") },
  { front: "embedded driver", device: "sim:blk", tasks: embeddedTasks("sim:blk") },
  { front: "embedded driver", device: "sim:loopback", tasks: embeddedTasks("sim:loopback") },
  ...KERNEL_PAIRS,
  ...MISSING_PAIRS,
];

async function run(pair: Pair, task: Task): Promise<string> {
  const work = pair.tasks[task];
  if (typeof work === "string") return `– ${work}`;
  using folder = new TempDir();
  try {
    return `works: ${await work(folder)}`;
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    return `**fails**: ${message.split("\n")[0]}`;
  }
}

async function versionOf(version: QemuVersion): Promise<string> {
  const { command, args, env } = await qemuProgram(version, "qemu-system-x86_64");
  const { stdout } = await new Deno.Command(command, { args: [...args, "--version"], env }).output();
  return /version (\S+)/.exec(new TextDecoder().decode(stdout))?.[1] ?? version;
}

const nameOf = (pair: Pair) => `${pair.front} × ${pair.device}`;

if (import.meta.main) {
  const words = Deno.args.filter((word) => word !== "--write");
  const write = words.length === 0 || words.length < Deno.args.length;
  const versions = `svq ${VERSION}, Deno ${Deno.version.deno}, QEMU ${await versionOf("7.2")} and ${await versionOf("10")}; ` +
    "DPDK, passt and virtiofsd as in Debian trixie, vhost-device-vsock as in sid, libvirt with QEMU 10";
  let failed = false;
  for (const pair of PAIRS.filter((pair) => words.every((word) => word.split(",").some((part) => nameOf(pair).includes(part))))) {
    const cells: string[] = [];
    for (const task of TASKS) {
      const begun = performance.now();
      // A cell may take minutes, and nothing is said until it is done.
      if (typeof pair.tasks[task] !== "string") console.error(`${nameOf(pair)}, ${task} ...`);
      const cell = await run(pair, task);
      console.log(`${nameOf(pair)}, ${task}: ${cell} (${((performance.now() - begun) / 1000).toFixed(0)} s)`);
      failed ||= cell.startsWith("**");
      cells.push(cell);
    }
    // Row by row: a run that is broken off keeps what it has.
    if (write) await writeDocument(PAIRS.map(nameOf), [{ front: pair.front, device: pair.device, cells }], TASKS, versions);
  }
  Deno.exit(failed ? 1 : 0);
}
