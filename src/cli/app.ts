/**
 * The command line: global flags, routing, parsing, errors and exit codes.
 *
 * # How to write a command
 *
 * One file per command, `src/cli/commands/NAME.ts`, that exports `command`; one line in `commands.ts` makes it known. The
 * file is loaded only when its command is named, so it may import what it needs at the top.
 *
 * ```ts ignore
 * import { buildCommand, type Command } from "@stricli/core";
 * import type { CliContext } from "../context.ts";
 * import { deviceArgument, durationFlag } from "../parameters.ts";
 *
 * interface Flags { readonly duration: number; readonly depth?: number }
 *
 * export const command: Command<CliContext> = buildCommand({
 *   docs: { brief: "Run a checked workload", fullDescription: "Longer text.\n\nExample:\n  svq drive sim:blk --duration 8s" },
 *   parameters: {
 *     flags: { duration: durationFlag("How long", { default: "8s" }), depth: integerFlag("Requests in flight", { optional: true }) },
 *     positional: { kind: "tuple", parameters: [deviceArgument()] },
 *   },
 *   async func(this: CliContext, flags: Flags, device: DeviceAddress): Promise<void> {
 *     const document = { schema: "svq.drive/1", ... };
 *     this.output.document(document, () => { this.output.table(["queue", "iops"], rows); });
 *   },
 * });
 * ```
 *
 * A group is `buildRouteMap({ routes: { run, start, stop }, docs: { brief } })`.
 *
 * - Results: `this.output.document(doc, human)` once, or `this.output.record(...)` per item of a stream. Never console.log.
 *   Document keys are snake_case with units (`_bytes`, `_us`), u64 are bigint (printed as `"0x…"`) or `hexU64(x)`. The shape
 *   goes to `schemas/` and the test calls `assertMatchesSchema`.
 * - Everything else: `this.output.info/warn/debug(...)`, `using progress = new Progress(this.output, "migrating")`.
 * - Errors: throw SvqError with code, exit code and hint; nothing is printed by the command. A check that found problems
 *   prints its document and then throws `new ExitWith(EXIT.checkFailed)`, which prints nothing.
 * - Global flags (-j -p -q -v -h --color --config) are taken out before the command sees its words: do not define these.
 * - Flags are camelCase in code and kebab-case when typed; names with a unit in them (`--poll-us`) take plain numbers. Every
 *   flag has an environment variable and a config key: see defaults.ts.
 * - Signals: `this.signal` (untilSignal) aborts at the first SIGINT or SIGTERM; the second one ends the process with 130 or
 *   143. Where running until stopped is the purpose (relay run, watch), clean up and return: exit 0. Where the work was cut
 *   short (drive, migrate), clean up and `throw this.signal.reason`: exit 130 or 143.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { suggestionHint } from "../suggest.ts";
import { COMMANDS } from "./commands.ts";
import { CliContext, type Host } from "./context.ts";
import { ExitWith } from "./exit_with.ts";
import { fillDefaults, loadConfig } from "./defaults.ts";
import { type GlobalFlags, takeGlobalFlags } from "./globals.ts";
import { argumentsOf, entriesOf, findEntry, flagsOf, isGroup, type Target } from "./model.ts";
import { stopBecauseUnread } from "./signals.ts";
import { usageError } from "./usage.ts";

/** What a command line names: a command or group, and the words after its name. */
interface Resolved {
  path: string[];
  target: Target;
  words: string[];
}

/**
 * Runs a command line.
 *
 * @param args without the program's name
 * @returns the exit code; everything has been printed
 */
export async function runCli(args: readonly string[], host: Host): Promise<number> {
  let context = new CliContext(host, emergencyFlags(args));
  try {
    const { flags, rest } = takeGlobalFlags(args, host.env);
    context = new CliContext(host, flags);
    context.output.onClosed = stopBecauseUnread;
    await dispatch(context, rest);
    return EXIT.ok;
  } catch (error) {
    return report(context, error);
  }
}

