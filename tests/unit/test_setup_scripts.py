"""`examples/setup.sh`, with a stand-in for Python that records what pip is asked for and installs nothing.

Also: what the example scripts and requirements say agrees with the code that decides it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from megatron.config.command_line import parse
from megatron.config.reading.presets import PRESETS
from megatron.parallel.layout import check_layout
from megatron.train.state import BatchSizes
from tests.programs import find_program

ROOT = Path(__file__).resolve().parents[2]

# The scripts may use these and nothing else: slim images have no procps, util-linux or diffutils.
COREUTILS = "cat chmod cp cut date dirname env head mkdir mktemp mv nproc rm sleep sort tail touch tr wc".split()
# Answers as a Python without packages would; its `-m venv` puts a copy of itself into the environment.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
    *sys.executable*) [ -z "${{TOO_OLD-}}" ] && echo "$0" ;;
    "- run" | "- tests") exit 1 ;;
    *ensurepip*) [ -z "${{NO_VENV-}}" ] ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install "*) echo "${{@: -1}}" >>"$PIP_LOG"; sleep "${{PIP_SECONDS:-0}}"; [ -z "${{PIP_FAILS-}}" ] ;;
    *"import pip"*) true ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of what setting up reads, with stand-ins for every name that Python goes by."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # the space must do no harm
        self.pip_log = folder / "pip.log"
        for name in ("examples/setup.sh", "requirements.txt", "setup.py", "tests/requirements.txt"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name in ("data/rows/_packing", "kernels/attention/_packed_attention", "kernels/pointwise/_pointwise"):
            helper = self.root / "megatron" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            helper.parent.mkdir(parents=True)
            helper.touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python", "python3", "python3.10", "python3.11", "python3.12", "python3.13"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)
        for name in ("bash", *COREUTILS):
            (self.bin / name).symlink_to(str(shutil.which(name)))

    def start(self, what: str = "run", **environment: str) -> "subprocess.Popen[str]":
        """Sources setup.sh to run or for the tests, or starts a script of the checkout."""
        source = f'set -euo pipefail; source "{self.root}/examples/setup.sh" {what}; echo "python=$python"'
        inherited = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/"),
                     "PIP_LOG": str(self.pip_log)}
        command = ["bash", str(self.root / what)] if what.endswith(".sh") else ["bash", "-c", source]
        return subprocess.Popen(command, env=inherited | environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def set_up(self, purpose: str = "run", **environment: str) -> tuple[int, str, str]:
        process = self.start(purpose, **environment)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def pip_installs(self) -> list[str]:
        """The last argument of each pip install since the last call."""
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        self.pip_log.unlink(missing_ok=True)
        return [line.removeprefix(str(self.root)).lstrip("/") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_active_python_that_has_everything_is_used_as_it_is(checkout: Checkout) -> None:
    status, stdout, stderr = checkout.set_up(PYTHON=sys.executable)
    assert (status, stderr, stdout) == (0, "", f"python={sys.executable}\n")
    assert not (checkout.root / ".venv").exists()


def test_otherwise_an_environment_gets_the_requirements_and_the_project_once(checkout: Checkout) -> None:
    status, stdout, stderr = checkout.set_up()
    assert (status, stderr) == (0, "")
    assert f"python={checkout.root}/.venv/bin/python" in stdout
    assert checkout.pip_installs() == ["requirements.txt", ""]  # "" is the checkout itself
    assert checkout.set_up()[1] == f"python={checkout.root}/.venv/bin/python\n"
    assert checkout.pip_installs() == []


def test_the_tests_add_their_own_requirements(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.pip_installs()
    checkout.set_up("tests")
    assert checkout.pip_installs() == ["tests/requirements.txt"]


def test_changed_requirements_are_installed(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.pip_installs()
    with (checkout.root / "requirements.txt").open("a") as requirements:
        requirements.write("lmdb==3.0.0\n")
    checkout.set_up()
    assert checkout.pip_installs() == ["requirements.txt"]


def test_an_update_that_fails_leaves_the_environment_that_jobs_may_run_from(checkout: Checkout) -> None:
    checkout.set_up()
    used = checkout.root / ".venv" / "used"
    used.touch()
    with (checkout.root / "requirements.txt").open("a") as requirements:
        requirements.write("lmdb==3.0.0\n")
    assert checkout.set_up(PIP_FAILS="yes")[0] == 2
    checkout.pip_installs()
    assert checkout.set_up()[0] == 0
    assert used.exists() and checkout.pip_installs() == ["requirements.txt"]


def test_an_interrupted_setup_is_started_afresh(checkout: Checkout) -> None:
    status, _, stderr = checkout.set_up(PIP_FAILS="yes")
    assert status == 2
    assert stderr.startswith("error: requirements.txt could not be installed")
    checkout.pip_installs()
    half_installed = checkout.root / ".venv" / "half-installed"
    half_installed.touch()
    status, stdout, _ = checkout.set_up()
    assert status == 0
    assert "starting it afresh" in stdout
    assert not half_installed.exists()
    assert checkout.pip_installs() == ["requirements.txt", ""]


def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    both = [checkout.start(PIP_SECONDS="0.2") for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert checkout.pip_installs() == ["requirements.txt", ""]
    assert sum("waiting for another setup" in output for output in outputs) == 1


def test_too_old_a_python_is_refused_in_one_line(checkout: Checkout) -> None:
    status, _, stderr = checkout.set_up(TOO_OLD="yes")
    assert status == 2
    assert stderr.startswith("error: Python 3.10 or newer is needed")
    assert stderr.count("\n") == 1


def test_a_python_without_venv_says_what_to_install(checkout: Checkout) -> None:
    status, _, stderr = checkout.set_up(NO_VENV="yes")
    assert status == 2
    assert "apt install python3-venv" in stderr
    assert not (checkout.root / ".venv").exists()


def test_without_a_compiler_the_setup_goes_on_and_says_so(checkout: Checkout) -> None:
    for helper in (checkout.root / "megatron" / "data" / "rows").iterdir():
        helper.unlink()
    (checkout.root / "megatron" / "data" / "rows" / "packing.cpp").touch()
    status, stdout, _ = checkout.set_up(PYTHON=sys.executable, CXX="no-such-compiler")
    assert status == 0
    assert "no C++ helpers (no C++ compiler); their Python twins do the same work" in stdout


def requirement_names(file: str) -> set[str]:
    """What a requirements file lists, without versions and markers."""
    lines = (ROOT / file).read_text().splitlines()
    return {re.split(r"[=<> ;]", line)[0] for line in lines if line and line[0] not in "#-"}


def setup_names(variable: str) -> set[str]:
    """The package names in a list, or in the lists of a dict, of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == variable:
            value = ast.literal_eval(node.value)
            ranges = value if isinstance(value, list) else [item for extra in value.values() for item in extra]
            return {item.split(">=")[0] for item in ranges}
    raise AssertionError(f"setup.py has no {variable}")


