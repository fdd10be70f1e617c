/** `svq completions`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { COMPLETE_FILES } from "../complete.ts";
import type { CliContext } from "../context.ts";
import { suggestionHint } from "../../suggest.ts";
import { usageError } from "../usage.ts";

// Words are taken from the line itself: bash would cut device addresses at `:` and `=`, and wants back only what follows.
const BASH = `# bash completion for svq
_svq() {
  local line="\${COMP_LINE:0:COMP_POINT}" words=() reply=() word brief cut=""
  read -ra words <<<"$line"
  [[ "$line" == *[[:space:]] ]] && words+=("")
  local partial="\${words[\${#words[@]}-1]}"
  COMPREPLY=()
  while IFS=$'\\t' read -r word brief; do
    if [[ "$word" == ${COMPLETE_FILES} ]]; then
      compopt -o filenames 2>/dev/null
      while IFS= read -r word; do reply+=("$word"); done < <(compgen -f -- "\${partial#*=}")
      partial="\${partial#*=}"
    else
      reply+=("$word")
    fi
  done < <("\${words[0]}" __complete -- "\${words[@]:1}" 2>/dev/null)
  case "$COMP_WORDBREAKS" in *:*) [[ "$partial" == *:* ]] && cut="\${partial%"\${partial##*:}"}" ;; esac
  case "$COMP_WORDBREAKS" in *=*)
    [[ "$partial" == *=* && \${#partial} -gt \${#cut} ]] && {
      local upto="\${partial%"\${partial##*=}"}"
      (( \${#upto} > \${#cut} )) && cut="$upto"
    } ;;
  esac
  for word in "\${reply[@]}"; do COMPREPLY+=("\${word#"$cut"}"); done
  if (( \${#COMPREPLY[@]} == 1 )) && [[ "\${COMPREPLY[0]}" == *[:=/,] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -F _svq svq
`;

const ZSH = `#compdef svq
_svq() {
  local line word brief
  local -a described plain
  while IFS=$'\\t' read -r word brief; do
    if [[ "$word" == ${COMPLETE_FILES} ]]; then
      _files
      return
    elif [[ "$word" == *[:=/,] ]]; then
      plain+=("$word")
    else
      described+=("\${word//:/\\\\:}\${brief:+:$brief}")
    fi
  done < <("\${words[1]}" __complete -- "\${(@)words[2,CURRENT]}" 2>/dev/null)
  (( \${#plain} )) && compadd -S '' -- "\${plain[@]}"
  (( \${#described} )) && _describe 'svq' described
}
if [[ "\${funcstack[1]}" == _svq ]]; then _svq "$@"; else compdef _svq svq; fi
`;

const FISH = `# fish completion for svq
function __svq_complete
  set -l words (commandline -opc) (commandline -ct)
  for line in ($words[1] __complete -- $words[2..-1] 2>/dev/null)
    if string match -q '${COMPLETE_FILES}*' -- $line
      __fish_complete_path (commandline -ct)
    else
      echo $line
    end
  end
end
complete -c svq -f -a '(__svq_complete)'
`;

const SCRIPTS: Readonly<Record<string, string>> = { bash: BASH, zsh: ZSH, fish: FISH };
const SHELLS = Object.keys(SCRIPTS);

/** Prints the completion script of a shell. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Print the completion script of a shell",
    fullDescription: "Print the completion script of a shell: commands, flags, choices, device addresses and relay names.\n\n" +
      "Examples:\n  source <(svq completions bash)\n  svq completions zsh > ~/.zfunc/_svq\n  svq completions fish > ~/.config/fish/completions/svq.fish",
  },
  parameters: {
    positional: {
      kind: "tuple",
      parameters: [{
        parse(text: string): string {
          if (!Object.hasOwn(SCRIPTS, text)) {
            throw usageError(`Unknown shell ${JSON.stringify(text)}`, suggestionHint(text, SHELLS, "shells"));
          }
          return text;
        },
        brief: "bash, zsh or fish",
        placeholder: "SHELL",
        proposeCompletions: (partial: string) => SHELLS.filter((name) => name.startsWith(partial)),
      }],
    },
  },
  func(this: CliContext, _flags: Record<never, never>, shell: string): void {
    this.output.write(SCRIPTS[shell]!);
  },
});
