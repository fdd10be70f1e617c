/**
 * Defaults of flags from the environment and the config file. Order: flag, environment, config file, built-in default.
 *
 * Environment: flag `--switch-timeout` is `SVQ_SWITCH_TIMEOUT`; a required positional argument DEVICE is `SVQ_DEVICE`.
 * Config file (TOML): top-level keys hold for every command that has the flag, a table `[relay.run]` for one command.
 *
 * @module
 */
import { suggestionHint } from "../suggest.ts";
import { type ArgumentModel, type FlagModel, scanWords } from "./model.ts";
import { usageError } from "./usage.ts";

/** Names that mean something else than a flag. */
const RESERVED = new Set(["SVQ_LAB", "SVQ_RUNTIME_DIR", "SVQ_CONFIG", "SVQ_COLOR", "SVQ_UPGRADE_SOCKET"]);

/** A config file's content. */
export type Config = Record<string, unknown>;

/** A command line with defaults filled in. */
export interface FilledWords {
  /** The words for the parser. */
  words: string[];
  /** Where a flag's or argument's value comes from, by its name: `SVQ_DEVICE`, or `/etc/svq/config.toml`. */
  origins: Map<string, string>;
}

/**
 * Adds words for flags that are not given but have a default outside.
 *
 * @param command its flags, arguments and name, e.g. `["relay", "run"]`
 * @param words what was typed after the name
 * @throws SvqError USAGE for a key in the command's config table that is no flag of it
 */
export function fillDefaults(
  command: { path: readonly string[]; flags: readonly FlagModel[]; args: readonly ArgumentModel[] },
  words: readonly string[],
  sources: { env: (name: string) => string | undefined; config: Config; configPath: string | undefined },
): FilledWords {
  const scanned = scanWords(command.flags, words);
  const origins = new Map<string, string>();
  const added: string[] = [];
  const own = commandTable(command, sources.config, sources.configPath);
  const lookUp = (name: string): [unknown, string] | undefined => {
    const variable = `SVQ_${name.toUpperCase().replaceAll("-", "_")}`;
    const text = RESERVED.has(variable) ? undefined : sources.env(variable);
    if (text !== undefined && text !== "") return [text, variable];
    const value = keyOf(own, name) ?? keyOf(sources.config, name);
    return value === undefined || isTable(value) ? undefined : [value, sources.configPath ?? "config file"];
  };
  for (const flag of command.flags) {
    if (scanned.given.has(flag.name)) continue;
    const found = lookUp(flag.name);
    if (found === undefined) continue;
    origins.set(flag.name, found[1]);
    for (const value of flag.variadic && Array.isArray(found[0]) ? found[0] : [found[0]]) added.push(...flagWords(flag, value, found[1]));
  }
  const positional: string[] = [];
  for (const argument of command.args.slice(scanned.positionals.length)) {
    const found = argument.required && !argument.variadic ? lookUp(argument.placeholder.toLowerCase()) : undefined;
    if (found === undefined) break;
    origins.set(argument.placeholder, found[1]);
    positional.push(String(found[0]));
  }
  const end = words.indexOf("--");
  const before = end < 0 ? words : words.slice(0, end);
  const after = end < 0 ? [] : words.slice(end);
  return { words: [...before, ...added, ...positional.filter(() => end < 0), ...after, ...positional.filter(() => end >= 0)], origins };
}

function flagWords(flag: FlagModel, value: unknown, origin: string): string[] {
  if (flag.placeholder !== undefined) return [`--${flag.name}=${String(value)}`];
  if (value === true || value === "true" || value === "1" || value === "yes") return [`--${flag.name}`];
  if (value === false || value === "false" || value === "0" || value === "no") return flag.negatable ? [`--no-${flag.name}`] : [];
  throw usageError(`Bad value for --${flag.name}: ${String(value)}`, `it comes from ${origin}; write true or false`);
}

function commandTable(command: { path: readonly string[]; flags: readonly FlagModel[] }, config: Config, path: string | undefined): Config {
  let table: unknown = config;
  for (const name of command.path) table = isTable(table) ? table[name] : undefined;
  if (!isTable(table)) return {};
  const names = command.flags.map((flag) => flag.name);
  for (const [key, value] of Object.entries(table)) {
    const name = key.replaceAll("_", "-");
    if (isTable(value) || names.includes(name)) continue;
    throw usageError(`Unknown key ${key} in table [${command.path.join(".")}] of ${path}`, suggestionHint(name, names, "keys"));
  }
  return table;
}

function keyOf(table: Config, name: string): unknown {
  return table[name] ?? table[name.replaceAll("-", "_")];
}

function isTable(value: unknown): value is Config {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);
}

/**
 * Reads the config file: the one that is named, or the first that exists of the user's and the system's.
 *
 * @throws SvqError USAGE when it cannot be parsed, or when a named one cannot be read
 */
export async function loadConfig(
  named: string | undefined,
  env: (name: string) => string | undefined,
): Promise<{ config: Config; configPath: string | undefined }> {
  const home = env("HOME");
  const user = env("XDG_CONFIG_HOME") ?? (home === undefined ? undefined : `${home}/.config`);
  const candidates = named !== undefined ? [named] : [...(user === undefined ? [] : [`${user}/svq/config.toml`]), "/etc/svq/config.toml"];
  for (const path of candidates) {
    let text: string;
    try {
      text = Deno.readTextFileSync(path);
    } catch (error) {
      if (named === undefined) continue;
      throw usageError(`Cannot read the config file ${path}`, error instanceof Deno.errors.NotFound ? "it does not exist" : String(error));
    }
    const { parse } = await import("smol-toml");
    try {
      return { config: parse(text) as Config, configPath: path };
    } catch (error) {
      throw usageError(
        `Bad config file ${path}: ${String(error instanceof Error ? error.message : error).split("\n")[0]}`,
        "it must be TOML",
      );
    }
  }
  return { config: {}, configPath: undefined };
}
