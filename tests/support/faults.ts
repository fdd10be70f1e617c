/**
 * Faults at every numbered step of src/migration/protocol.ts, where the guest is after each, and where it has to be.
 *
 * @module
 */
import assert from "node:assert/strict";
import { isClean } from "../../src/migration/document.ts";
import type { Guest } from "../../src/migration/guest.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, frameName, type FrameType } from "../../src/migration/protocol.ts";
import { svqCommand } from "./cli.ts";
import { type Fault, FrameProxy, Hosts, migrationTo, progress } from "./migration.ts";
import { TempDir } from "./temp.ts";
import { waitUntil } from "./wait.ts";

/** Who sends a frame. */
export type Side = "source" | "destination";

/** A frame of a migration, with who sends it. */
export type Step = readonly [Side, FrameType];

/** Every frame of a migration without a disk to copy, in order. */
export const STEPS: readonly Step[] = [
  ["source", FRAME.HELLO],
  ["destination", FRAME.HELLO],
  ["source", FRAME.OFFER],
  ["destination", FRAME.ACCEPT],
  ["source", FRAME.ROUND],
  ["source", FRAME.PAGES],
  ["source", FRAME.ZERO],
  ["source", FRAME.ROUND_END],
  ["destination", FRAME.ROUND_ACK],
  ["source", FRAME.STATE],
  ["destination", FRAME.PREPARED],
  ["source", FRAME.COMMIT],
  ["destination", FRAME.RUNNING],
];

/** What may happen when a frame is on its way, and how the table calls it. */
export const KINDS = {
  "cut": "link cut",
  "stall": "link silent, a new one works",
  "stall-for-good": "link silent, nobody answers",
  "flip": "frame damaged",
  "refuse": "destination refuses",
  "cancel": "cancelled",
  "kill-source": "source killed",
  "kill-destination": "destination killed",
} as const;

/** One of {@linkcode KINDS}. */
export type Kind = keyof typeof KINDS;

/** Where the guest is afterwards. `ends`: with the process that was killed while the guest was its own. */
export type Whereabouts = "source" | "destination" | "in doubt" | "ends";

/** What is promised; undefined where a kind has nothing to do with a step. */
export function promised(kind: Kind, [side, type]: Step): Whereabouts | undefined {
  const [commit, running] = [type === FRAME.COMMIT, type === FRAME.RUNNING];
  switch (kind) {
    case "refuse":
      return side === "source" ? undefined : "source";
    case "cancel":
      return commit || running ? "destination" : "source";
    case "kill-source":
      return commit || running ? "destination" : "ends";
    case "kill-destination":
      return running ? "ends" : "source";
    case "stall-for-good":
      return commit || running ? "in doubt" : "source";
    default:
      return running ? "destination" : "source";
  }
}

/** The table, in Markdown. @param cell what to say about a case */
export function faultTable(cell: (kind: Kind, step: Step) => Whereabouts | undefined): string {
  const kinds = Object.keys(KINDS) as Kind[];
  const lines = [`| frame | from | ${kinds.map((kind) => KINDS[kind]).join(" | ")} |`, `|---|---|${kinds.map(() => "---|").join("")}`];
  for (const step of STEPS) {
    lines.push(`| ${frameName(step[1])} | ${step[0]} | ${kinds.map((kind) => cell(kind, step) ?? "").join(" | ")} |`);
  }
  return lines.join("\n") + "\n";
}

/** Has it happen, sees that the guest is where it is said to be, nowhere else, and has lost nothing. @returns where it is */
export async function strike(kind: Kind, step: Step): Promise<Whereabouts> {
  switch (kind) {
    case "kill-source":
    case "kill-destination":
      return await strikeProcess(kind, step);
    case "refuse":
      return step[1] === FRAME.RUNNING ? await refuseToStart() : await strikeLink("refuse", false, step);
    case "stall-for-good":
      return await strikeLink("stall", true, step);
    default:
      return await strikeLink(kind, false, step);
  }
}

