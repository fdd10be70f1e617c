/**
 * svq with one failing call: see fault_hook.ts. At the end it writes to the file `SVQ_TEST_REPORT` what was called, whether the call
 * has failed, and what is open still.
 *
 * @module
 */
import { collected } from "./leak_net.ts";
import { calls, failed } from "./fault_hook.ts";
import { runCli } from "../../src/cli/app.ts";
import { waitUntil } from "./wait.ts";
import { processSink } from "../../src/cli/output.ts";

/** What one run has left. */
export interface FaultReport {
  calls: Record<string, number>;
  failed: boolean;
  /** Descriptors that were not there before the command: what each is. */
  left: string[];
  /** Mappings of memfds. */
  maps: number;
  /** Descriptors that only the collector closed. */
  collected: string[];
}

function descriptors(): Map<string, string> {
  const found = new Map<string, string>();
  for (const { name } of Deno.readDirSync("/proc/self/fd")) {
    try {
      found.set(name, Deno.readLinkSync(`/proc/self/fd/${name}`));
    } catch {
      // The one that reads the list.
    }
  }
  return found;
}

function threads(): string[] {
  return [...Deno.readDirSync("/proc/self/task")].map(({ name }) => {
    try {
      return Deno.readTextFileSync(`/proc/self/task/${name}/comm`).trim();
    } catch {
      // It has ended meanwhile.
      return "";
    }
  });
}

if (import.meta.main) {
  const before = descriptors();
  const code = await runCli(Deno.args, {
    stdout: processSink(Deno.stdout),
    stderr: processSink(Deno.stderr),
    env: (name) => Deno.env.get(name),
  });
  // A Worker's thread ends some time after it was told to, and its event loop's descriptors with it.
  await waitUntil("the Workers' ends", () => !threads().some((name) => name.startsWith("worker-"))).catch(() => {});
  const report: FaultReport = {
    calls,
    failed,
    left: [...descriptors()].filter(([fd]) => !before.has(fd)).map(([, what]) => what.replaceAll(/\d+/g, "#")),
    maps: Deno.readTextFileSync("/proc/self/maps").split("\n").filter((line) => line.includes("/memfd:")).length,
    collected,
  };
  const path = Deno.env.get("SVQ_TEST_REPORT");
  if (path !== undefined) Deno.writeTextFileSync(path, JSON.stringify(report));
  Deno.exit(code);
}
