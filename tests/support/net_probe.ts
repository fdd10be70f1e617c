/**
 * What a network does while something happens to it, seen from outside: `svq drive --ping` beside the guest.
 *
 * @module
 */
import assert from "node:assert/strict";
import { MAIN } from "./cli.ts";
import { Process } from "./process.ts";
import { assertMatchesSchema } from "./schema.ts";

/** `net` of `svq.drive/1`. */
export interface GapReport {
  sent: number;
  received: number;
  missing: number;
  reordered: number;
  duplicated: number;
  longest_gap_ms: number;
}

/** A probe stream that runs; disposing it ends it. */
export class NetProbe implements AsyncDisposable {
  private constructor(readonly process: Process) {}

  /**
   * Starts pinging.
   *
   * @param device where svq drives from
   * @param within words that go before the program's
   */
  static start(device: string, target: string, { within = [], rate = 100 }: { within?: readonly string[]; rate?: number } = {}): NetProbe {
    const [program, ...words] = [
      ...within,
      ...[Deno.execPath(), "run", "-A", "--quiet", MAIN, "drive", "-j", device, "--ping", target, "--address", "10.77.0.9"],
      ...["--workload", "net", "--rate", String(rate), "--frame-size", "200", "--duration", "10m"],
    ];
    return new NetProbe(new Process(program!, { name: "probe stream", args: words, env: { NO_COLOR: "1" } }));
  }

  /** Ends it and says how it went; frames that never come were waited for. */
  async end(): Promise<GapReport> {
    this.process.kill("SIGINT");
    await this.process.status;
    await this.process.stdout.done;
    const document = JSON.parse(this.process.stdout.text);
    assertMatchesSchema("svq.drive/1", document);
    assert.equal(document.requests.corrupted, 0, document.faults.join("\n"));
    return document.net;
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
  }
}

/** One line for people. */
export function gapText({ sent, missing, reordered, duplicated, longest_gap_ms }: GapReport): string {
  return `${sent} frames sent, ${missing} missing, ${reordered} reordered, ${duplicated} repeated, longest gap ${longest_gap_ms} ms`;
}
