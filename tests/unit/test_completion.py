"""Completion in each shell that is installed, tested in the shell itself; and the two kinds of help."""

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from megatron.config import Config
from megatron.config.command_line import parse
from megatron.config.declaration import flag_name
from megatron.config.reading.presets import PRESETS
from megatron.config.reading.sources import Sources
from megatron.config.telling.completion import SHELLS, completion

ITEMS = [item for section in (Sources(), *(section for _, section in Config().sections())) for item in fields(section)
         if not item.metadata["is_hidden"]]
ASK_BASH = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_pretrain_tape "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def by_bash(*words, cwd=None):
    """What bash offers for the last of the words."""
    script = f"set -u; {completion('bash')} {ASK_BASH}"
    result = subprocess.run(["bash", "-c", script, "bash", *words], cwd=cwd, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return [line for line in result.stdout.split("\n") if line]


def printed(*flags, monkeypatch, capsys, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as left:
        parse(flags)
    assert not left.value.code
    return capsys.readouterr().out


def test_bash_completes_the_names_of_flags():
    assert by_bash("python", "pretrain_tape.py", "--hidd") == ["--hidden-size", "--hidden-dropout"]
    assert by_bash("python", "pretrain_tape.py", "--no-swi") == ["--no-swiglu"]
    offered = by_bash("./pretrain_tape.py", "--swiglu", "--lr", "1e-3", "")
    assert {flag_name(item) for item in ITEMS} <= set(offered)
    assert {"--help", "--help-all", "--completion", "--no-save-rng"} <= set(offered)


def test_every_script_that_takes_the_flags_is_completed():
    for script in Path(__file__).parents[2].glob("examples/pretrain_*.sh"):
        assert "[any flag of pretrain_tape.py]" in script.read_text()
        assert by_bash("bash", f"examples/{script.name}", "--hidd") == ["--hidden-size", "--hidden-dropout"]


def test_bash_completes_the_choices_of_a_flag():
    for item in ITEMS:
        if choices := item.metadata["choices"]:
            assert by_bash("python3", "pretrain_tape.py", flag_name(item), "") == list(map(str, choices))
    assert by_bash("bash", "examples/pretrain_tape.sh", "--optimizer", "mu") == ["muon"]
    assert by_bash("python", "/a/pretrain_tape.py", "--seed", "1", "--optimizer", "=", "nor") == ["normuon"]
    assert by_bash("python", "/a/pretrain_tape.py", "--optimizer", "=") == ["adam", "sgd", "muon", "normuon"]


def test_bash_completes_paths_of_the_kind_that_a_flag_takes(tmp_path):
    (tmp_path / "a folder").mkdir()
    for name in ("a.bin", "a.idx", "a b.idx", "a.toml"):
        (tmp_path / name).touch()
    ask = "python", "pretrain_tape.py"
    assert by_bash(*ask, "--save", "a", cwd=tmp_path) == ["a folder"]
    assert sorted(by_bash(*ask, "--config", "a", cwd=tmp_path)) == ["a b.idx", "a folder", "a.bin", "a.idx", "a.toml"]
    assert sorted(by_bash(*ask, "--data-path", "0.5", "a", "0.5", "a", cwd=tmp_path)) == ["a", "a b", "a folder"]


def test_bash_offers_nothing_where_a_number_is_due_or_another_program_runs():
    assert by_bash("python", "pretrain_tape.py", "--lr", "") == []
    assert by_bash("python", "pretrain_tape.py", "--profile-ranks", "0", "") == []
    assert by_bash("python", "other.py", "--hidd") == []


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_flags_and_choices():
    for line, expected in (("python pretrain_tape.py --optimizer mu", ["muon"]), ("python other.py --hidd", []),
                           ("./pretrain_tape.py --hidd", ["--hidden-dropout", "--hidden-size"])):
        result = subprocess.run(["fish", "-c", f"{completion('fish')}\ncomplete -C '{line}'"], capture_output=True,
                                text=True, check=True)
        assert [row.split("\t")[0] for row in result.stdout.splitlines()] == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_the_script(shell, tmp_path, monkeypatch, capsys):
    script = printed("--completion", shell, monkeypatch=monkeypatch, capsys=capsys)
    assert all(name in script for name in PRESETS) and "@" not in script.replace('"$@"', "")
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    result = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_help_is_short_and_has_the_commonest_flags(monkeypatch, capsys):
    text = printed("--help", monkeypatch=monkeypatch, capsys=capsys)
    named = {word for word in text.split() if word.startswith("--")}
    assert named >= {flag_name(item) for item in ITEMS if item.metadata["common"]}
    assert len(text.splitlines()) < 110
    assert {"--adam-eps", "--hysteresis", "--dry-run-ranks"}.isdisjoint(named)
    assert "--help-all has all" in text and "--preset demo --data-path" in text
    assert printed("-h", monkeypatch=monkeypatch, capsys=capsys) == text


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 300])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_is_as_wide_as_the_terminal_from_80_to_120_columns(flag, columns, monkeypatch, capsys):
    longest = max(map(len, printed(flag, monkeypatch=monkeypatch, capsys=capsys, columns=columns).splitlines()))
    assert min(120, max(80, columns)) - 12 <= longest <= min(120, max(80, columns))


def test_no_help_and_no_completion_tells_of_what_is_hidden(monkeypatch, capsys):
    assert "--inject-fault" not in printed("--help-all", monkeypatch=monkeypatch, capsys=capsys)
    assert by_bash("./pretrain_tape.py", "--inject") == []


def test_all_of_help_says_every_flag_with_all_of_its_text(monkeypatch, capsys):
    words = printed("--help-all", monkeypatch=monkeypatch, capsys=capsys, columns=120).split()
    names, text = {*" ".join(words).replace(",", " ").split()}, "".join(words)  # lines are broken behind hyphens too
    for item in ITEMS:
        assert names & {flag_name(item), flag_name(item).replace("--", "--[no-]", 1)}
        assert "".join(item.metadata["help"].split()) in text, item.name
