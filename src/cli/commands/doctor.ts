/** `svq doctor`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { EXIT } from "../../errors.ts";
import { boundsChecked, createMemfd, effectiveUid, memlockLimit } from "../../ffi/mod.ts";
import { runtimeDirPath } from "../../relay/runtime_dir.ts";
import type { CliContext } from "../context.ts";
import { askVm, pinnedChecks, pinningRelays } from "../doctor_pinned.ts";
import { type Check, diagnose, type DoctorHost, type Purpose, PURPOSES } from "../doctor.ts";
import { ExitWith } from "../exit_with.ts";

interface Flags {
  readonly for: readonly Purpose[];
  readonly qmp?: readonly string[];
}

/** Checks the host. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Check whether this host is ready, and say what to do",
    fullDescription: "Check whether this host is ready, and say what to do about each thing that is missing. " +
      "Exit 6 when something required for the purpose is missing.\n\n" +
      "A device that pins guest memory breaks when the VM has a balloon or virtio-mem: running relays are asked whether their device does, and each QEMU that --qmp names for such devices.\n\n" +
      "Purposes: user (vhost-user and embedded devices, the default), kernel (vhost-vdpa, vhost-net), vduse (making vDPA devices).\n\n" +
      "Example:\n  svq doctor --for kernel,vduse",
  },
  parameters: {
    flags: {
      for: {
        kind: "enum",
        values: PURPOSES,
        brief: "What the host is to be used for",
        placeholder: "PURPOSE",
        variadic: ",",
        default: ["user"],
      },
      qmp: {
        kind: "parsed",
        parse: String,
        brief: "Monitor of a QEMU, to be asked for devices that give guest memory back (balloon, virtio-mem)",
        placeholder: "SOCKET",
        variadic: true,
        optional: true,
      },
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    const purposes = [...new Set(flags.for)];
    const checks = diagnose(thisHost(this.host.env), purposes);
    const vms = await Promise.all((flags.qmp ?? []).map(askVm));
    checks.push(...pinnedChecks(await pinningRelays(), vms));
    const ready = checks.every((check) => check.status === "ok" || !check.required);
    this.output.document({ schema: "svq.doctor/1", purposes, ready, checks }, () => {
      const width = Math.max(...checks.map((check) => check.name.length));
      for (const check of checks) this.output.line(describe(check, width, this));
      this.output.line();
      this.output.line(ready ? `Ready for: ${purposes.join(", ")}` : `Not ready for: ${purposes.join(", ")}`);
    });
    if (!ready) throw new ExitWith(EXIT.checkFailed);
  },
});

function describe(check: Check, width: number, { output: { paint } }: CliContext): string {
  const label = check.status.padEnd(7);
  const status = check.status === "ok" ? paint.green(label) : check.required ? paint.red(label) : paint.yellow(label);
  const note = check.status === "ok" || check.required ? "" : " (optional)";
  const line = `${status}  ${check.name.padEnd(width)}  ${check.found}${note}`;
  return check.remedy === undefined ? line : `${line}\n${" ".repeat(9 + width)}  ${paint.cyan("->")} ${check.remedy}`;
}

function thisHost(env: (name: string) => string | undefined): DoctorHost {
  const attempt = <T>(action: () => T): T | undefined => {
    try {
      return action();
    } catch {
      return undefined;
    }
  };
  const groups = /^Groups:\s*(.*)$/m.exec(attempt(() => Deno.readTextFileSync("/proc/self/status")) ?? "")?.[1] ?? "";
  return {
    read: (path) => attempt(() => Deno.readTextFileSync(path)),
    list: (path) => attempt(() => [...Deno.readDirSync(path)].map((entry) => entry.name)) ?? [],
    stat(path) {
      const info = attempt(() => Deno.statSync(path));
      return info === undefined ? undefined : { uid: info.uid ?? 0, gid: info.gid ?? 0, mode: info.mode ?? 0 };
    },
    memlock() {
      try {
        return memlockLimit().soft;
      } catch (error) {
        return error instanceof Error ? error : new Error(String(error));
      }
    },
    boundsChecked() {
      try {
        return boundsChecked();
      } catch (error) {
        return error instanceof Error ? error : new Error(String(error));
      }
    },
    tryMemfd() {
      try {
        createMemfd("svq-doctor", 4096).close();
        return undefined;
      } catch (error) {
        return error instanceof Error ? error : new Error(String(error));
      }
    },
    permission: (name) => Deno.permissions.querySync({ name }).state,
    identity: {
      uid: attempt(effectiveUid) ?? Deno.uid() ?? -1,
      gids: [Deno.gid() ?? -1, ...groups.trim().split(/\s+/).filter((text) => text !== "").map(Number)],
    },
    deno: Deno.version.deno,
    os: Deno.build.os,
    arch: Deno.build.arch,
    cpus: navigator.hardwareConcurrency,
    runtimeDirectory: attempt(runtimeDirPath) ?? "/run/svq",
    path: env("PATH") ?? "",
  };
}
