"""``loopkit completion SHELL``: a script with which the shell completes commands and options."""

from __future__ import annotations

from collections.abc import Sequence

from loopkit.cli.args.command_parser import CommandParser
from loopkit.cli.args.config import fit_parameters
from loopkit.cli.main import COMMANDS

# Where the options are those of Fit, and a file comes first.
TASK_COMMANDS = (
    "fit",
    "evaluate",
    "test",
    "predict",
    "eject",
    "lr-find",
    "sweep",
    "resume",
    "plan",
)
CKPT = ("ls", "verify", "diff", "export", "import")

BASH = """_loopkit() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [ "$command" = ckpt ] && [ "$COMP_CWORD" -eq 2 ]; then
    COMPREPLY=($(compgen -W "{ckpt}" -- "$word"))
  elif [[ "$word" == --* ]] && [[ " {task_commands} " == *" $command "* ]]; then
    COMPREPLY=($(compgen -W "{options}" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _loopkit loopkit
"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n" + BASH
FISH_LINES = {
    "commands": "complete -c loopkit -n __fish_use_subcommand -f -a '{commands}'",
    "ckpt": "complete -c loopkit -n '__fish_seen_subcommand_from ckpt' -a '{ckpt}'",
    "option": "complete -c loopkit -n '__fish_seen_subcommand_from {task_commands}' -l {option}",
}
# A file, because a shell that asked loopkit at each start would wait for it.
HOW = {
    "bash": "loopkit completion bash > ~/.local/share/bash-completion/completions/loopkit",
    "zsh": "loopkit completion zsh > ~/.loopkit-completion, and source it in ~/.zshrc",
    "fish": "loopkit completion fish > ~/.config/fish/completions/loopkit.fish",
}


def run(argv: Sequence[str]) -> int:
    """Print the script; return the exit code."""
    lines = "; ".join(f"{shell}: {how}" for shell, how in HOW.items())
    parser = CommandParser(
        "completion", f"Print a script for the shell, that completes names of loopkit. {lines}"
    )
    parser.add_argument("shell", choices=HOW)
    shell = parser.parse_args(argv).shell
    words = {
        "commands": " ".join(COMMANDS),
        "ckpt": " ".join(CKPT),
        "task_commands": " ".join(TASK_COMMANDS),
        "options": " ".join(f"--{name}" for name in option_names()),
    }
    if shell == "fish":
        kinds = [FISH_LINES["commands"], FISH_LINES["ckpt"]]
        text = "\n".join(line.format(**words) for line in kinds)
        print(text)
        for name in option_names():
            print(FISH_LINES["option"].format(option=name, **words))
    else:
        print((BASH if shell == "bash" else ZSH).format(**words), end="")
    return 0


def option_names() -> list[str]:
    """Return the options of Fit and their fields, as they are typed."""
    found = ["config", "print-config", "help"]
    for name, one in fit_parameters().items():
        found += [name, *(f"{name}.{field}" for field in one.fields())]
    return [name.replace("_", "-") for name in found]