def looked_for() -> tuple[set[str], set[str]]:
    """What setup.sh wants of an active Python: to run, and in addition to test."""
    lists = re.findall(r"needed \+?= (\[[^]]*\])", (ROOT / "examples" / "setup.sh").read_text())
    to_run, to_test = (set(ast.literal_eval(item)) for item in lists)
    packages = {"xdist": "pytest-xdist", "sklearn": "scikit-learn"}
    return to_run, {packages.get(name, name.replace("_", "-")) for name in to_test}


def test_an_active_python_needs_what_setup_py_requires() -> None:
    assert looked_for()[0] == setup_names("REQUIRED")


def test_what_setup_py_names_is_pinned_for_the_tests() -> None:
    pinned = requirement_names("requirements.txt") | requirement_names("tests/requirements.txt")
    assert setup_names("REQUIRED") <= requirement_names("requirements.txt")
    assert setup_names("EXTRAS") | looked_for()[1] <= pinned


@pytest.mark.parametrize("preset", ["tape", "proteinlm-200m", "proteinlm-3b"])
def test_the_hyperparameters_that_the_script_shows_are_those_of_the_presets(preset: str) -> None:
    head = (ROOT / "examples" / "pretrain_tape.sh").read_text().split("set -euo")[0]
    shown = dict(re.findall(r"--([a-z0-9-]+) (\S+)", " ".join(re.findall(r"^# {5}(--.*)$", head, re.MULTILINE))))
    assert len(shown) >= 17
    decided = {name: PRESETS[preset][name.replace("-", "_")] for name in shown}
    assert decided == {name: type(decided[name])(value) for name, value in shown.items()}


