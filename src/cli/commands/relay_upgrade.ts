/** `svq relay upgrade`. @module */
import { buildCommand } from "@stricli/core";
import { ControlClient } from "../../relay/control.ts";
import { controlPath } from "../../relay/runtime_dir.ts";
import type { UpgradeReport } from "../../relay/upgrade.ts";
import type { CliContext } from "../context.ts";
import { durationFlag, pathFlag, relayArgument } from "../parameters.ts";
import { selfCommand } from "../self_command.ts";

interface UpgradeFlags {
  readonly program?: string;
  readonly drainTimeout: number;
}

/** `svq relay upgrade NAME`. */
export const upgrade = buildCommand({
  docs: {
    brief: "Hand a running relay over to this version of the program, under its guest",
    fullDescription:
      "The relay starts this program (or --program), stops its rings, and hands its sockets, memory and ring positions over; the VMM " +
      "stays connected. Where a step fails the relay goes on as it was, and this command exits with 7.\n\n" +
      "Example:\n  /usr/local/bin/svq relay upgrade vm1-disk",
  },
  parameters: {
    flags: {
      program: pathFlag("The version to upgrade to, as the relay sees it (default: this program)", { optional: true }),
      drainTimeout: durationFlag("How long the device may take to give back what it has", { default: "10s" }),
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
  },
  async func(this: CliContext, flags: UpgradeFlags, name: string): Promise<void> {
    const program = flags.program === undefined ? selfCommand() : [await Deno.realPath(flags.program)];
    using client = ControlClient.connect(name, controlPath(name));
    const report = await client.call("upgrade", { program, drain_timeout_ms: flags.drainTimeout / 1e6 }) as UpgradeReport;
    this.output.document({ ...report }, () => {
      const versions = report.version_before === report.version
        ? `version ${report.version}`
        : `${report.version_before} -> ${report.version}`;
      return `${name} goes on as process ${report.pid} (${versions}); its rings stood still for ${report.stall_ms} ms`;
    });
  },
});
