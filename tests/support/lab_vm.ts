/**
 * Tests that run inside the lab VM. A test is written like any other; its file is run a second time, bundled, in
 * the VM, where the functions are called one after the other. Tests with the same options that run in one process share one VM, since a
 * boot takes longer than most tests.
 *
 * @module
 */
import { LabUnavailable } from "../../scripts/lab/cache.ts";
import { ensureVm } from "../../scripts/lab/vm_build.ts";
import { runInVm, type VmOptions, type VmResult } from "../../scripts/lab/vm_run.ts";
import { BAD_UPGRADE_ENTRY, bundleLabTest, SVQ_ENTRY, TEST_ENTRY } from "./lab_bundle.ts";

/** Options of a test in the lab VM. */
export interface VmTestOptions extends VmOptions {
  /** `import.meta.url` of the test's file. */
  file: string;
}

/** A test's function. */
export type Body = () => void | Promise<void>;

/** How one function ended in the VM, one line of JSON in /lab/out. */
interface Outcome {
  name: string;
  error: string | null;
  /** Duration in ms, by the VM's clock. */
  ms: number;
}

interface Group {
  options: VmTestOptions;
  files: Set<string>;
  run: Promise<{ result: VmResult; outcomes: Map<string, Outcome> }> | null;
}

// Emulated, a processor runs into what V8 has just compiled again and again: its quick compilers alone are twice as fast.
const QUICK = "--v8-flags=--no-opt,--liftoff-only";
const DENO_RUN = ["deno", "run", "-A", "--quiet", "--cached-only", "--no-check", "--no-lock", "--no-config", QUICK] as const;
const LIMIT_VARIABLE = "SVQ_LAB_TEST_MS";
/** No test takes so long on the slowest machine, ms; one that does says so by its own time-out. */
const LIMIT_MS = 300_000;

class HangingTest extends Error {
  constructor(limitMs: number) {
    super(`Did not end within ${limitMs / 1000} s; the tests behind it in this VM were not run`);
  }
}

const FILES = "/lab/files";
/** In the VM: the words that run svq in a process of its own. */
export const SVQ_IN_VM: readonly string[] = [...DENO_RUN, `${FILES}/${SVQ_ENTRY}`];
/** In the VM: the same for a new version that fails (tests/support/bad_upgrade.ts). */
export const BAD_UPGRADE_IN_VM: readonly string[] = [...DENO_RUN, `${FILES}/${BAD_UPGRADE_ENTRY}`];
const OUTCOMES = "outcomes.jsonl";
const GROUP_VARIABLE = "SVQ_LAB_GROUP";
const FILTER_VARIABLE = "SVQ_LAB_FILTER";

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
/** Of all that is registered, only tests of this machine are run, or only those with an IOMMU. Nothing to do with what runs in the VM. */
export const selection: { only: VmTestOptions | "vp" | undefined } = { only: undefined };
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
 * @param body called in the VM
 */
export function vmTest(name: string, options: VmTestOptions, body: Body): void {
  if (inVm) {
    if (Deno.env.get(GROUP_VARIABLE) === groupKey(options) && wanted(name)) {
      if (bodies.size === 0) addEventListener("load", () => void runBodies());
      bodies.set(name, body);
    }
    return;
  }
  if (selection.only === "vp" ? options.vp === undefined : selection.only && groupKey(selection.only) !== groupKey(options)) return;
  if (!wanted(name)) return;
  if (unavailable !== null) {
    Deno.test({ name: `${name} (skipped: ${unavailable})`, ignore: true, fn: () => {} });
    return;
  }
  // The VM's console and files outlive single tests of a group, so the sanitizers would blame the wrong one.
  const define = { name, sanitizeOps: false, sanitizeResources: false };
  const key = groupKey(options);
  const group = groups.get(key) ?? { options, files: new Set(), run: null };
  groups.set(key, group);
  group.files.add(options.file);
  Deno.test({
    ...define,
    fn: async () => {
      const { result, outcomes } = await (group.run ??= runGroup(key, group));
      const outcome = outcomes.get(name);
      if (!outcome) throw new Error(`The VM ended with ${result.code} before this test\n${result.stdout}\n${result.stderr}`);
      console.log(`in the VM: ${(outcome.ms / 1000).toFixed(1)} s of ${(result.totalMs / 1000).toFixed(1)} s`);
      if (outcome.error !== null) throw new Error(`In the VM: ${outcome.error}`);
    },
  });
}

// `deno test --filter` does not reach into the VM: SVQ_LAB_FILTER=TEXT runs single tests there.
function wanted(name: string): boolean {
  return name.includes(Deno.env.get(FILTER_VARIABLE) ?? "");
}

function groupKey({ files, modules, setup, env, vp, memoryMiB }: VmTestOptions): string {
  return JSON.stringify([files, modules, setup, env, vp, memoryMiB]);
}

async function runGroup(key: string, { options, files }: Group): Promise<{ result: VmResult; outcomes: Map<string, Outcome> }> {
  const result = await runInVm([...DENO_RUN, `${FILES}/${TEST_ENTRY}`], {
    ...options,
    files: { ...await bundleLabTest([...files]), ...options.files },
    env: {
      ...options.env,
      [LIMIT_VARIABLE]: String(Math.max(options.timeoutMs ?? 0, LIMIT_MS)),
      [GROUP_VARIABLE]: key,
      [FILTER_VARIABLE]: Deno.env.get(FILTER_VARIABLE) ?? "",
    },
  });
  const lines = new TextDecoder().decode(result.outputs[OUTCOMES] ?? new Uint8Array()).split("\n").filter(Boolean);
  return { result, outcomes: new Map(lines.map((line) => JSON.parse(line) as Outcome).map((outcome) => [outcome.name, outcome])) };
}

/** In the VM, without `deno test`: under emulation that takes seconds more to start. */
async function runBodies(): Promise<void> {
  const limitMs = Number(Deno.env.get(LIMIT_VARIABLE) ?? LIMIT_MS);
  for (const [name, body] of bodies) {
    let error: string | null = null;
    const begun = performance.now();
    const timer = Promise.withResolvers<never>();
    const limit = setTimeout(() => timer.reject(new HangingTest(limitMs)), limitMs);
    let hangs = false;
    try {
      await Promise.race([body(), timer.promise]);
    } catch (thrown) {
      hangs = thrown instanceof HangingTest;
      error = thrown instanceof Error ? thrown.stack ?? thrown.message : String(thrown);
    }
    clearTimeout(limit);
    const ms = Math.round(performance.now() - begun);
    await Deno.writeTextFile(`/lab/out/${OUTCOMES}`, JSON.stringify({ name, error, ms } satisfies Outcome) + "\n", { append: true });
    // It may have the devices that the next one wants.
    if (hangs) break;
  }
  // What a test left open must not keep the VM alive.
  Deno.exit(0);
}
