"""Every command in the bash blocks of README.md and docs/ runs, in a copy of the checkout, in the order given there.

The commands of docs/ are marked `table`: `bash tests/run.sh -m table` runs them. To keep this quick, pretraining gets
extra flags for a tiny model and few steps, the command that runs the tests only lists those of one file, and `python`
has loaded torch already and draws the pictures of the first runs alone (`tests/warm_python.py`).
"""

import gzip
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpoint.convert.families import hf
from tests.families import ESM2
from tests.megatron_files import write_original
from tests.structure_files import mmcif, pdb
from tests.transformers_models import trained_here

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".git", ".venv", "build", "_build", "generated", "runs", ".*_cache", ".hypothesis", "__pycache__",
              "*.egg-info")

TINY = ("--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 256 --max-position-embeddings 256 "
        "--micro-batch-size 2 --train-iters 4 --eval-iters 1 --log-interval 2 --num-workers 0 --peak-tflops 1 "
        "--no-bf16")  # not measured, as --precision auto is
# What is put behind a command that matches.
QUICK = [(re.compile(r"--load (proteinlm-200m|esm2_t6_8M_UR50D)"),
          "--seq-length 12 --global-batch-size 2 --train-iters 2"),
         (re.compile(r"\bcontinue_esm2\.sh\b"), "--seq-length 128 --train-samples 16 --eval-iters 1 --num-workers 0"),
         (re.compile(r"\bpretrain_tape\w*\.(sh|py)\b|\btools/sweep\.py\b"), TINY),
         (re.compile(r"--fit structures/"), "--fit-c 10"),  # of heads that have learnt nothing some count all the same
         (re.compile(r"\btests/run\.sh\b"), "--collect-only --numprocesses 0 tests/unit/test_vocab.py")]


def bash_blocks(markdown: str) -> list[list[str]]:
    """The commands of each fenced bash block, continuation lines joined, comments and empty lines left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block).splitlines() for block in blocks]
    return [[line for line in block if line.strip() and not line.startswith("#")] for block in joined]


def quick(command: str) -> str:
    """`command` with what makes it quick put behind it, before a closing `&`."""
    for pattern, addition in QUICK:
        if pattern.search(command):
            background = " &" if command.endswith("&") else ""
            return f"{command.removesuffix('&').rstrip()} {addition}{background}"
    return command


PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "configuration", "continue_pretraining", "embeddings", "evaluation", "variants", "contacts", "finetuning",
    "tutorial", "add_a_task", "read_a_checkpoint", "scaling")))
# Without a command, but such as say why no test runs them; that of the last is run by tests/golden/test_docs.py.
WITHOUT = ("add_a_flag", "api", "arithmetic", "containers", "exactness", "peers", "precision", "runs", "slurm", "index")
README, OF_DOCS = ({f"{page}, {number}: {block[0][:40]}": block for page in pages for number, block in enumerate(
    bash_blocks((ROOT / page).read_text(encoding="utf-8")))} for pages in (PAGES[:1], PAGES[1:]))


def test_every_page_is_run_or_has_no_command() -> None:
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages == {*PAGES[1:], *(f"docs/{name}.md" for name in WITHOUT)}
    for name in WITHOUT[:-1]:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert bash_blocks(text) == []
        assert "```text" not in text or re.search(r"run by\s+(them|the\s+tests)", text), f"{name} does not say why"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without what running left in it."""
    place = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("readme") / "checkout",
                                 ignore=shutil.ignore_patterns(*NOT_COPIED)))
    write_original(place / "proteinlm-200m", tensor=2)  # small ones in place of the downloads
    hf.write(trained_here(replace(ESM2, ffn_hidden_size=128), "esm", "both"), place / "esm2_t6_8M_UR50D")
    (place / "structures").mkdir()
    (place / "structures" / "1abc.cif").write_text(mmcif())
    (place / "structures" / "2xyz.pdb").write_text(pdb())
    with gzip.open(place / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        (place / "my-proteins.fasta").write_text(">" + ">".join(file.read().split(">")[1:61]))
    return place


@pytest.fixture(scope="module")
def environment(python: str) -> dict[str, str]:
    """The environment of a user whose active Python is the one that runs the tests."""
    not_a_users = "PYTHON", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PRESET"
    inherited = {key: value for key, value in os.environ.items() if key not in not_a_users}
    return inherited | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}


