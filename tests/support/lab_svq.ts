/**
 * svq in the process of a lab test: a process of its own takes seconds to start under emulation.
 *
 * @module
 */
import assert from "node:assert/strict";
import { runCli } from "../../src/cli/app.ts";
import type { Sink } from "../../src/cli/output.ts";
import { waitUntil } from "./wait.ts";

const PATIENCE_MS = 180_000;

/** What a command wrote so far. */
export interface Texts {
  stdout: string;
  stderr: string;
}

/** Starts a command; its texts grow while it runs. */
export function startSvq(...args: string[]): { ended: Promise<number>; texts: Texts } {
  const texts = { stdout: "", stderr: "" };
  const sink = (name: keyof Texts): Sink => ({ isTerminal: false, write: (text) => void (texts[name] += text) });
  const env = (name: string) => name === "XDG_RUNTIME_DIR" ? "/run" : Deno.env.get(name);
  return { ended: runCli(args, { stdout: sink("stdout"), stderr: sink("stderr"), env }), texts };
}

/** Runs a command to its end. */
export async function runSvq(...args: string[]): Promise<Texts & { code: number }> {
  const { ended, texts } = startSvq(...args);
  return { code: await ended, ...texts };
}

/** Runs a command that must succeed, with -j; its document. */
export async function svqJson<T = Record<string, unknown>>(...args: string[]): Promise<T> {
  const { code, stdout, stderr } = await runSvq(...args, "-j");
  assert.equal(code, 0, stderr + stdout);
  return JSON.parse(stdout) as T;
}

/** A running `svq relay run`. */
export interface LabRelay extends AsyncDisposable {
  /** Where a VMM connects. */
  path: string;
  /** Its log so far. */
  log: () => string;
}

/** `svq relay run` in this process, stopped by `svq relay stop` when disposed. */
export async function labRelay(device: string, name: string, ...args: string[]): Promise<LabRelay> {
  const path = `/tmp/${name}.sock`;
  const running = startSvq("relay", "run", "--name", name, "--front", `unix:${path}`, "--device", device, ...args);
  let ended = false;
  running.ended.then(() => ended = true);
  await waitUntil("the relay", () => ended || running.texts.stderr.includes(": ready"), PATIENCE_MS);
  assert.ok(!ended, running.texts.stderr + running.texts.stdout);
  return {
    path,
    log: () => running.texts.stderr,
    async [Symbol.asyncDispose]() {
      const stopping = await runSvq("relay", "stop", name);
      assert.equal(stopping.code, 0, stopping.stderr);
      assert.equal(await running.ended, 0, running.texts.stderr);
    },
  };
}
