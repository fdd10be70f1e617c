/**
 * Help text from the command model.
 *
 * @module
 */
import { VERSION } from "../version.ts";
import { displayWidth, type Paint } from "./colour.ts";
import { COMMANDS } from "./commands.ts";
import { GLOBAL_FLAGS } from "./globals.ts";
import { type ArgumentModel, argumentsOf, entriesOf, type FlagModel, flagsOf, isGroup, type Target } from "./model.ts";

const WIDTH = 100;

/** Help of the program itself; loads no command. */
export function formatTopHelp(paint: Paint): string {
  const commands = Object.entries(COMMANDS).filter(([, command]) => !command.hidden);
  return [
    `${paint.bold("svq")} ${VERSION}: live migration of vhost and vDPA devices through shadow virtqueues`,
    "",
    heading("Usage", paint),
    "  svq [FLAGS] COMMAND [ARGUMENTS]",
    "",
    heading("Commands", paint),
    ...rows(commands.map(([name, command]) => [paint.bold(name), command.brief])),
    "",
    heading("Flags of every command", paint),
    ...rows(globalRows(paint)),
    "",
    "svq COMMAND --help explains a command, svq man COMMAND prints its manual page.",
    "",
  ].join("\n");
}

/** Help of a command or a group of commands. */
export function formatHelp(path: readonly string[], target: Target, paint: Paint): string {
  const name = `svq ${path.join(" ")}`;
  const lines = [...wrap((target.fullDescription ?? target.brief).trim()), "", heading("Usage", paint)];
  if (isGroup(target)) {
    const entries = entriesOf(target).filter((entry) => !entry.hidden);
    lines.push(`  ${name} COMMAND [ARGUMENTS]`, "", heading("Commands", paint));
    lines.push(...rows(entries.map((entry) => [paint.bold(entry.name), entry.brief])));
  } else {
    const flags = flagsOf(target).filter((flag) => !flag.hidden);
    const args = argumentsOf(target);
    lines.push(`  ${usageLine(name, flags, args)}`);
    if (args.length > 0) lines.push("", heading("Arguments", paint), ...rows(args.map((arg) => argumentRow(arg, paint))));
    if (flags.length > 0) lines.push("", heading("Flags", paint), ...rows(flags.map((flag) => flagRow(flag, paint))));
  }
  lines.push("", heading("Flags of every command", paint), ...rows(globalRows(paint)), "");
  return lines.join("\n");
}

/** `svq relay run --front ADDRESS [FLAGS] DEVICE`. */
export function usageLine(name: string, flags: readonly FlagModel[], args: readonly ArgumentModel[]): string {
  const required = flags.filter((flag) => flag.required).map((flag) => `--${flag.name} ${flag.placeholder}`);
  const optional = flags.length > required.length ? ["[FLAGS]"] : [];
  return [name, ...required, ...optional, ...args.map(argumentUsage)].join(" ");
}

/** `DEVICE`, `[DEVICE]`, `[DEVICE…]`. */
export function argumentUsage(argument: ArgumentModel): string {
  const text = argument.variadic ? `${argument.placeholder}...` : argument.placeholder;
  return argument.required ? text : `[${text}]`;
}

/** `-n, --name NAME`. */
export function flagUsage(flag: Pick<FlagModel, "name" | "alias" | "placeholder" | "negatable">, paint: Paint): string {
  const alias = flag.alias === undefined ? "    " : `${paint.bold(`-${flag.alias}`)}, `;
  const name = flag.negatable ? `--[no-]${flag.name}` : `--${flag.name}`;
  return alias + paint.bold(name) + (flag.placeholder === undefined ? "" : ` ${flag.placeholder}`);
}

/** What is to be said about a flag besides its brief: choices, default, repeatable, required. */
export function flagNotes(flag: FlagModel): string {
  const notes = [];
  if (flag.values !== undefined) notes.push(flag.values.join(" | "));
  if (flag.defaultValue !== undefined) notes.push(`default ${flag.defaultValue}`);
  if (flag.required) notes.push("required");
  if (flag.variadic) notes.push("repeatable");
  return notes.length === 0 ? "" : `(${notes.join("; ")})`;
}

function flagRow(flag: FlagModel, paint: Paint): [string, string] {
  const notes = flagNotes(flag);
  return [flagUsage(flag, paint), notes === "" ? flag.brief : `${flag.brief} ${paint.dim(notes)}`];
}

function argumentRow(argument: ArgumentModel, paint: Paint): [string, string] {
  const note = argument.defaultValue === undefined ? "" : ` ${paint.dim(`(default ${argument.defaultValue})`)}`;
  return [paint.bold(argumentUsage(argument)), argument.brief + note];
}

function globalRows(paint: Paint): [string, string][] {
  return GLOBAL_FLAGS.map((flag) => [
    flagUsage({ name: flag.name, alias: flag.alias, placeholder: flag.placeholder, negatable: false }, paint),
    flag.brief,
  ]);
}

function heading(text: string, paint: Paint): string {
  return paint.bold(`${text}:`);
}

function rows(cells: readonly (readonly [string, string] | readonly string[])[]): string[] {
  const width = Math.min(34, Math.max(0, ...cells.map(([left]) => displayWidth(left!))));
  return cells.flatMap(([left, right]) => {
    const texts = wrap(right!, WIDTH - width - 4);
    const pad = " ".repeat(Math.max(0, width - displayWidth(left!)));
    const indent = " ".repeat(width + 4);
    if (displayWidth(left!) > width) return [`  ${left}`, ...texts.map((text) => indent + text)];
    return texts.map((text, line) => line === 0 ? `  ${left}${pad}  ${text}` : indent + text);
  });
}

/** Breaks lines at spaces; lines that begin with a space (examples) stay as they are. */
function wrap(text: string, width = WIDTH): string[] {
  return text.split("\n").flatMap((line) => {
    if (line.startsWith(" ") || displayWidth(line) <= width) return [line];
    const lines = [""];
    for (const word of line.split(" ")) {
      const last = lines.at(-1)!;
      if (last !== "" && displayWidth(last) + 1 + displayWidth(word) > width) lines.push(word);
      else lines[lines.length - 1] = last === "" ? word : `${last} ${word}`;
    }
    return lines;
  });
}