def test_the_readme_has_commands() -> None:
    commands = [command for block in README.values() for command in block]
    for expected in ("bash examples/pretrain_tape.sh", "bash examples/pretrain_tape_distributed.sh",
                     "bash tests/run.sh"):
        assert expected in commands
    assert any(command.startswith("python tools/preprocess_data.py") for command in commands)


def run_quickly(commands: list[str], checkout: Path, environment: dict[str, str]) -> None:
    script = "\n".join(["set -eux", *map(quick, commands)])
    result = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("name", README)
def test_the_commands_of_the_readme_run(name: str, checkout: Path, environment: dict[str, str]) -> None:
    draws = {"DRAWS": "yes"} if name == next(iter(README)) else {}
    run_quickly(README[name], checkout, environment | draws)


@pytest.fixture(scope="module")
def demo(checkout: Path, environment: dict[str, str]) -> None:
    """What the README's first commands leave, from which the pages go on."""
    if not (checkout / "runs" / "demo").exists():
        run_quickly(next(iter(README.values())), checkout, environment)


@pytest.mark.table
@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("name", OF_DOCS)
def test_the_commands_of_docs_run(name: str, checkout: Path, environment: dict[str, str]) -> None:
    run_quickly(OF_DOCS[name], checkout, environment)


def test_a_command_that_the_program_refuses_fails(checkout: Path, environment: dict[str, str]) -> None:
    result = subprocess.run(["bash", "-c", "python pretrain_tape.py --lerning-rate 1"], cwd=checkout, env=environment,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "--lerning-rate" in result.stderr


def described_paths(markdown: str) -> set[str]:
    """The paths that the map describes: a name stands two spaces further in than the folder that it lies in."""
    match = re.search(r"^```text\n(pretrain_tape\.py.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    assert match, "the README has no map"
    folders, paths = [""], set[str]()
    for line in match[1].splitlines():
        names, *_ = re.split(r"\s{2,}", line.strip())
        depth = (len(line) - len(line.lstrip())) // 2
        if depth > 3:  # a description goes on
            continue
        del folders[depth + 1:]
        paths.update(folders[depth] + name for name in names.split())
        folders.append(folders[depth] + names)
    return paths


def test_the_map_names_every_folder_and_no_other() -> None:
    described = described_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [path for path in sorted(described) if not (ROOT / path).exists()] == []
    floors = {f"{folder.relative_to(ROOT)}/" for pattern in ("*", "*/*") for folder in (ROOT / "megatron").glob(pattern)
              if (folder / "__init__.py").is_file()}
    ground = {str(file.relative_to(ROOT)) for file in (ROOT / "megatron").glob("[a-z]*.py")}
    doors = {"pretrain_tape.py", "examples/", "tools/", "protein_tools/", "megatron/", "tests/", "benchmarks/", "docs/"}
    assert described == floors | ground | doors


def test_quick_commands_keep_their_own_arguments() -> None:
    assert quick("PRESET=tape bash examples/pretrain_tape.sh --lr 1 &") == (
        f"PRESET=tape bash examples/pretrain_tape.sh --lr 1 {TINY} &")
    assert quick("bash tests/run.sh -k data") == (
        "bash tests/run.sh -k data --collect-only --numprocesses 0 tests/unit/test_vocab.py")
    assert quick("ls") == "ls"


def test_blocks_are_read_with_their_continuation_lines() -> None:
    assert bash_blocks("```bash\na \\\n  b\n# c\n\nd\n```\n```text\ne\n```\n") == [["a b", "d"]]
