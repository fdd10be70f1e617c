/**
 * The flags that every command has, accepted before and after the command's name: -j -p -q -v -h --color --config --version.
 *
 * @module
 */
import { usageError } from "./usage.ts";
import { suggestionHint } from "../suggest.ts";

/** Values of `--color`. */
export const COLOR_CHOICES = ["auto", "always", "never"] as const;

/** The global flags of one run. */
export interface GlobalFlags {
  /** `-j`. */
  json: boolean;
  /** `-p`, implies json. */
  pretty: boolean;
  /** `--color`. */
  color: typeof COLOR_CHOICES[number];
  /** `-v` counts up, `-q` down. */
  verbosity: number;
  /** `--config FILE`. */
  config: string | undefined;
  /** `-h`. */
  help: boolean;
  /** `--version`. */
  version: boolean;
}

/** What help, completions and man pages say about them. */
export const GLOBAL_FLAGS: readonly { name: string; alias?: string; placeholder?: string; values?: readonly string[]; brief: string }[] = [
  { name: "json", alias: "j", brief: "Print one JSON document (streams: JSON lines)" },
  { name: "pretty", alias: "p", brief: "Print JSON with line breaks" },
  { name: "quiet", alias: "q", brief: "Print less to stderr" },
  { name: "verbose", alias: "v", brief: "Print more to stderr (repeatable)" },
  { name: "color", placeholder: "WHEN", values: COLOR_CHOICES, brief: "Colours: auto, always or never" },
  { name: "config", placeholder: "FILE", brief: "Read defaults from this TOML file" },
  { name: "help", alias: "h", brief: "Print help and exit" },
];

/**
 * Takes the global flags out of `args`; what follows `--` is left alone.
 *
 * @param args the command line
 * @param env for SVQ_COLOR and SVQ_CONFIG
 * @throws SvqError USAGE
 */
export function takeGlobalFlags(
  args: readonly string[],
  env: (name: string) => string | undefined,
): { flags: GlobalFlags; rest: string[] } {
  const flags: GlobalFlags = {
    json: false,
    pretty: false,
    color: colorChoice(env("SVQ_COLOR") ?? "auto"),
    verbosity: 0,
    config: env("SVQ_CONFIG"),
    help: false,
    version: false,
  };
  const rest: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!;
    if (arg === "--") {
      rest.push(...args.slice(i));
      break;
    }
    const [name, inline] = splitFlag(arg);
    if (name === "--color" || name === "--config") {
      const value = inline ?? args[++i];
      if (value === undefined) throw usageError(`Flag ${name} needs a value`);
      if (name === "--config") flags.config = value;
      else flags.color = colorChoice(value);
    } else if (inline === undefined && !takeSwitch(flags, arg)) {
      rest.push(arg);
    } else if (inline !== undefined) {
      rest.push(arg);
    }
  }
  return { flags, rest };
}

function splitFlag(arg: string): [string, string | undefined] {
  const at = arg.startsWith("--") ? arg.indexOf("=") : -1;
  return at < 0 ? [arg, undefined] : [arg.slice(0, at), arg.slice(at + 1)];
}

function takeSwitch(flags: GlobalFlags, arg: string): boolean {
  // Short ones may be joined: -jv. A group with a letter of the command's own stays whole.
  const letters = /^-([jpqvh]+)$/.exec(arg)?.[1];
  const names = letters === undefined ? [arg] : [...letters];
  for (const name of names) {
    switch (name) {
      case "j":
      case "--json":
        flags.json = true;
        break;
      case "p":
      case "--pretty":
        flags.json = flags.pretty = true;
        break;
      case "q":
      case "--quiet":
        flags.verbosity--;
        break;
      case "v":
      case "--verbose":
        flags.verbosity++;
        break;
      case "h":
      case "--help":
        flags.help = true;
        break;
      case "--version":
        flags.version = true;
        break;
      default:
        return false;
    }
  }
  return true;
}

function colorChoice(value: string): typeof COLOR_CHOICES[number] {
  for (const choice of COLOR_CHOICES) if (choice === value) return choice;
  throw usageError(`Bad value for --color: ${value}`, suggestionHint(value, COLOR_CHOICES, "choices"));
}
