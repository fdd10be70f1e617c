import assert from "node:assert/strict";
import { buildCommand } from "@stricli/core";
import { COMMANDS } from "../../src/cli/commands.ts";
import { CliContext } from "../../src/cli/context.ts";
import { formatHelp, formatTopHelp } from "../../src/cli/help.ts";
import { argumentsOf, entriesOf, flagsOf, isGroup, type Target } from "../../src/cli/model.ts";
import { GLOBAL_FLAGS } from "../../src/cli/globals.ts";
import { commandPage, mainPage } from "../../src/cli/man.ts";
import { painter } from "../../src/cli/colour.ts";
import { takeGlobalFlags } from "../../src/cli/globals.ts";
import { deviceArgument, durationFlag, integerFlag, proposeAddresses, textFlag } from "../../src/cli/parameters.ts";
import type { DeviceAddress } from "../../src/vhost/address.ts";
import { SvqError } from "../../src/errors.ts";
import { ExitWith } from "../../src/cli/exit_with.ts";
import { propose } from "../../src/cli/complete.ts";
import { fakeHost, runInProcess } from "../support/fake_host.ts";
import { assertSnapshot } from "../support/snapshot.ts";
import { assertMatchesSchema } from "../support/schema.ts";

const PLAIN = painter(false);

interface ProbeFlags {
  readonly duration: number;
  readonly depth?: number;
  readonly tag?: string;
  readonly fast: boolean;
}

/** What the test command was given last. */
let seen: { flags: ProbeFlags; device: DeviceAddress } | undefined;
/** What the test command does. */
let behaviour: (context: CliContext) => void = () => {};

const trial = buildCommand({
  docs: { brief: "For tests", fullDescription: "For tests.\n\nExample:\n  svq trial sim:blk" },
  parameters: {
    flags: {
      duration: durationFlag("How long it runs", { default: "8s" }),
      depth: integerFlag("Requests in flight", { optional: true, min: 1, max: 1024 }),
      tag: textFlag("A word", { optional: true }),
      fast: { kind: "boolean", brief: "Hurry", default: false },
    },
    positional: { kind: "tuple", parameters: [deviceArgument()] },
  },
  func(this: CliContext, flags: ProbeFlags, device: DeviceAddress): void {
    seen = { flags, device };
    behaviour(this);
    this.output.document({ schema: "svq.trial/1", word: 1n << 40n }, () => "done");
  },
});

async function runTrial(args: readonly string[], env: Record<string, string> = {}) {
  const table = COMMANDS as Record<string, typeof COMMANDS[string]>;
  table.trial = { brief: "For tests", load: () => Promise.resolve({ command: trial }) };
  seen = undefined;
  try {
    return await runInProcess(["trial", ...args], env);
  } finally {
    delete table.trial;
    behaviour = () => {};
  }
}

Deno.test("global flags are taken before and after the command, joined or not, and not after --", () => {
  const take = (...args: string[]) => takeGlobalFlags(args, () => undefined);
  assert.deepEqual(take("-j", "x", "--pretty", "-vv", "y").rest, ["x", "y"]);
  assert.equal(take("-jq", "x").flags.verbosity, -1);
  assert.equal(take("x", "-vv").flags.verbosity, 2);
  assert.equal(take("x", "-p").flags.json, true, "-p implies -j");
  assert.equal(take("--color", "never").flags.color, "never");
  assert.equal(take("--config=/a").flags.config, "/a");
  assert.deepEqual(take("x", "--", "-j").rest, ["x", "--", "-j"]);
  assert.equal(take("x", "--", "-j").flags.json, false);
  assert.throws(() => take("--color", "sometimes"), /Bad value for --color/);
  assert.throws(() => take("--config"), /needs a value/);
  assert.equal(takeGlobalFlags([], (name) => name === "SVQ_COLOR" ? "always" : undefined).flags.color, "always");
});

