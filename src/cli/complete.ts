/**
 * Completion of command lines: what may stand where the cursor is.
 *
 * @module
 */
import { COMMANDS } from "./commands.ts";
import type { CliContext } from "./context.ts";
import { GLOBAL_FLAGS } from "./globals.ts";
import { argumentsOf, entriesOf, findEntry, type FlagModel, flagsOf, isGroup, scanWords, type Target } from "./model.ts";

/** A word that fits, with one line about it. */
export interface Proposal {
  /** The whole word. */
  word: string;
  /** May be empty. */
  brief: string;
}

/** What the completion of paths is left to the shell with. */
export const COMPLETE_FILES = "__files__";

const GLOBAL_MODELS: readonly FlagModel[] = GLOBAL_FLAGS.map((flag) => ({
  name: flag.name,
  alias: flag.alias,
  brief: flag.brief,
  placeholder: flag.placeholder,
  values: flag.values,
  defaultValue: undefined,
  required: false,
  variadic: true,
  negatable: false,
  hidden: false,
  complete: undefined,
}));

/**
 * Words for the last one of `words`, which may be empty or partial.
 *
 * @param words the command line after `svq`
 */
export async function propose(context: CliContext, words: readonly string[]): Promise<Proposal[]> {
  const partial = words.at(-1) ?? "";
  const before = words.slice(0, -1);
  const { target, rest } = await walk(before);
  const proposals = await proposalsFor(context, target, rest, partial);
  return proposals.filter(({ word }) => word === COMPLETE_FILES || word.startsWith(partial));
}

async function walk(words: readonly string[]): Promise<{ target: Target | undefined; rest: string[] }> {
  const globals = scanWords(GLOBAL_MODELS, words);
  let target: Target | undefined;
  let rest = [...words];
  // Global flags may stand before the command: skip to the first positional word.
  const name = globals.positionals[0];
  if (name === undefined) return { target, rest };
  if (name === "help") {
    const resolved = await walk(words.slice(words.indexOf(name) + 1));
    return resolved.target === undefined || isGroup(resolved.target) ? resolved : { target: undefined, rest: ["help"] };
  }
  if (!Object.hasOwn(COMMANDS, name)) return { target, rest };
  target = (await COMMANDS[name]!.load()).command;
  rest = rest.slice(rest.indexOf(name) + 1);
  while (isGroup(target) && rest.length > 0) {
    const next = findEntry(target, rest[0]!);
    if (next === undefined) break;
    target = next;
    rest.shift();
  }
  return { target, rest };
}

async function proposalsFor(
  context: CliContext,
  target: Target | undefined,
  words: readonly string[],
  partial: string,
): Promise<Proposal[]> {
  const own = target !== undefined && !isGroup(target) ? flagsOf(target).filter((flag) => !flag.hidden) : [];
  const flags = [...own, ...GLOBAL_MODELS];
  const scanned = scanWords(flags, words);
  if (scanned.waiting !== undefined) return await flagValues(context, scanned.waiting, partial);
  const inline = /^--([^=]+)=(.*)$/s.exec(partial);
  if (!scanned.ended && inline !== null) {
    const flag = flags.find((known) => known.name === inline[1]);
    if (flag === undefined) return [];
    const values = await flagValues(context, flag, inline[2]!);
    return values.map(({ word, brief }) => ({ word: word === COMPLETE_FILES ? word : `--${inline[1]}=${word}`, brief }));
  }
  if (!scanned.ended && partial.startsWith("-")) {
    return flags
      .filter((flag) => flag.variadic || !scanned.given.has(flag.name))
      .flatMap((flag) => [
        { word: `--${flag.name}`, brief: flag.brief },
        ...(flag.negatable ? [{ word: `--no-${flag.name}`, brief: flag.brief }] : []),
      ]);
  }
  if (target === undefined) {
    if (scanned.positionals.length > 0) return [];
    return Object.entries(COMMANDS).filter(([, command]) => !command.hidden).map(([word, { brief }]) => ({ word, brief }));
  }
  if (isGroup(target)) {
    if (scanned.positionals.length > 0) return [];
    return entriesOf(target).filter((entry) => !entry.hidden).map(({ name, brief }) => ({ word: name, brief }));
  }
  const args = argumentsOf(target);
  const argument = args[Math.min(scanned.positionals.length, args.length - 1)];
  if (argument === undefined || (scanned.positionals.length >= args.length && !argument.variadic)) return [];
  if (argument.complete !== undefined) return (await argument.complete.call(context, partial)).map((word) => ({ word, brief: "" }));
  return isPath(argument.placeholder) ? [{ word: COMPLETE_FILES, brief: "" }] : [];
}

async function flagValues(context: CliContext, flag: FlagModel, partial: string): Promise<Proposal[]> {
  if (flag.values !== undefined) return flag.values.map((word) => ({ word, brief: "" })).filter(({ word }) => word.startsWith(partial));
  if (flag.complete !== undefined) return (await flag.complete.call(context, partial)).map((word) => ({ word, brief: "" }));
  return isPath(flag.placeholder) ? [{ word: COMPLETE_FILES, brief: "" }] : [];
}

function isPath(placeholder: string | undefined): boolean {
  return placeholder === "PATH" || placeholder === "FILE" || placeholder === "IMAGE" || placeholder === "DIRECTORY";
}
