"""The project installed from a wheel: its commands work without a checkout.

The C++ helpers, which take a minute to build, are left out.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = 'raise ImportError("as if it were not here")\n'


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What a wheel holds, in a folder of its own."""
    root = tmp_path_factory.mktemp("installed")
    source, place = root / "source", root / "place"
    for name in ("megatron", "tools", "protein_tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pretrain_tape.py", "setup.py", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    (root / "stubs").mkdir()
    (root / "stubs" / "pybind11.py").write_text(WITHOUT)
    subprocess.run([sys.executable, *"-m pip wheel -q --no-deps --no-build-isolation -w".split(), root, source],
                   check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(root / "stubs")})
    [wheel] = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    return place


def commands(place: Path) -> dict[str, EntryPoint]:
    [metadata] = place.glob("*.dist-info")
    return {entry.name: entry for entry in PathDistribution(metadata).entry_points if entry.group == "console_scripts"}


def run(python: str, place: Path, folder: Path, command: str, *flags: object) -> subprocess.CompletedProcess:
    """The command as the script that pip makes of it does."""
    entry = commands(place)[command]
    text = f"import sys; sys.argv[0] = {command!r}; from {entry.module} import {entry.attr} as run; sys.exit(run())"
    return subprocess.run([python, "-c", text, *map(str, flags)], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"})


def test_there_is_a_command_for_each_program(installed):
    names = {path.stem.replace("_", "-") for path in (ROOT / "tools").glob("*.py")} - {"preprocess-data"}
    assert {f"proteinlm-{name}" for name in names | {"pretrain", "preprocess"}} == commands(installed).keys()


@pytest.mark.table
def test_the_doctor_examines_what_is_installed(installed, tmp_path, python):
    done = run(python, installed, tmp_path, "proteinlm-doctor", "--save", tmp_path)
    assert "could not be found out" not in done.stdout, done.stdout
    assert "needed and there: torch " in done.stdout and "_packing is not built" in done.stdout


def test_commands_take_proteins_from_a_file_to_a_model_and_to_embeddings(installed, tmp_path, python):
    (tmp_path / "mine.fasta").write_text("".join(f">p{number}\n{'MKTAYIAKQR' * 3}\n" for number in range(40)))
    done = [
        run(python, installed, tmp_path, "proteinlm-preprocess", "--input", "mine.fasta", "--output-prefix", "mine"),
        run(python, installed, tmp_path, "proteinlm-pretrain", "--preset", "demo", "--num-layers", 1, "--hidden-size",
            32, "--num-attention-heads", 2, "--train-iters", 2, "--data-path", "mine_text_document", "--save", "run",
            "--load", "run", "--peak-tflops", 1, "--no-bf16", "--num-workers", 0),
        run(python, installed, tmp_path, "proteinlm-embed", "run", "mine.fasta", "mine.npz")]
    assert [one.returncode for one in done] == [0, 0, 0], "".join(one.stderr for one in done)
    assert (tmp_path / "mine.npz").exists()


def test_the_commands_of_an_editable_installation_are_the_checkouts_files(tmp_path, python):
    text = "import sys; sys.argv[0] = 'proteinlm-inspect-checkpoint'; from megatron.console import run; run()"
    done = subprocess.run([python, "-c", text, "--help"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: inspect_checkpoint.py")


def test_a_mistake_ends_a_command_with_status_2(installed, tmp_path, python):
    done = run(python, installed, tmp_path, "proteinlm-pretrain", "--preset", "demmo")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