async function strikeLink(
  fault: Fault | "cancel",
  alone: boolean,
  [side, type]: Step,
  timeoutMs = 1500,
): Promise<Whereabouts> {
  await using hosts = new Hosts({ destination: { timeoutMs: 10_000 } });
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const proxy = hosts.own(
    new FrameProxy(hosts.dir.join("p"), path, (from, kind) => {
      if (from !== side || kind !== type) return undefined;
      if (fault !== "cancel") return fault;
      migration.cancel();
      return "pass";
    }, alone),
  );
  const { source, migration } = migrationTo(proxy.path, guest, {
    timeoutMs: fault === "stall" ? timeoutMs : 5000,
    doubtTimeoutMs: alone ? 300 : 5000,
  });
  using _source = source;
  using _migration = migration;
  const { outcome, error } = await migration.run();
  // On a machine that is busy the honest part of the migration may be slower than that.
  if (fault === "stall" && !proxy.fired && timeoutMs < 20_000) return await strikeLink(fault, alone, [side, type], timeoutMs * 4);
  assert.ok(proxy.fired, `the fault happened; ${outcome}: ${error?.message}`);
  let arrived = false;
  destination.arrived().then(() => arrived = true, () => {});
  if (outcome === "aborted" || outcome === "cancelled") {
    assert.equal(error?.exit_code ?? 7, 7);
    await assertRuns(guest);
    assert.equal(arrived, false, "the destination does not run");
    return "source";
  }
  const { completed } = await guest.driver.report();
  if (outcome === "completed" || type === FRAME.RUNNING) {
    await waitUntil("the guest at the destination", () => arrived);
    await assertRuns(hosts.own(await destination.arrived()));
  }
  assert.equal((await guest.driver.report()).completed, completed, "the source stands still");
  if (outcome === "completed") return "destination";
  assert.equal(outcome, "in-doubt");
  return "in doubt";
}

async function assertRuns(guest: Guest): Promise<void> {
  await progress(guest, 20);
  const report = reportOf(await guest.driver.stop(10_000));
  assert.ok(isClean(report), JSON.stringify(report));
}

async function refuseToStart(): Promise<Whereabouts> {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destinationWith((device) => {
    const start = device.setVringEnable.bind(device);
    device.setVringEnable = (index, enabled) => enabled ? Promise.reject(new Error("no")) : start(index, enabled);
  });
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const { outcome, phase } = await migration.run();
  assert.deepEqual([outcome, phase], ["aborted", "commit"]);
  await assertRuns(guest);
  return "source";
}

/** A process whose standard error is read as it comes. */
export class Watched implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly ended: Promise<{ code: number; stdout: string }>;
  stderr = "";
  #over = false;

  /** Starts `svq ARGS`. @param before words in front of it */
  constructor(args: string[], env: Record<string, string>, before: readonly string[] = []) {
    const child = svqCommand(args, env, before).spawn();
    this.#child = child;
    const read = (async () => {
      for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) this.stderr += text;
    })();
    this.ended = Promise.all([child.status, new Response(child.stdout).text(), read]).then(([{ code }, stdout]) => {
      this.#over = true;
      return { code, stdout };
    });
  }

  /** Waits for a line. */
  async says(what: RegExp): Promise<void> {
    await waitUntil(String(what), () => {
      const said = what.test(this.stderr);
      if (!said && this.#over) throw new Error(`it ended without ${what}: ${this.stderr}`);
      return said;
    });
  }

  kill(): void {
    if (!this.#over) this.#child.kill("SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    await this.ended;
  }
}

async function strikeProcess(kind: "kill-source" | "kill-destination", [side, type]: Step): Promise<Whereabouts> {
  using dir = new TempDir();
  const env = { SVQ_RUNTIME_DIR: dir.path, TMPDIR: dir.path };
  const device = ["--device", `sim:blk,file=${dir.join("disk")},size=16MiB`];
  await using there = new Watched(["migrate", "listen", `unix:${dir.join("d")}`, ...device], env);
  await there.says(/listening on/);
  const processes: { source?: Watched } = {};
  await using proxy = new FrameProxy(dir.join("p"), dir.join("d"), (from, frame) => {
    if (from !== side || frame !== type) return undefined;
    (kind === "kill-source" ? processes.source! : there).kill();
    return "pass";
  });
  const times = ["--mem", "8MiB", "--region", "4MiB", "--duration", "1s", "--warmup", "100ms"];
  await using source = new Watched(["migrate", "run", "-j", "--to", `unix:${proxy.path}`, ...device, ...times], env);
  processes.source = source;
  const { stdout } = await source.ended;
  assert.ok(proxy.fired, source.stderr);
  if (kind === "kill-source") {
    await there.says(/the guest runs here|migration ended/);
    return /the guest runs here/.test(there.stderr) ? "destination" : "ends";
  }
  const { outcome, requests } = JSON.parse(stdout);
  // RUNNING was on its way already.
  if (outcome === "completed") return "ends";
  assert.equal(outcome, "aborted", source.stderr);
  assert.equal((await source.ended).code, 7);
  assert.equal(requests.lost + requests.duplicated + requests.corrupted, 0);
  return "source";
}
