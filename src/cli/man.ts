/**
 * Manual pages (man macros of roff) from the command model.
 *
 * @module
 */
import { ADDRESS_FORMS } from "../vhost/address.ts";
import { VERSION } from "../version.ts";
import { COMMANDS } from "./commands.ts";
import { GLOBAL_FLAGS } from "./globals.ts";
import { argumentUsage, flagNotes, usageLine } from "./help.ts";
import { argumentsOf, entriesOf, type FlagModel, flagsOf, isGroup, type Target } from "./model.ts";

/** Exit codes of the program with their meaning. */
export const EXIT_TEXT: readonly (readonly [string, string])[] = [
  ["0", "done"],
  ["1", "failed"],
  ["2", "wrong usage"],
  ["3", "no such device, socket or relay"],
  ["4", "permission denied"],
  ["5", "the device lacks a needed feature"],
  ["6", "a check found problems"],
  ["7", "migration aborted, the source still runs"],
  ["8", "failed after the switchover"],
  ["124", "timed out"],
  ["130, 143", "interrupted by SIGINT or SIGTERM"],
];

const GLOBAL_TEXT = "Global flags (see \\fBsvq\\fR(1)) may stand before and after the command.";

/** The page svq(1). */
export function mainPage(): string {
  const commands = Object.entries(COMMANDS).filter(([, command]) => !command.hidden);
  return [
    title("SVQ"),
    section("NAME", "svq \\- live migration of vhost and vDPA devices through shadow virtqueues"),
    section("SYNOPSIS", "\\fBsvq\\fR [\\fIFLAGS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]"),
    section("COMMANDS", commands.map(([name, { brief }]) => item(`\\fB${roff(name)}\\fR`, brief)).join("\n")),
    section(
      "GLOBAL FLAGS",
      GLOBAL_FLAGS.map((flag) => item(flagTerm({ ...flag, alias: flag.alias, negatable: false }), flag.brief)).join("\n"),
    ),
    section(
      "DEVICE ADDRESSES",
      `${ADDRESS_FORMS.map((form) => `\\fB${roff(form)}\\fR`).join(",\n")}.\nA comma inside a path is written twice.`,
    ),
    section(
      "ENVIRONMENT",
      "Every flag \\fB\\-\\-NAME\\fR can get its value from \\fBSVQ_NAME\\fR, the argument DEVICE from \\fBSVQ_DEVICE\\fR; " +
        "\\fBSVQ_CONFIG\\fR names the config file, \\fBSVQ_RUNTIME_DIR\\fR the directory of control sockets. " +
        "\\fBNO_COLOR\\fR is obeyed.\nOrder: flag, environment, config file, default.",
    ),
    section(
      "FILES",
      item(
        "\\fI~/.config/svq/config.toml\\fR, \\fI/etc/svq/config.toml\\fR",
        "Defaults of flags: top-level keys for every command, a table " +
          "[relay.run] for one command.",
      ),
    ),
    section("EXIT STATUS", EXIT_TEXT.map(([code, text]) => item(code, text)).join("\n")),
    "",
  ].join("\n");
}

/** The page of a command: svq-NAME(1), with the pages of its subcommands as sections. */
export function commandPage(path: readonly string[], target: Target): string {
  const name = ["svq", ...path].join("-");
  const parts = [title(name.toUpperCase()), section("NAME", `${roff(name)} \\- ${roff(target.brief)}`)];
  if (isGroup(target)) {
    const entries = entriesOf(target).filter((entry) => !entry.hidden);
    parts.push(section("SYNOPSIS", `\\fB${roff(`svq ${path.join(" ")}`)}\\fR \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]`));
    parts.push(section("DESCRIPTION", paragraphs(target.fullDescription ?? target.brief) + `\n.PP\n${GLOBAL_TEXT}`));
    for (const entry of entries) parts.push(subcommand([...path, entry.name], entry.target));
  } else {
    parts.push(section("SYNOPSIS", synopsis(path, target)));
    parts.push(section("DESCRIPTION", paragraphs(target.fullDescription ?? target.brief) + `\n.PP\n${GLOBAL_TEXT}`));
    parts.push(...parameterSections(target, section));
  }
  parts.push(section("SEE ALSO", "\\fBsvq\\fR(1)"), "");
  return parts.join("\n");
}

function subcommand(path: readonly string[], target: Target): string {
  if (isGroup(target)) {
    return entriesOf(target).filter((entry) => !entry.hidden).map((entry) => subcommand([...path, entry.name], entry.target)).join("\n");
  }
  const inner = parameterSections(target, (_title, body) => body).join("\n");
  return section(
    path.join(" ").toUpperCase(),
    [synopsis(path, target), ".PP", paragraphs(target.fullDescription ?? target.brief), inner].join("\n"),
  );
}

function synopsis(path: readonly string[], target: Target): string {
  if (isGroup(target)) return "";
  const flags = flagsOf(target).filter((flag) => !flag.hidden);
  return `\\fB${roff(usageLine(`svq ${path.join(" ")}`, flags, argumentsOf(target)))}\\fR`;
}

function parameterSections(target: Target, make: (title: string, body: string) => string): string[] {
  if (isGroup(target)) return [];
  const flags = flagsOf(target).filter((flag) => !flag.hidden);
  const args = argumentsOf(target);
  const parts = [];
  if (args.length > 0) parts.push(make("ARGUMENTS", args.map((arg) => item(`\\fI${roff(argumentUsage(arg))}\\fR`, arg.brief)).join("\n")));
  if (flags.length > 0) {
    parts.push(make("FLAGS", flags.map((flag) => item(flagTerm(flag), `${flag.brief} ${flagNotes(flag)}`.trim())).join("\n")));
  }
  return parts;
}

function flagTerm(flag: Pick<FlagModel, "name" | "alias" | "negatable"> & { placeholder?: string | undefined }): string {
  const alias = flag.alias === undefined ? "" : `\\fB\\-${flag.alias}\\fR, `;
  const value = flag.placeholder === undefined ? "" : ` \\fI${roff(flag.placeholder)}\\fR`;
  return `${alias}\\fB\\-\\-${roff(flag.negatable ? `[no-]${flag.name}` : flag.name)}\\fR${value}`;
}

function title(name: string): string {
  return `.TH "${name}" "1" "" "svq ${VERSION}" "User Commands"`;
}

function section(name: string, body: string): string {
  return `.SH ${roff(name)}\n${body}`;
}

function item(term: string, text: string): string {
  return `.TP\n${term}\n${roff(text)}`;
}

/** Text with empty lines as paragraphs; indented lines (examples) as they are. */
function paragraphs(text: string): string {
  const out: string[] = [];
  let example = false;
  for (const line of text.split("\n")) {
    const indented = line.startsWith(" ");
    if (indented !== example) out.push(indented ? ".PP\n.nf\n.RS" : ".RE\n.fi");
    example = indented;
    out.push(line === "" ? ".PP" : roff(line.trim()));
  }
  if (example) out.push(".RE\n.fi");
  return out.join("\n");
}

/** Escapes what roff would read as a request. */
function roff(text: string): string {
  return text.replaceAll("\\", "\\e").replaceAll("-", "\\-").replace(/^([.'])/gm, "\\&$1");
}
