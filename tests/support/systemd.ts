/**
 * A systemd of its own: process 1 of new namespaces, with our units only. The host's systemd, where there is one, does not
 * see it.
 *
 * @module
 */
import { Process } from "./process.ts";
import { TempDir } from "./temp.ts";
import { waitUntil } from "./wait.ts";

const SYSTEMD = "/lib/systemd/systemd";
/** What units depend on by default; the real ones would set the host up again. */
const TARGETS = ["sysinit", "basic", "sockets", "shutdown", "local-fs", "multi-user", "mini"];

/** Where cgroup2 is mounted. */
function cgroup2(): string | undefined {
  for (const line of Deno.readTextFileSync("/proc/self/mountinfo").split("\n")) {
    if (/ - cgroup2 /.test(line)) return line.split(" ")[4];
  }
  return undefined;
}

/** Why there can be no systemd here; undefined when there can. */
export function systemdMissing(): string | undefined {
  if (Deno.uid() !== 0) return "root";
  try {
    Deno.statSync(SYSTEMD);
  } catch {
    return "systemd";
  }
  return cgroup2() === undefined ? "cgroup2" : undefined;
}

// Everything that is mounted or written here is in private mounts.
const BOOT = `
set -e
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
cp -a "$FOLDER" /run/place
mount -t tmpfs -o mode=1777 tmpfs /tmp
cp -a /etc /run/etc && mount --bind /run/etc /etc
mount -t tmpfs -o mode=755 tmpfs /usr/local/bin
umount -l /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mv /run/place/svq /usr/local/bin/svq
mkdir -p /run/units /etc/svq/relay
cp -a /run/place/units/. /run/units/
cp -a /run/place/env/. /etc/svq/relay/
export container=svq-test SYSTEMD_UNIT_PATH=/run/units
exec ${SYSTEMD} --system --unit=mini.target --log-target=console --log-level=info
`;

/** A running systemd; disposing it ends everything in it. */
export class TestSystemd implements AsyncDisposable {
  private constructor(readonly process: Process, readonly pid: number, readonly group: string, readonly place: TempDir) {}

  /** Starts one. @param svq the executable @param units files of units by name @param env settings of relays by name */
  static async start(svq: string, units: Record<string, string>, env: Record<string, string>): Promise<TestSystemd> {
    const place = new TempDir();
    await Deno.copyFile(svq, place.join("svq"));
    for (const [folder, files] of [["units", units], ["env", env]] as const) {
      await Deno.mkdir(place.join(folder));
      for (const [name, text] of Object.entries(files)) {
        const path = place.join(`${folder}/${name}`);
        await Deno.mkdir(path.replace(/[^/]*$/, ""), { recursive: true });
        await Deno.writeTextFile(path, text);
      }
    }
    for (const name of TARGETS) await Deno.writeTextFile(place.join(`units/${name}.target`), `[Unit]\nDefaultDependencies=no\n`);
    const group = `${cgroup2()}/svq-test-${crypto.randomUUID().slice(0, 8)}`;
    await Deno.mkdir(group);
    const flags = ["--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--propagation=private", "--kill-child=SIGKILL"];
    const process = new Process("sh", {
      name: "systemd",
      env: { FOLDER: place.path },
      args: ["-c", `echo $$ >"$1/cgroup.procs" && shift && exec "$@"`, "sh", group, "unshare", ...flags, "sh", "-c", BOOT],
    });
    try {
      const pid = await waitUntil("systemd's process", () => {
        const children = Deno.readTextFileSync(`/proc/${process.pid}/task/${process.pid}/children`).trim();
        if (process.ended) throw new Error(`systemd did not start: ${process.stderr.tail()}`);
        return children === "" ? undefined : Number(children.split(" ")[0]);
      });
      const systemd = new TestSystemd(process, pid, group, place);
      await waitUntil("systemd's answer", async () => {
        if (process.ended) throw new Error("systemd did not start");
        return (await systemd.run("systemctl", "is-active", "mini.target")).code === 0;
      }, 20_000);
      return systemd;
    } catch (error) {
      await end(process, group);
      place[Symbol.dispose]();
      throw new Error(`${error instanceof Error ? error.message : error}\n${process.stdout.tail()}\n${process.stderr.tail()}`);
    }
  }

  /** Runs a command inside. */
  async run(...words: string[]): Promise<{ code: number; output: string }> {
    const { code, stdout, stderr } = await new Deno.Command("nsenter", {
      args: ["-t", String(this.pid), "-m", "-p", "-u", "-i", "-C", "--", ...words],
      env: { SYSTEMD_UNIT_PATH: "/run/units", SYSTEMD_PAGER: "", NO_COLOR: "1" },
      stdin: "null",
    }).output();
    const decoder = new TextDecoder();
    return { code, output: (decoder.decode(stdout) + decoder.decode(stderr)).trim() };
  }

  /** Runs a command inside, which must end with 0. */
  async good(...words: string[]): Promise<string> {
    const { code, output } = await this.run(...words);
    if (code !== 0) {
      throw new Error(`${words.join(" ")} ended with ${code}: ${output}\n${this.process.stdout.tail()}\n${this.process.stderr.tail()}`);
    }
    return output;
  }

  /** A property of a unit. */
  async property(unit: string, name: string): Promise<string> {
    return await this.good("systemctl", "show", "--value", "-p", name, unit);
  }

  /** Kills all of it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await end(this.process, this.group);
    this.place[Symbol.dispose]();
  }
}

/** Kills systemd, and with it every process in its namespace; then removes its control groups, innermost first. */
async function end(process: Process, group: string): Promise<void> {
  process.kill();
  await process[Symbol.asyncDispose]();
  const remove = (path: string): void => {
    for (const entry of Deno.readDirSync(path)) if (entry.isDirectory) remove(`${path}/${entry.name}`);
    Deno.removeSync(path);
  };
  await waitUntil("the end of all processes", () => {
    try {
      remove(group);
      return true;
    } catch {
      // A process is still ending.
      return false;
    }
  });
}
