/**
 * Tests that run inside the lab VM. A test with a function is written like any other; its file is run a second time, in
 * the VM, where the functions are called one after the other. Tests of one file with the same options share one VM, since a boot takes
 * longer than most tests.
 *
 * @module
 */
import { LabUnavailable } from "../../scripts/lab/cache.ts";
import { ensureVm } from "../../scripts/lab/vm_build.ts";
import { runInVm, type VmOptions, type VmResult } from "../../scripts/lab/vm_run.ts";

/** Options of a test in the lab VM. */
export interface VmTestOptions extends VmOptions {
  /** `import.meta.url` of the test's file; needed by tests with a function. */
  file?: string;
}

/** A test's function. */
export type Body = () => void | Promise<void>;

/** How one function ended in the VM, one line of JSON in /lab/out. */
interface Outcome {
  name: string;
  error: string | null;
}

interface Group {
  options: VmTestOptions;
  run: Promise<{ result: VmResult; outcomes: Map<string, Outcome> }> | null;
}

const DENO_RUN = ["deno", "run", "-A", "--cached-only", "--no-check", "--no-lock"] as const;
const OUTCOMES = "outcomes.jsonl";
const GROUP_VARIABLE = "SVQ_LAB_GROUP";

/** Whether this process runs inside the lab VM. */
export const inVm: boolean = Deno.env.get("SVQ_IN_LAB") === "1";

/** In the VM: the /dev/vhost-vdpa-N of a vDPA device that vhost-vdpa has. */
export function vdpaNode(name: string): string {
  for (const entry of Deno.readDirSync(`/sys/bus/vdpa/devices/${name}`)) {
    if (entry.name.startsWith("vhost-vdpa-")) return `/dev/${entry.name}`;
  }
  throw new Error(`vDPA device ${name} is not bound to vhost-vdpa`);
}

/** Why the lab VM cannot be had here, or null. */
export const unavailable: string | null = inVm ? null : await whyUnavailable();
const bodies = new Map<string, Body>();
const groups = new Map<string, Group>();

async function whyUnavailable(): Promise<string | null> {
  if (Deno.uid() !== 0) return "needs root";
  try {
    await ensureVm();
    return null;
  } catch (error) {
    if (error instanceof LabUnavailable) return error.message;
    // Anything else is a defect of the lab: the tests will meet it again and fail.
    return null;
  }
}

/**
 * Registers a test that runs in the lab VM. Without root or packages it is ignored, and its name says why.
 *
 * @param body a function, called in the VM; or the path of a script below the checkout, run there by Deno, whose exit status counts
 */
export function vmTest(name: string, options: VmTestOptions, body: Body | string): void {
  if (inVm) {
    if (typeof body === "function" && Deno.env.get(GROUP_VARIABLE) === groupKey(options)) {
      if (bodies.size === 0) addEventListener("load", () => void runBodies());
      bodies.set(name, body);
    }
    return;
  }
  if (unavailable !== null) {
    Deno.test({ name: `${name} (skipped: ${unavailable})`, ignore: true, fn: () => {} });
    return;
  }
  // The VM's console and files outlive single tests of a group, so the sanitizers would blame the wrong one.
  const define = { name, sanitizeOps: false, sanitizeResources: false };
  if (typeof body === "string") {
    Deno.test({ ...define, fn: () => runScript(body, options) });
    return;
  }
  const key = groupKey(options);
  const group = groups.get(key) ?? { options, run: null };
  groups.set(key, group);
  Deno.test({
    ...define,
    fn: async () => {
      const { result, outcomes } = await (group.run ??= runGroup(key, group.options));
      const outcome = outcomes.get(name);
      if (!outcome) throw new Error(`The VM ended with ${result.code} before this test\n${result.stdout}\n${result.stderr}`);
      if (outcome.error !== null) throw new Error(`In the VM: ${outcome.error}`);
    },
  });
}

function groupKey({ file, files, modules, setup, env, vp, memoryMiB }: VmTestOptions): string {
  if (file === undefined) throw new TypeError("A vmTest with a function needs options.file");
  return JSON.stringify([file, files, modules, setup, env, vp, memoryMiB]);
}

async function runScript(script: string, options: VmTestOptions): Promise<void> {
  const [deno, run, ...flags] = DENO_RUN;
  const result = await runInVm([deno, /_test\.ts$/.test(script) ? "test" : run, ...flags, script], options);
  if (result.code !== 0) throw new Error(`${script} ended with ${result.code} in the VM\n${result.stdout}\n${result.stderr}`);
}

async function runGroup(key: string, options: VmTestOptions): Promise<{ result: VmResult; outcomes: Map<string, Outcome> }> {
  const file = new URL(options.file!).pathname;
  const result = await runInVm([...DENO_RUN, file], { ...options, env: { ...options.env, [GROUP_VARIABLE]: key } });
  const lines = new TextDecoder().decode(result.outputs[OUTCOMES] ?? new Uint8Array()).split("\n").filter(Boolean);
  return { result, outcomes: new Map(lines.map((line) => JSON.parse(line) as Outcome).map((outcome) => [outcome.name, outcome])) };
}

/** In the VM, without `deno test`: under emulation that takes seconds more to start. */
async function runBodies(): Promise<void> {
  for (const [name, body] of bodies) {
    let error: string | null = null;
    try {
      await body();
    } catch (thrown) {
      error = thrown instanceof Error ? thrown.stack ?? thrown.message : String(thrown);
    }
    await Deno.writeTextFile(`/lab/out/${OUTCOMES}`, JSON.stringify({ name, error } satisfies Outcome) + "\n", { append: true });
  }
  // What a test left open must not keep the VM alive.
  Deno.exit(0);
}