@pytest.mark.parametrize(("script", "ranks"), [("200m", (1, 8, 16, 32)), ("3b", (4, 8, 16, 32, 64))])
def test_the_layouts_of_the_published_models_fit_them_on_whole_machines(script: str, ranks: tuple[int, ...]) -> None:
    text = (ROOT / "examples" / f"pretrain_proteinlm_{script}.sh").read_text()
    flags = text.split('pretrain_tape_distributed.sh"')[1].replace("\\\n", "").replace('"$@"', "").split()
    assert f"PRESET=proteinlm-{script}" in text
    config, _ = parse(["--preset", f"proteinlm-{script}", *flags])
    for num_ranks in ranks:
        check_layout(config, num_ranks)
        BatchSizes(config.training, num_ranks // config.parallel.tensor_model_parallel_size)


REFUSED = [
    ("distributed", {"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE is 'two'; set it to a whole number from 1 to 999"),
    ("distributed", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is '0'"), ("distributed", {"NNODES": ""}, "NNODES is ''"),
    ("distributed", {"NODE_RANK": "x"}, "NODE_RANK is 'x'"),
    ("distributed", {"NNODES": "08", "NODE_RANK": "8"}, "NODE_RANK is '8'; set it to a whole number from 0 to 7"),
    ("distributed", {"NNODES": "4:2"}, "LEAST_NNODES is '4'; set it to a whole number from 1 to 2"),
    ("distributed", {"NNODES": "2:a[$(touch here)]"}, "NNODES is 'a[$(touch here)]'"),
    ("distributed", {"NNODES": "a[$(touch here)]"}, "NNODES is 'a[$(touch here)]'"),
    ("distributed", {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; set it to a whole number from 1 to 65535"),
    ("distributed", {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS is '-1'"),
    ("mpirun", {"PROCESSES": "all"}, "PROCESSES is 'all'"),
    ("slurm", {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"), ("", {"OMP_NUM_THREADS": "few"}, "OMP_NUM_THREADS is"),
    ("distributed", {"PYTHON": "/no/python"}, "PYTHON is '/no/python', which is no Python 3.10 or newer")]


@pytest.mark.parametrize(("script", "given", "said"), REFUSED, ids=[" ".join(given) for _, given, _ in REFUSED])
def test_a_script_refuses_in_one_line_before_it_sets_up(tmp_path: Path, script: str, given: dict, said: str) -> None:
    path = ROOT / "examples" / f"pretrain_tape{'_' if script else ''}{script}.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/no/python"} | given
    result = subprocess.run(["bash", path], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


CONTINUED = [
    ([], {}, "say what to go on from, on what and where to: bash examples/continue_esm2.sh MODEL PROTEINS OUT_FOLDER"),
    (["model", "proteins", "--lr"], {}, "say what to go on from"),
    (["nowhere", "proteins", "out"], {}, "MODEL nowhere does not exist; give a folder of transformers"),
    (["model", "nowhere", "out"], {}, "PROTEINS nowhere does not exist; give a file of proteins, such as FASTA"),
    (["model", "proteins", "out"], {"OLD_PROTEINS": "nowhere"}, "OLD_PROTEINS nowhere does not exist"),
    (["model", "proteins", "out"], {"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE is 'all'"),
    (["model", "proteins", "out"], {}, "PYTHON is '/no/python'")]


@pytest.mark.parametrize(("arguments", "given", "said"), CONTINUED)
def test_continuing_refuses_in_one_line_before_it_sets_up(tmp_path: Path, arguments: list, given: dict,
                                                          said: str) -> None:
    for name in ("model", "proteins"):
        (tmp_path / name).touch()
    result = subprocess.run(["bash", ROOT / "examples" / "continue_esm2.sh", *arguments], cwd=tmp_path, text=True,
                            env={"PATH": "/usr/bin:/bin", "PYTHON": "/no/python"} | given, capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "proteins"]


def test_a_request_to_stop_that_comes_while_a_script_sets_up_ends_it_with_success(checkout: Checkout) -> None:
    for name in ("starting.sh", "pretraining.sh", "pretrain_tape_distributed.sh"):
        shutil.copy(ROOT / "examples" / name, checkout.root / "examples" / name)
    process = checkout.start("examples/pretrain_tape_distributed.sh", PIP_SECONDS="0.3")
    while not checkout.pip_log.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert process.returncode == 0


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [*sorted(map(str, ROOT.glob("*/*.sh"))), str(ROOT / ".ci" / "run")]
    # SC2154: it does not see that setup.sh sets root and python.
    command = [find_program("shellcheck"), "-x", "--source-path=SCRIPTDIR", "--exclude=SC2154", *scripts]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