function report(context: CliContext, error: unknown): number {
  if (error instanceof ExitWith) return error.exitCode;
  if (error instanceof SvqError) {
    // `svq … | head` is no failure of svq.
    if (error.code === "UNREAD") return EXIT.ok;
    context.output.error(error);
    return error.exitCode;
  }
  const message = error instanceof Error ? error.message || error.name : String(error);
  if (error instanceof Error && error.stack !== undefined && context.flags.verbosity > 0) context.output.debug(error.stack);
  context.output.error(new SvqError("INTERNAL", message, { hint: "this is a bug in svq; run again with -v for the place" }));
  return EXIT.failed;
}

// Errors in the global flags themselves must already obey -j.
function emergencyFlags(args: readonly string[]): GlobalFlags {
  const json = args.some((arg) => /^(-[jpqvh]*[jp][jpqvh]*|--json|--pretty)$/.test(arg));
  return { json, pretty: false, color: "auto", verbosity: 0, config: undefined, help: false, version: false };
}

async function dispatch(context: CliContext, words: readonly string[]): Promise<void> {
  const { flags, output } = context;
  if ((flags.version && words.length === 0) || (words.length === 1 && words[0] === "version" && !flags.help)) {
    // Scripts ask this all the time: it needs no framework.
    const { printVersion } = await import("./print_version.ts");
    return printVersion(output);
  }
  const wantsHelp = flags.help || words[0] === "help";
  const names = words[0] === "help" ? words.slice(1) : words;
  if (names.length === 0) {
    if (!wantsHelp && output.json) throw usageError("No command given", "svq --help lists them");
    const { formatTopHelp } = await import("./help.ts");
    return output.write(formatTopHelp(output.paint));
  }
  const resolved = await resolve(names);
  if (wantsHelp) {
    const { formatHelp } = await import("./help.ts");
    return output.write(formatHelp(resolved.path, resolved.target, output.paint));
  }
  return runCommand(context, resolved);
}

/** Finds what `words` name. @throws SvqError USAGE with a suggestion */
export async function resolve(words: readonly string[]): Promise<Resolved> {
  const [name = "", ...rest] = words;
  if (name.startsWith("-")) throw usageError(`Unknown flag ${name}`, "flags of a command come after its name; svq --help lists commands");
  const lazy = Object.hasOwn(COMMANDS, name) ? COMMANDS[name]! : undefined;
  if (lazy === undefined) {
    const names = Object.entries(COMMANDS).filter(([, command]) => !command.hidden).map(([known]) => known);
    throw usageError(`Unknown command ${JSON.stringify(name)}`, suggestionHint(name, names, "commands"));
  }
  const resolved: Resolved = { path: [name], target: (await lazy.load()).command, words: rest };
  while (isGroup(resolved.target) && resolved.words.length > 0 && !resolved.words[0]!.startsWith("-")) {
    const next = resolved.words[0]!;
    const target = findEntry(resolved.target, next);
    if (target === undefined) {
      const known = entriesOf(resolved.target).filter((entry) => !entry.hidden).map((entry) => entry.name);
      throw usageError(`Unknown command ${JSON.stringify([...resolved.path, next].join(" "))}`, suggestionHint(next, known, "commands"));
    }
    resolved.path.push(next);
    resolved.words.shift();
    resolved.target = target;
  }
  return resolved;
}

async function runCommand(context: CliContext, { path, target, words }: Resolved): Promise<void> {
  const name = path.join(" ");
  if (isGroup(target)) {
    const known = entriesOf(target).filter((entry) => !entry.hidden).map((entry) => entry.name);
    throw usageError(`svq ${name} needs a command`, `one of ${known.join(", ")}; svq ${name} --help explains them`);
  }
  const model = { path, flags: flagsOf(target), args: argumentsOf(target) };
  // Commands without parameters (version) need no config file.
  const needsConfig = model.flags.length > 0 || model.args.length > 0 || context.flags.config !== undefined;
  const sources = needsConfig ? await loadConfig(context.flags.config, context.host.env) : { config: {}, configPath: undefined };
  const filled = fillDefaults(model, words, { env: context.host.env, ...sources });
  const { parseAndRun } = await import("./parse_and_run.ts");
  await parseAndRun(context, target, { name, ...filled });
}
