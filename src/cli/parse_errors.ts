/**
 * The framework's parse errors as SvqError USAGE: one sentence, a hint, and where a bad value comes from.
 *
 * @module
 */
import {
  AliasNotFoundError,
  ArgumentParseError,
  type Command,
  EnumValidationError,
  FlagNotFoundError,
  InvalidNegatedFlagSyntaxError,
  UnexpectedFlagError,
  UnexpectedPositionalError,
  UnsatisfiedFlagError,
  UnsatisfiedPositionalError,
} from "@stricli/core";
import { SvqError } from "../errors.ts";
import { suggest, suggestionHint } from "../suggest.ts";
import { quote } from "../units.ts";
import type { CliContext } from "./context.ts";
import { GLOBAL_FLAGS } from "./globals.ts";
import { argumentsOf, flagsOf, kebab, scanWords } from "./model.ts";
import { usageError } from "./usage.ts";

/** The command whose words were parsed. */
export interface ParsedCommand {
  /** `relay run`. */
  name: string;
  /** For the names of its flags. */
  command: Command<CliContext>;
  /** The words that were parsed. */
  words: readonly string[];
  /** Where defaults came from, by flag or argument. */
  origins: ReadonlyMap<string, string>;
}

/** Turns whatever the framework's parser threw into a usage error; errors of ours pass. */
export function parseErrorText(error: unknown, { name, command, words, origins }: ParsedCommand): unknown {
  const see = `svq ${name} --help explains the flags`;
  if (error instanceof SvqError) return error;
  if (error instanceof FlagNotFoundError) {
    const flag = kebab(error.input.replace(/^-+/, ""));
    const known = [...flagsOf(command).filter((flag) => !flag.hidden).map((flag) => flag.name), ...GLOBAL_FLAGS.map((flag) => flag.name)];
    const near = suggest(flag, known).map((name) => `--${name}`);
    const hint = near.length > 0 ? `did you mean ${near.join(" or ")}?` : see;
    return usageError(`Unknown flag --${flag}`, hint);
  }
  if (error instanceof AliasNotFoundError) return usageError(`Unknown flag -${error.input}`, see);
  if (error instanceof ArgumentParseError) {
    const label = labelOf(error.externalFlagNameOrPlaceholder, command);
    const inner = error.exception;
    const message = inner instanceof Error ? inner.message : String(inner);
    const origin = origins.get(label.replace(/^--/, ""));
    const hint = inner instanceof SvqError ? inner.hint : undefined;
    const hints = [...(origin === undefined ? [] : [`the value comes from ${origin}`]), ...(hint === undefined ? [] : [hint])];
    return new SvqError(inner instanceof SvqError ? inner.code : "USAGE", `${label}: ${message}`, {
      exitCode: 2,
      hint: hints.length === 0 ? see : hints.join("; "),
    });
  }
  if (error instanceof EnumValidationError) {
    const flag = kebab(error.externalFlagName);
    const origin = origins.get(flag);
    const hint = suggestionHint(error.input, error.values, "choices");
    return usageError(
      `Bad value for --${flag}: ${quote(error.input)}`,
      origin === undefined ? hint : `the value comes from ${origin}; ${hint}`,
    );
  }
  if (error instanceof UnsatisfiedFlagError) {
    const flag = kebab(error.externalFlagName);
    const typed = scanWords(flagsOf(command), words).given.has(flag);
    return usageError(`Flag --${flag} ${typed ? "needs a value" : "is missing"}`, see);
  }
  if (error instanceof UnexpectedPositionalError) {
    return usageError(`Unexpected argument ${quote(error.input)}`, `svq ${name} takes ${countText(error.expectedCount)}`);
  }
  if (error instanceof UnsatisfiedPositionalError) {
    const argument = argumentsOf(command).find((known) => known.placeholder === error.placeholder.toUpperCase());
    const variable = argument?.variadic ? "" : `; the variable SVQ_${error.placeholder.toUpperCase()} can hold a default`;
    return usageError(`Argument ${error.placeholder.toUpperCase()} is missing`, `${argument?.brief ?? see}${variable}`);
  }
  if (error instanceof UnexpectedFlagError) {
    return usageError(
      `Flag --${kebab(error.externalFlagName)} is given twice`,
      `with ${quote(error.previousInput)} and ${quote(error.input)}`,
    );
  }
  if (error instanceof InvalidNegatedFlagSyntaxError) {
    return usageError(`Flag --${kebab(error.externalFlagName)} takes no value`, see);
  }
  return error;
}

function labelOf(flagOrPlaceholder: string, command: Command<CliContext>): string {
  const name = kebab(flagOrPlaceholder);
  if (flagsOf(command).some((flag) => flag.name === name)) return `--${name}`;
  return flagOrPlaceholder.toUpperCase();
}

function countText(count: number): string {
  return count === 0 ? "no arguments" : count === 1 ? "one argument" : `at most ${count} arguments`;
}