Deno.test("a flag's value comes from the flag, then the environment, then the config file, then its default", async () => {
  const config = Deno.makeTempFileSync({ suffix: ".toml" });
  try {
    Deno.writeTextFileSync(config, 'device = "sim:net"\nduration = "1s"\ntag = "top"\n[trial]\nduration = "2s"\nfast = true\n');
    const from = async (args: string[], env: Record<string, string> = {}) => {
      const { code, stderr } = await runTrial(args, env);
      assert.equal(code, 0, stderr);
      return seen!;
    };
    assert.equal((await from(["sim:blk"])).flags.duration, 8e9);
    const both = await from(["--config", config]);
    assert.deepEqual([both.flags.duration, both.flags.tag, both.flags.fast], [2e9, "top", true], "the command's table goes before the top");
    assert.equal(both.device.kind === "sim" && both.device.device, "net");
    const env = { SVQ_DURATION: "3s", SVQ_DEVICE: "sim:loopback", SVQ_CONFIG: config };
    const mixed = await from([], env);
    assert.equal(mixed.flags.duration, 3e9);
    assert.equal(mixed.device.kind === "sim" && mixed.device.device, "loopback");
    assert.equal((await from(["--duration", "4s", "sim:blk"], env)).flags.duration, 4e9);
    assert.equal((await from(["--duration=5s", "sim:blk"], env)).flags.duration, 5e9);
    assert.equal((await from(["--", "sim:blk"], env)).flags.duration, 3e9, "defaults go before --");
  } finally {
    Deno.removeSync(config);
  }
});

Deno.test("a bad value says where it comes from", async () => {
  const { code, stderr } = await runTrial(["-j", "sim:blk"], { SVQ_DURATION: "soon" });
  assert.equal(code, 2);
  assert.deepEqual(JSON.parse(stderr).error, {
    code: "USAGE",
    message: "--duration: Bad duration: soon",
    hint: "the value comes from SVQ_DURATION; write a duration like 8s, 500ms, 100us or 1m30s",
  });
});

Deno.test("a config file that is missing, no TOML, or has an unknown key in the command's table is wrong usage", async () => {
  const config = Deno.makeTempFileSync({ suffix: ".toml" });
  try {
    const attempt = async (text: string) => {
      Deno.writeTextFileSync(config, text);
      return await runTrial(["sim:blk", "--config", config]);
    };
    assert.match((await attempt("= 3")).stderr, /Bad config file/);
    const unknown = await attempt('[trial]\ndurration = "1s"\n');
    assert.equal(unknown.code, 2);
    assert.match(unknown.stderr, /Unknown key durration in table \[trial\][^]*did you mean duration\?/);
    assert.equal((await attempt("other = 1\n[unrelated]\nx = 1\n")).code, 0, "keys of other commands are no business of this one");
    assert.match((await runTrial(["sim:blk", "--config", "/nonexistent/x.toml"])).stderr, /Cannot read the config file[^]*does not exist/);
  } finally {
    Deno.removeSync(config);
  }
});

Deno.test("wrong usage of every kind exits 2 with a hint", async () => {
  const cases: [string[], RegExp][] = [
    [[], /Argument DEVICE is missing[^]*SVQ_DEVICE/],
    [["sim:blk", "extra"], /Unexpected argument extra[^]*takes one argument/],
    [["sim:blk", "--dpeth", "1"], /Unknown flag --dpeth[^]*did you mean --depth\?/],
    [["sim:blk", "--depth", "0"], /--depth: Bad number: 0 is out of range[^]*at least 1/],
    [["sim:blk", "--depth"], /Flag --depth needs a value/],
    [["sim:blk", "--depth", "1", "--depth", "2"], /Flag --depth is given twice/],
    [["sim:blk", "-z"], /Unknown flag -z/],
    [["sim:blk,sise=1"], /unknown option "sise"[^]*did you mean size\?/],
  ];
  for (const [args, expected] of cases) {
    const { code, stdout, stderr } = await runTrial(args);
    assert.equal(code, 2, args.join(" "));
    assert.equal(stdout, "");
    assert.match(stderr, expected);
    assert.match(stderr, /^error: .+\n {2}hint: .+\n$/);
  }
});

