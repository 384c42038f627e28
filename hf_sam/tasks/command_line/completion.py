"""Print a completion script for bash; put eval "$(hf-sam completion bash)" in ~/.bashrc."""

from __future__ import annotations

from collections.abc import Sequence

from .config_files import shipped_configs
from .early import arguments_of
from .launching import LAUNCH_OPTIONS
from .parsers import PARSERS, Parser

SCRIPT = """\
_hf_sam() {
    local word="${COMP_WORDS[COMP_CWORD]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="%(subcommands)s"
    else
        case "${COMP_WORDS[1]}" in
%(cases)s
        esac
        [ "${COMP_WORDS[COMP_CWORD-1]}" = "--accelerate_config" ] && words="%(accelerate)s"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word") $([ "$COMP_CWORD" -gt 1 ] && compgen -f -- "$word"))
}
complete -F _hf_sam hf-sam
"""


def main(argv: Sequence[str]) -> None:
    parser = Parser("completion", description=__doc__)
    parser.add_argument("shell", choices=["bash"], help="For zsh, run `autoload bashcompinit; bashcompinit` first.")
    parser.parse_args(argv)
    print(script(), end="")


def script() -> str:
    """Return the script: the subcommands, and the options and shipped configurations of each."""
    from .subcommands import SUBCOMMANDS

    shipped = list(shipped_configs())
    cases = []
    for name, subcommand in SUBCOMMANDS.items():
        words = [f"--{option}" for option in _options(subcommand.task)]
        words += [f"--{option}" for option in LAUNCH_OPTIONS if subcommand.launches]
        folder = {"compare": "comparison", "configs": ""}.get(name, f"{subcommand.task}/")
        words += [config for config in shipped if config.startswith(folder)]
        cases.append(f'            {name}) words="{" ".join(words)}" ;;')
    accelerate = [config.removeprefix("accelerate/") for config in shipped if config.startswith("accelerate/")]
    return SCRIPT % {
        "subcommands": " ".join(SUBCOMMANDS),
        "cases": "\n".join(cases),
        "accelerate": " ".join(accelerate),
    }


def _options(task: str | None) -> list[str]:
    if task in PARSERS:
        return [action.dest for action in PARSERS[task]()._actions if action.option_strings]
    try:
        return ["help", *arguments_of(task)]
    except LookupError:
        return ["help"]
