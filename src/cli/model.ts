/**
 * The command model as plain data, read from @stricli/core's objects: what help, man pages, completions and the defaults
 * from environment and config file work on.
 *
 * @module
 */
import type { Command, RouteMap } from "@stricli/core";
import type { CliContext } from "./context.ts";

/** What a command file exports as `command`. */
export type Target = Command<CliContext> | RouteMap<CliContext>;

/** A flag of a command. */
export interface FlagModel {
  /** As typed, without dashes: `switch-timeout`. */
  name: string;
  /** Single letter, without dash. */
  alias: string | undefined;
  /** One line. */
  brief: string;
  /** Upper case; undefined for flags without a value. */
  placeholder: string | undefined;
  /** Allowed values, where they are a list. */
  values: readonly string[] | undefined;
  /** Default as typed. */
  defaultValue: string | undefined;
  /** Must be given (or come from environment or config file). */
  required: boolean;
  /** May be given more than once. */
  variadic: boolean;
  /** `--no-NAME` exists. */
  negatable: boolean;
  /** Not shown. */
  hidden: boolean;
  /** Values for a partial word. */
  complete: ((this: CliContext, partial: string) => readonly string[] | Promise<readonly string[]>) | undefined;
}

/** A positional argument of a command. */
export interface ArgumentModel {
  /** Upper case. */
  placeholder: string;
  /** One line. */
  brief: string;
  /** Must be given. */
  required: boolean;
  /** Takes all that remain. */
  variadic: boolean;
  /** Default as typed. */
  defaultValue: string | undefined;
  /** Values for a partial word. */
  complete: FlagModel["complete"];
}

/** One name under a group of commands. */
export interface EntryModel {
  /** As typed. */
  name: string;
  /** One line. */
  brief: string;
  /** The command or group behind it. */
  target: Target;
  /** Not shown. */
  hidden: boolean;
}

/** Is it a group of commands? */
export function isGroup(target: Target): target is RouteMap<CliContext> {
  return "getAllEntries" in target;
}

/** The commands of a group. */
export function entriesOf(group: RouteMap<CliContext>): EntryModel[] {
  return group.getAllEntries().map((entry) => ({
    name: entry.name["convert-camel-to-kebab"],
    brief: entry.target.brief,
    target: entry.target,
    hidden: entry.hidden,
  }));
}

/** The command or group named `name` in a group. */
export function findEntry(group: RouteMap<CliContext>, name: string): Target | undefined {
  return entriesOf(group).find((entry) => entry.name === name)?.target;
}

/** `switchTimeout` as typed: `switch-timeout`. */
export function kebab(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}

/** The flags of a command, in the order of their definition. */
export function flagsOf(command: Command<CliContext>): FlagModel[] {
  const { flags = {}, aliases = {} } = command.parameters;
  return Object.entries(flags).map(([name, flag]) => {
    const takesValue = flag.kind === "enum" || flag.kind === "parsed";
    const fallback = "default" in flag ? flag.default : undefined;
    return {
      name: kebab(name),
      alias: Object.entries(aliases).find(([, target]) => target === name)?.[0],
      brief: flag.brief,
      placeholder: takesValue ? (flag.placeholder ?? (flag.kind === "enum" ? "CHOICE" : "VALUE")).toUpperCase() : undefined,
      values: flag.kind === "enum" ? flag.values : undefined,
      defaultValue: fallback === undefined || fallback === false
        ? undefined
        : Array.isArray(fallback)
        ? fallback.join(",")
        : String(fallback),
      required: !(flag.optional ?? fallback !== undefined) && takesValue,
      variadic: flag.kind === "counter" || ("variadic" in flag && flag.variadic !== undefined && flag.variadic !== false),
      negatable: flag.kind === "boolean" && flag.withNegated !== false && (flag.default === true || flag.optional === true),
      hidden: "hidden" in flag && flag.hidden === true,
      complete: flag.kind === "parsed" ? flag.proposeCompletions as FlagModel["complete"] : undefined,
    };
  });
}

/** The positional arguments of a command. */
export function argumentsOf(command: Command<CliContext>): ArgumentModel[] {
  const positional = command.parameters.positional;
  if (positional === undefined) return [];
  const list = positional.kind === "array" ? [positional.parameter] : positional.parameters;
  return list.map((parameter, index) => ({
    placeholder: (parameter.placeholder ?? `ARG${index + 1}`).toUpperCase(),
    brief: parameter.brief,
    required: positional.kind === "array" ? (positional.minimum ?? 0) > 0 : !(parameter.optional ?? parameter.default !== undefined),
    variadic: positional.kind === "array",
    defaultValue: parameter.default,
    complete: parameter.proposeCompletions as FlagModel["complete"],
  }));
}

/** The words of a command line, sorted out without parsing values. */
export interface ScannedWords {
  /** Names of flags that are given. */
  given: Set<string>;
  /** Positional words. */
  positionals: string[];
  /** The flag that still waits for its value after the last word. */
  waiting: FlagModel | undefined;
  /** `--` has been seen. */
  ended: boolean;
}

/** Sorts out which words are flags, their values, or positional. Unknown flags count as flags without a value. */
export function scanWords(flags: readonly FlagModel[], words: readonly string[]): ScannedWords {
  const result: ScannedWords = { given: new Set(), positionals: [], waiting: undefined, ended: false };
  for (const word of words) {
    if (result.waiting !== undefined) {
      result.waiting = undefined;
    } else if (result.ended || !/^-./.test(word)) {
      result.positionals.push(word);
    } else if (word === "--") {
      result.ended = true;
    } else {
      const flag = flagOfWord(flags, word);
      if (flag === undefined) continue;
      result.given.add(flag.name);
      if (flag.placeholder !== undefined && !word.includes("=")) result.waiting = flag;
    }
  }
  return result;
}

function flagOfWord(flags: readonly FlagModel[], word: string): FlagModel | undefined {
  if (!word.startsWith("--")) return flags.find((flag) => flag.alias === word.slice(-1));
  const name = kebab(word.slice(2).split("=")[0]!);
  return flags.find((flag) => flag.name === name) ?? flags.find((flag) => `no-${flag.name}` === name);
}
