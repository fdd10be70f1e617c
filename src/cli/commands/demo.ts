/** `svq demo`. @module */
import { buildCommand } from "@stricli/core";
import { EXIT, fromErrorRecord } from "../../errors.ts";
import { requestsDocument, roundDocuments } from "../../migration/document.ts";
import type { CliContext } from "../context.ts";
import { type DemoResult, type DemoStep, runDemo } from "../demo.ts";
import { ExitWith } from "../exit_with.ts";
import type { Document } from "../output.ts";
import { durationFlag, integerFlag, sizeFlag } from "../parameters.ts";
import { selfCommand } from "../self_command.ts";

interface Flags {
  readonly mem: number;
  readonly depth: number;
  readonly load: number;
}

/** Shows the main job. */
export const command = buildCommand({
  docs: {
    brief: "Show a live migration on embedded parts: needs no root, no VMM, no device",
    fullDescription:
      "A guest under load is migrated to a second process, although its disk's device can neither log what it writes nor be asked to. " +
      "Each step is printed with its time and its reason. Exit 0 when no request was lost, duplicated or corrupted and memory was identical.\n\n" +
      "Example:\n  svq demo --mem 256MiB",
  },
  parameters: {
    flags: {
      mem: sizeFlag("Size of the guest's memory", { default: "64MiB" }),
      depth: integerFlag("Requests in flight", { default: "4", min: 1, max: 1024 }),
      load: durationFlag("How long the guest works before the migration, and after it", { default: "1s" }),
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    const result = await runDemo({
      ramSize: flags.mem,
      depth: flags.depth,
      loadMs: flags.load / 1e6,
      start: startDestination,
      onStep: (step) => this.output.json ? undefined : this.output.line(stepLine(step, this.output.paint)),
      log: (level, message) => this.output.log(level, message),
      signal: this.signal,
    });
    this.output.document(toDocument(result), () => verdict(result));
    if (result.outcome === "ok") return;
    if (result.error !== null) throw fromErrorRecord(result.error);
    throw new ExitWith(result.migration.outcome === "completed" ? EXIT.failedAfterSwitchover : EXIT.checkFailed);
  },
});

function startDestination(words: string[]): Deno.ChildProcess {
  const [program, ...args] = [...selfCommand(), ...words];
  return new Deno.Command(program!, { args, stdin: "piped", stdout: "null", stderr: "inherit" }).spawn();
}

function stepLine({ atMs, step, text }: DemoStep, paint: { bold: (text: string) => string }): string {
  return `${(atMs / 1000).toFixed(2).padStart(6)} s  ${paint.bold(step.padEnd(11))}  ${text}`;
}

function verdict({ outcome }: DemoResult): string {
  switch (outcome) {
    case "ok":
      return "\nDone: the guest was migrated, and did not notice. svq migrate --help and svq relay --help do the same with real parts.";
    case "aborted":
      return "\nThe migration was given up; the guest went on at the source.";
    case "memory":
      return "\nFAILED: the destination's memory was not the source's, so the source kept the guest.";
    case "requests":
      return "\nFAILED: requests were lost, duplicated or corrupted.";
  }
}

function toDocument({ outcome, requests, migration, switch: times, timeline, error }: DemoResult): Document {
  return {
    schema: "svq.demo/1",
    outcome,
    requests: requestsDocument(requests),
    rounds: roundDocuments(migration.rounds),
    switch_us: times.total,
    switch_parts_us: { drain: times.drain, rings: times.rings },
    downtime_us: migration.downtimeUs?.total ?? 0,
    downtime_parts_us: migration.downtimeUs,
    memory_identical: migration.memoryIdentical === true,
    bytes: migration.bytes,
    sectors_compared: requests.verified,
    faults: requests.faults,
    timeline: timeline.map(({ atMs, step, text }) => ({ at_ms: atMs, step, text })),
    error,
  };
}
