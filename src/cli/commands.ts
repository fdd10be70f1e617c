/**
 * All commands: name, one line for `svq --help`, and how to load the file. The import specifiers are literal so that
 * `deno compile` and bundlers find the files. The line must equal the `brief` of the command itself (a test compares).
 *
 * @module
 */
import type { Target } from "./model.ts";

/** A command that is loaded when it is needed. */
export interface LazyCommand {
  /** One line. */
  brief: string;
  /** Not shown in help, man pages and completions. */
  hidden?: boolean;
  /** Loads the file. */
  load: () => Promise<{ command: Target }>;
}

/** In the order of `svq --help`: what is done with devices first (probe, iova, relay, vring, migrate, …), then what is around it. */
export const COMMANDS: Readonly<Record<string, LazyCommand>> = {
  probe: { brief: "List vhost and vDPA devices, and say what each can do", load: () => import("./commands/probe.ts") },
  iova: { brief: "Plan, show and change where memory lies in a device's address space", load: () => import("./commands/iova.ts") },
  relay: { brief: "Run and steer relays between a VMM and a device", load: () => import("./commands/relay.ts") },
  migrate: { brief: "Migrate a guest to another process or host", load: () => import("./commands/migrate.ts") },
  demo: { brief: "Show a live migration on embedded parts: needs no root, no VMM, no device", load: () => import("./commands/demo.ts") },
  vring: { brief: "Show and check the rings of a relay", load: () => import("./commands/vring.ts") },
  trace: { brief: "Show what a VMM, a relay and a device say to each other", load: () => import("./commands/trace.ts") },
  monitor: { brief: "Watch what relays do, per second", load: () => import("./commands/monitor.ts") },
  doctor: { brief: "Check whether this host is ready, and say what to do", load: () => import("./commands/doctor.ts") },
  schema: { brief: "Print the JSON schema of a document", load: () => import("./commands/schema.ts") },
  completions: { brief: "Print the completion script of a shell", load: () => import("./commands/completions.ts") },
  man: { brief: "Print a manual page", load: () => import("./commands/man.ts") },
  drive: { brief: "Run a checked workload on a device: a guest without a guest", load: () => import("./commands/drive.ts") },
  bench: { brief: "Measure what relaying and migrating cost on this machine", load: () => import("./commands/bench.ts") },
  device: { brief: "Run an embedded device", load: () => import("./commands/device.ts") },
  version: { brief: "Print the version", load: () => import("./commands/version.ts") },
  __complete: { brief: "Propose words for a command line", hidden: true, load: () => import("./commands/complete.ts") },
};