Deno.test("errors end with their exit code; foreign errors are code INTERNAL and exit 1", async () => {
  const failing = async (error: Error, args: string[] = []) => {
    behaviour = () => {
      throw error;
    };
    return await runTrial(["sim:blk", ...args]);
  };
  const missing = await failing(new SvqError("NO_DEVICE", "No such device", { exitCode: 3, errno: 19, syscall: "open", hint: "look" }), [
    "-j",
  ]);
  assert.equal(missing.code, 3);
  assert.deepEqual(JSON.parse(missing.stderr), {
    error: { code: "NO_DEVICE", message: "No such device", hint: "look", errno: 19, syscall: "open" },
  });
  const foreign = await failing(new TypeError("x is not a function"), ["-j"]);
  assert.equal(foreign.code, 1);
  assertMatchesSchema("error", foreign.stderr);
  assert.equal(JSON.parse(foreign.stderr).error.code, "INTERNAL");
  const quiet = await failing(new ExitWith(6));
  assert.deepEqual([quiet.code, quiet.stderr], [6, ""]);
  const unread = await failing(new SvqError("UNREAD", "Nobody reads the output any more"));
  assert.deepEqual([unread.code, unread.stderr], [0, ""], "svq … | head is no failure");
  const hostile = await failing(new SvqError("X", "device says \x1b[31mred\x07"));
  assert.equal(hostile.stderr, "error: device says \\x1b[31mred\\x07\n");
});

Deno.test("documents carry u64 as 0x… and text for people is refused under -j", async () => {
  assert.equal((await runTrial(["sim:blk", "-j"])).stdout, '{"schema":"svq.trial/1","word":"0x10000000000"}\n');
  assert.equal((await runTrial(["sim:blk"])).stdout, "done\n");
  behaviour = (context) => context.output.line("text");
  const wrong = await runTrial(["sim:blk", "-j"]);
  assert.deepEqual([wrong.code, wrong.stdout], [1, ""]);
});

Deno.test("the log keeps to stderr and to its level", async () => {
  const logAll = (context: CliContext) => {
    for (const level of ["error", "warning", "info", "debug"] as const) context.output.log(level, level);
  };
  const run = async (args: string[], env: Record<string, string> = {}) => {
    behaviour = logAll;
    return (await runTrial(["sim:blk", ...args], env)).stderr;
  };
  assert.equal(await run([]), "error: error\nwarning: warning\ninfo\n");
  assert.equal(await run(["-q"]), "error: error\nwarning: warning\n");
  assert.equal(await run(["-v"]), "error: error\nwarning: warning\ninfo\ndebug: debug\n");
  assert.equal(await run(["-j", "-q"]), '{"log":{"level":"error","message":"error"}}\n{"log":{"level":"warning","message":"warning"}}\n');
  assert.equal(await run([], { JOURNAL_STREAM: "8:1" }), "<3>error\n<4>warning\n<6>info\n");
});

Deno.test("unknown commands and groups without a command say what there is", async () => {
  const unknown = await runInProcess(["docter"]);
  assert.deepEqual([unknown.code, unknown.stderr], [2, 'error: Unknown command "docter"\n  hint: did you mean doctor?\n']);
  assert.match((await runInProcess(["zzzz"])).stderr, /commands: .*doctor.*version/);
  assert.match((await runInProcess(["--nope"])).stderr, /Unknown flag --nope/);
  assert.equal((await runInProcess(["-j"])).code, 2, "no document without a command");
  assert.equal((await runInProcess([])).stdout, formatTopHelp(PLAIN));
  assert.equal((await runInProcess(["constructor"])).code, 2);
});

/** Every command and group, loaded. */
async function everyTarget(): Promise<{ path: string[]; target: Target }[]> {
  const all: { path: string[]; target: Target }[] = [];
  const add = (path: string[], target: Target) => {
    all.push({ path, target });
    if (isGroup(target)) { for (const entry of entriesOf(target)) add([...path, entry.name], entry.target); }
  };
  for (const [name, lazy] of Object.entries(COMMANDS)) add([name], (await lazy.load()).command);
  return all;
}

