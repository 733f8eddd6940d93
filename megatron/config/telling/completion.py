"""Generates the scripts with which bash, zsh and fish complete flags and their values (`--completion SHELL`).

A script contains the flags, so that completing does not start Python. It works for pretrain_tape.py, started directly
or with python, and for the scripts in examples/.
"""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from megatron.config import Config
from megatron.config.declaration import can_be_off, flag_name, is_switch
from megatron.config.reading.megatron_flags import ALWAYS_SO
from megatron.config.reading.sources import Sources
from megatron.config.telling.help import first_words

SHELLS = ("bash", "zsh", "fish")
_PROGRAMS = ("pretrain_tape.py", "proteinlm-pretrain", "continue_esm2.sh", *(f"pretrain_{name}.sh" for name in (
    "tape", "tape_distributed", "tape_mpirun", "tape_slurm", "proteinlm_200m", "proteinlm_3b")))
_STARTED_BY = ("python", "python3", "bash")


@dataclass(frozen=True)
class _Flag:
    """A flag for completion. `kind` of its value: switch (none), choice, file, folder, prefix, or value (anything)."""

    names: tuple[str, ...]
    help: str
    kind: str
    choices: tuple[str, ...] = ()
    takes_many: bool = False


def completion(shell: str) -> str:
    """The completion script for one of SHELLS, to be evaluated when the shell starts."""
    scripts: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return scripts[shell]()


def _flags() -> Iterator[_Flag]:
    """All flags that are not hidden."""
    for section in (Sources(), *(section for _, section in Config().sections())):
        for item in (item for item in fields(section) if not item.metadata["is_hidden"]):
            meta, name = item.metadata, flag_name(item)
            text = first_words(item)
            if is_switch(item):
                yield _Flag((name, *meta["aliases"]), text, "switch")
                if can_be_off(item):
                    yield _Flag((f"--no-{name.removeprefix('--')}",), f"not: {text}", "switch")
                continue
            choices = tuple(map(str, meta["choices"] or ()))
            yield _Flag((name, *meta["aliases"]), text, "choice" if choices else meta["path"] or "value", choices,
                        meta["nargs"] is not None)
    yield from (_Flag((name,), reason, "switch") for name, reason in ALWAYS_SO.items())
    yield _Flag(("--help",), "the commonest flags", "switch")
    yield _Flag(("--help-all",), "all flags", "switch")
    yield _Flag(("--completion",), "a script with which the shell completes flags", "choice", SHELLS)


_BASH = r"""# Completion of pretrain_tape.py: eval "$(python pretrain_tape.py --completion bash)"
_pretrain_tape() {
    local word current=$2 flag="" words="" is_ours="" i
    local -i num_values=0
    COMPREPLY=()
    for ((i = 0; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case ${word##*/} in
            @programs@) is_ours=yes ;;
            --*) flag=$word num_values=0 ;;
            =) ;;
            *) num_values+=1 ;;
        esac
    done
    if [ -z "$is_ours" ]; then return; fi
    compopt +o default +o bashdefault 2>/dev/null
    if [ "$current" = "=" ]; then current=""; fi
    if [[ $current != -* ]]; then
        case $flag in
            @many@) ;;
            *) if ((num_values)); then flag=""; fi ;;
        esac
        case $flag in
@cases@
        esac
    fi
    if [ -z "$words" ]; then words="@flags@"; fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}
complete -o default -o bashdefault -F _pretrain_tape @commands@
"""
_BASH_PATHS = {"file": 'compgen -f -- "$current"', "folder": 'compgen -d -- "$current"',
               "prefix": "compgen -d -- \"$current\"; compgen -f -X '!*.idx' -- \"$current\" | sed 's/\\.idx$//'"}


def _bash() -> str:
    flags = list(_flags())
    cases = [f'            {_either(flag)}) words="{" ".join(flag.choices)}" ;;' for flag in flags
             if flag.kind == "choice"]
    for kind, command in _BASH_PATHS.items():
        names = "|".join(_either(flag) for flag in flags if flag.kind == kind)
        cases += [f"            {names})", "                compopt -o filenames 2>/dev/null",
                  f"                mapfile -t COMPREPLY < <({command})",
                  "                return", "                ;;"]
    cases += [f"            {'|'.join(_either(flag) for flag in flags if flag.kind == 'value')}) return ;;"]
    return _put(_BASH, programs="|".join(_PROGRAMS), many="|".join(_either(flag) for flag in flags if flag.takes_many),
                cases="\n".join(cases), flags=" ".join(flag.names[0] for flag in flags),
                commands=" ".join((*_STARTED_BY, *_PROGRAMS)))


_ZSH = r"""#compdef @programs@
# Completion of pretrain_tape.py: eval "$(python pretrain_tape.py --completion zsh)", behind compinit
_pretrain_tape() {
    _arguments \
@arguments@
}
if [[ ${funcstack[1]} == _pretrain_tape ]]; then
    _pretrain_tape "$@"
else
    compdef _pretrain_tape @programs@
fi
"""
_ZSH_VALUES = {"file": "_files", "folder": "_files -/", "prefix": "_files", "value": " "}


def _zsh() -> str:
    lines = []
    for flag in _flags():
        text = "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in flag.help)
        value = f"({' '.join(flag.choices)})" if flag.choices else _ZSH_VALUES.get(flag.kind, "")
        behind = "" if flag.kind == "switch" else f":{'*--*:' if flag.takes_many else ''}{flag.kind}:{value}"
        lines += [f"        {shlex.quote(f'{name}[{text}]{behind}')}" for name in flag.names]
    return _put(_ZSH, programs=" ".join(_PROGRAMS), arguments=" \\\n".join(lines))


_FISH = r"""# Completion of pretrain_tape.py: python pretrain_tape.py --completion fish | source
function __pretrain_tape_is_run
    string match -qr '(^|/)(@programs@)$' -- (commandline -opc)
end
for program in @commands@
@lines@
end
"""
_FISH_VALUES = {"switch": "", "file": " -rF", "folder": " -xa '(__fish_complete_directories)'", "prefix": " -rF",
                "value": " -x"}


def _fish() -> str:
    lines = []
    for flag in _flags():
        text = flag.help.replace("\\", "\\\\").replace("'", "\\'")
        value = f" -xa '{' '.join(flag.choices)}'" if flag.choices else _FISH_VALUES[flag.kind]
        names = " ".join(f"-l {name.removeprefix('--')}" for name in flag.names)
        lines.append(f"    complete -c $program -n __pretrain_tape_is_run {names}{value} -d '{text}'")
    return _put(_FISH, programs="|".join(_PROGRAMS).replace(".", r"\."), commands=" ".join((*_STARTED_BY, *_PROGRAMS)),
                lines="\n".join(lines))


def _either(flag: _Flag) -> str:
    """The flag's names as a shell pattern of alternatives."""
    return "|".join(flag.names)


def _put(script: str, **parts: str) -> str:
    """The script with each @name@ replaced."""
    for name, part in parts.items():
        script = script.replace(f"@{name}@", part)
    return script
