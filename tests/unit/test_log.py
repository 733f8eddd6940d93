"""Output to terminals: what they cannot write is escaped, and a missing package is named, by every program.

Without a terminal, lines report progress; Ctrl-C gives one line.
"""

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import log
from megatron.config import ParallelConfig
from megatron.log import STOPPED, Log, exit_status, number_of, take_any_text
from megatron.parallel import program

ROOT = Path(__file__).resolve().parents[2]
NAME = "prot\udce9ines"  # what Python makes of a Latin-1 name


DOORS = {"tools/preprocess_data.py": ["--input", NAME, "--output-prefix", "x"],
         "tools/plan_layout.py": ["--gpus", "1", "--gpu", "h100-80gb", f"--{NAME}"],
         "protein_tools/fasta2json.py": [NAME, "x"], "protein_tools/lmdb2json.py": [NAME, "x"],
         "tools/convert_checkpoint.py": ["--load-dir", NAME, "--save-dir", "x", "--saver", "whole"],
         "tools/merge_mp_partitions.py": ["--model-type", "BERT", "--load", NAME],
         "tools/continued_flags.py": [NAME, "x", "y"], "tools/compare_runs.py": [NAME],
         "tools/sweep.py": ["--output", "x", "--vary", NAME, "1"],
         "tools/inspect_checkpoint.py": ["x", f"--{NAME}"], "tools/embed.py": [NAME, "x", "y"],
         "tools/evaluate.py": [NAME, "--on", "x"], "tools/score_variants.py": [NAME, "x", "y"],
         "tools/predict_contacts.py": [NAME, "--input", "x", "--output", "y.npz"],
         "tools/merge_datasets.py": ["--input", NAME, "--output-prefix", "x"],
         "tools/watch.py": [NAME], "tools/doctor.py": [f"--{NAME}"], "tools/finetune.py": ["own", f"--{NAME}"],
         "pretrain_tape.py": [f"--{NAME}"]}


def ascii_stream(monkeypatch, name: str) -> io.BytesIO:
    """What is written on `sys.stdout` or `sys.stderr`, which raises for all that is not ASCII."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "ascii", "strict", write_through=True))
    return written


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    written = ascii_stream(monkeypatch, "stdout")
    take_any_text()
    print(f"{NAME} é")
    assert written.getvalue() == b"prot\\udce9ines \\xe9\n"


def test_streams_that_are_no_text_files_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    take_any_text()
    print(NAME)


def test_where_home_cannot_be_written_matplotlib_says_nothing():
    drawn = "from megatron.log import exit_status; exit_status(lambda: print(__import__('matplotlib').get_cachedir()))"
    environment = {name: value for name, value in os.environ.items() if name not in (
        "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")} | {"HOME": os.devnull, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", drawn], text=True, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "matplotlib-" in done.stdout


def test_without_a_terminal_lines_tell_how_far_work_is(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 12.0, 13.0, 31.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    bar = Log().progress(total=2000, done=0, unit="protein", label="mine")
    for _ in range(4):
        bar.update(400)
    bar.close()
    assert capsys.readouterr().out == ("mine: 800 of 2,000 proteins, 18 s left\n"
                                       "mine: 1,600 of 2,000 proteins, 7.8 s left\n")


@pytest.mark.parametrize("flags", [{"is_speaker": False}, {"has_own_lines": True}])
def test_no_line_comes_twice(monkeypatch, capsys, flags):
    monkeypatch.setattr(log, "LINE_EVERY_S", 0.0)
    Log(flags.pop("is_speaker", True)).progress(2000, 0, "protein", "mine", **flags).update(400)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("door", DOORS)
def test_every_door_names_a_path_that_is_no_text(monkeypatch, door):
    written = ascii_stream(monkeypatch, "stderr")
    monkeypatch.setattr(sys, "argv", [door, *DOORS[door]])
    spec = importlib.util.spec_from_file_location("door", ROOT / door)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {"protein_tools": ("fasta", ""), **{taking: (DOORS[taking],) for taking in (
        "pretrain_tape.py", "tools/plan_layout.py", "tools/compare_runs.py", "tools/sweep.py", "tools/watch.py")}}
    assert module.main(*given.get(door, given.get(Path(door).parts[0], ()))) == 2  # others take theirs themselves
    assert b"prot\\udce9ines" in written.getvalue()


def test_one_of_a_thing_is_not_said_as_several():
    assert [number_of(count, "row") for count in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]


def test_every_door_is_tried_here():
    doors = [ROOT / "pretrain_tape.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "protein_tools").glob("*.py")]
    assert DOORS.keys() == {str(door.relative_to(ROOT)) for door in doors}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_names_a_package_that_is_not_installed(door):
    done = subprocess.run([sys.executable, "-S", ROOT / door, "--help"], capture_output=True, text=True,  # -S: none is
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    if done.returncode == 0:  # needs none to show its flags
        assert done.stdout.startswith("usage: ") and not done.stderr
    else:
        assert done.returncode == 2 and re.fullmatch("error: (torch|numpy|tqdm) is not installed in .*setup.sh.*\n",
                                                     done.stderr)


def test_what_another_program_lacks_is_its_own_affair():
    for code in ("import megatron, no_such_package",  # and who imports the package has its own way to tell
                 "import megatron, sys; sys.modules['torch'] = None; megatron.load_pretrained"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and "Traceback" in done.stderr


def test_ctrl_c_is_one_line(capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    assert exit_status(stop) == program.status_of(lambda launch: (ParallelConfig(), stop)) == 130
    assert capsys.readouterr().err == 2 * f"{STOPPED}\n"


def test_ctrl_c_while_a_program_loads_is_the_same_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run([sys.executable, ROOT / "tools" / "embed.py"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, f"{STOPPED}\n")