Deno.test("every command has help within 100 columns and the line that svq --help shows", async () => {
  for (const { path, target } of await everyTarget()) {
    const help = formatHelp(path, target, PLAIN);
    assert.match(help, /^Usage:$/m, path.join(" "));
    // Examples in a description stay on one line, to be copied.
    const examples = (target.fullDescription ?? "").split("\n").filter((line) => line.startsWith(" "));
    for (const line of help.split("\n").filter((line) => !examples.includes(line))) {
      assert.ok(line.length <= 100, `svq ${path.join(" ")} --help: ${line}`);
    }
    if (path.length === 1) assert.equal(target.brief, COMMANDS[path[0]!]!.brief, `commands.ts repeats the brief of ${path[0]}`);
    assert.match(target.brief, /^[A-Z].*[^.]$/, `brief of ${path.join(" ")}`);
  }
});

Deno.test("no command defines a flag that is a global one", async () => {
  const names = new Set(GLOBAL_FLAGS.map((flag) => flag.name));
  const letters = new Set(GLOBAL_FLAGS.map((flag) => flag.alias));
  for (const { path, target } of await everyTarget()) {
    if (isGroup(target)) continue;
    for (const flag of flagsOf(target)) {
      assert.ok(!names.has(flag.name), `svq ${path.join(" ")} --${flag.name}`);
      assert.ok(flag.alias === undefined || !letters.has(flag.alias), `svq ${path.join(" ")} -${flag.alias}`);
      assert.match(flag.placeholder ?? "X", /^[A-Z][A-Z0-9:|,.…_-]*$/);
    }
    for (const argument of argumentsOf(target)) assert.match(argument.placeholder, /^[A-Z][A-Z0-9_-]*$/);
  }
});

Deno.test("help texts are as they were", async () => {
  for (const name of ["doctor", "schema", "completions", "man", "version"]) {
    await assertSnapshot(`help_${name}.txt`, formatHelp([name], (await COMMANDS[name]!.load()).command, PLAIN));
  }
  await assertSnapshot("help_trial.txt", formatHelp(["trial"], trial, PLAIN));
});

Deno.test("manual pages are as they were, and no text becomes a roff request", async () => {
  await assertSnapshot("man_trial.txt", commandPage(["trial"], trial));
  for (const { path, target } of await everyTarget()) {
    for (const line of commandPage(path, target).split("\n")) {
      if (/^[.']/.test(line)) assert.match(line, /^\.(TH|SH|TP|PP|nf|fi|RS|RE)\b/, `svq man ${path.join(" ")}: ${line}`);
    }
  }
  assert.match(mainPage(), /^\.SH EXIT STATUS$/m);
});

Deno.test("completion proposes what fits where the cursor is", async () => {
  const context = new CliContext(fakeHost(), takeGlobalFlags([], () => undefined).flags);
  const words = async (...line: string[]) => (await propose(context, line)).map(({ word }) => word);
  assert.deepEqual(await words("do"), ["doctor"]);
  assert.deepEqual(await words("-j", "--color", "al"), ["always"]);
  assert.deepEqual(await words("doctor", "--for", "v"), ["vduse"]);
  assert.deepEqual(await words("doctor", "--for=v"), ["--for=vduse"]);
  assert.deepEqual(await words("doctor", "--fo"), ["--for"]);
  assert.deepEqual(await words("schema", "ver"), ["version"]);
  assert.deepEqual(await words("schema", "version", ""), [], "nothing is left to say");
  assert.deepEqual(await words("nonsense", ""), []);
  assert.deepEqual(await words("help", "sch"), ["schema"]);
  assert.ok(!(await words("")).includes("__complete"), "hidden commands stay hidden");
});

Deno.test("device addresses are completed with their options and paths", () => {
  assert.deepEqual(proposeAddresses("sim:b"), ["sim:blk"]);
  assert.deepEqual(proposeAddresses("sim:blk,size=1M,la"), ["sim:blk,size=1M,latency="]);
  assert.deepEqual(proposeAddresses("sim:blk,r"), ["sim:blk,ro"]);
  assert.ok(proposeAddresses("unix:/et").includes("unix:/etc/"));
  assert.ok(proposeAddresses("sim:blk,file=/et").includes("sim:blk,file=/etc/"));
});
