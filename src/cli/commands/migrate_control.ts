/** `svq migrate status` and `svq migrate cancel`. @module */
import { buildCommand } from "@stricli/core";
import { EXIT, SvqError } from "../../errors.ts";
import { ControlClient, ControlServer } from "../../relay/control.ts";
import { runtimeDir } from "../../relay/runtime_dir.ts";
import { describeThrottle, progressDocument } from "../../migration/document.ts";
import type { Migration } from "../../migration/source.ts";
import { PAGE_BYTES } from "../../migration/protocol.ts";
import { formatDuration, formatSize } from "../../units.ts";
import type { CliContext } from "../context.ts";
import type { Document } from "../output.ts";
import { usageError } from "../usage.ts";

// Beside the relays' sockets, with an ending of their own: they are no relays.
const ENDING = ".migration";

function socketPath(name: string): string {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(name)) {
    throw usageError(`A migration cannot be called ${JSON.stringify(name)}`, "use up to 64 letters, digits, dots, hyphens and underscores");
  }
  return `${runtimeDir()}/${name}${ENDING}`;
}

function names(): string[] {
  return [...Deno.readDirSync(runtimeDir())].filter(({ name }) => name.endsWith(ENDING)).map(({ name }) => name.slice(0, -ENDING.length))
    .sort();
}

/** Lets `svq migrate status` and `cancel` find a running migration. */
export function serveMigration(name: string, migration: Migration): ControlServer {
  return new ControlServer(socketPath(name), {
    status: () => ({ name, ...progressDocument(migration.progress) }),
    cancel: () => ({ name, cancelled: migration.cancel() }),
  });
}

function connect(name: string | undefined): { name: string; client: ControlClient } {
  const known = names();
  const chosen = name ?? known[0];
  if (chosen === undefined) throw notRunning("No migration runs");
  if (name === undefined && known.length > 1) throw usageError("Several migrations run", `name one of ${known.join(", ")}`);
  try {
    return { name: chosen, client: ControlClient.connect(chosen, socketPath(chosen)) };
  } catch (error) {
    if (error instanceof SvqError && error.code === "NO_SUCH_RELAY") throw notRunning(`No migration "${chosen}" runs`);
    throw error;
  }
}

function notRunning(message: string): SvqError {
  return new SvqError("NO_SUCH_MIGRATION", message, {
    exitCode: EXIT.noDevice,
    hint: "svq migrate run starts one; SVQ_RUNTIME_DIR says where they are looked for",
  });
}

const parameters = {
  positional: {
    kind: "tuple",
    parameters: [{
      parse: String,
      brief: "Name of the migration; may be left out where only one runs",
      placeholder: "NAME",
      optional: true,
      proposeCompletions: (partial: string) => names().filter((name) => name.startsWith(partial)),
    }],
  },
} as const;

/** Shows how far a migration is. */
export const status = buildCommand({
  docs: { brief: "Show how far a running svq migrate run is" },
  parameters,
  async func(this: CliContext, _flags: Record<never, never>, wanted?: string): Promise<void> {
    const { name, client } = connect(wanted);
    using _client = client;
    const document = await client.call("status") as Document;
    this.output.document(document, () => {
      const { phase, rounds, remaining_pages, bytes, estimated_downtime_us: estimate, throttle_percent } = document as Document & {
        rounds: unknown[];
        remaining_pages: number;
        bytes: number;
        estimated_downtime_us: number | null;
        throttle_percent?: number;
      };
      const left = formatSize(remaining_pages * PAGE_BYTES);
      const expected = estimate === null ? "" : `, stopping now would take ${formatDuration(estimate * 1000)}`;
      return `${name}: ${phase}, ${rounds.length} rounds done, ${formatSize(bytes)} sent, ${left} left${expected}${
        describeThrottle(throttle_percent ?? 0)
      }`;
    });
  },
});

/** Cancels a migration. */
export const cancel = buildCommand({
  docs: { brief: "Cancel a running svq migrate run: the guest goes on at the source" },
  parameters,
  async func(this: CliContext, _flags: Record<never, never>, wanted?: string): Promise<void> {
    const { name, client } = connect(wanted);
    using _client = client;
    const { cancelled } = await client.call("cancel") as { cancelled: boolean };
    if (!cancelled) {
      throw new SvqError("TOO_LATE", `The hand-over of "${name}" has begun: it cannot be cancelled any more`);
    }
    this.output.document(
      { schema: "svq.migrate-cancel/1", name, cancelled },
      () => `${name} is being cancelled; the guest goes on at the source`,
    );
  },
});
