"""Imports go down the project's layers only, and data and model do not import each other; read from the source."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each floor may import its own modules and those of lower floors. `data` and `model` share a height, not a floor.
HEIGHT = {"megatron.config": 0, "megatron.errors": 0, "megatron.files": 0, "megatron.log": 0,
          "megatron.plain_pickle": 0, "megatron.kernels": 1, "megatron.parallel": 2, "megatron.data": 3,
          "megatron.model": 3, "megatron.optim": 4, "megatron.checkpoint": 5, "megatron.train": 6, "megatron.infer": 6,
          "megatron.finetune": 7, "megatron.plan": 7, "megatron.study": 7, "megatron.doctor": 8, "megatron.console": 9,
          "pretrain_tape": 9, "tools": 9, "protein_tools": 9}
DOORS = ("pretrain_tape", "tools", "protein_tools")
GROUND, TOP = 0, HEIGHT["tools"]


def sources() -> list[Path]:
    """Every Python file of the program, relative to the root."""
    files = [ROOT / "pretrain_tape.py"]
    for folder in ("megatron", "tools", "protein_tools", "examples"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return [file.relative_to(ROOT) for file in files if file.exists()]


def imported_modules(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `module` imports anywhere in it; `from a import b` counts as both `a` and `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return names


def floor_of(module: str) -> str | None:
    """The floor that `module` lies on; None if it is none of ours, or the bare package `megatron`."""
    parts = module.split(".")
    if parts[0] == "megatron":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    return parts[0] if parts[0] in HEIGHT else None


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `source` that do not go down, each as a sentence."""
    home = floor_of(module)
    assert home is None or home in HEIGHT, f"{module} lies on no floor: say in HEIGHT where it belongs"
    height = HEIGHT[home] if home else TOP  # the bare package is a door
    wrong = []
    for name in sorted(imported_modules(ast.parse(source), module, is_package)):
        floor = floor_of(name)
        if floor is None or floor == home or (home in DOORS and floor in DOORS) or floor not in HEIGHT:
            continue
        if HEIGHT[floor] > height or HEIGHT[floor] == height > GROUND:
            wrong.append(f"{module} imports {name}, which is not below it")
    return wrong


def imports_at_start(source: str) -> Iterator[str]:
    """Top-level names of the packages that `source` imports when it is itself imported."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def module_name(file: Path) -> str:
    """The dotted name of a file that is relative to the root."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_import_goes_down() -> None:
    wrong = [wrong_imports((ROOT / file).read_text(), module_name(file), file.name == "__init__.py")
             for file in sources()]
    assert len(wrong) > 300 and sum(wrong, []) == []


def test_no_room_of_the_parallel_floor_imports_another() -> None:
    files = [file for file in sources() if file.parts[:2] == ("megatron", "parallel") and len(file.parts) > 3]
    rooms = {file.parts[2] for file in files}
    wrong = [f"{file} imports {name}" for file in files
             for name in imported_modules(ast.parse((ROOT / file).read_text()), module_name(file))
             for room in rooms - {file.parts[2]} if f"{name}.".startswith(f"megatron.parallel.{room}.")]
    assert {"pipeline", "tensor"} < rooms and wrong == []


def test_rooms_that_are_not_inside_each_other_can_be_read_one_after_the_other() -> None:
    """No circle of imports among folders; those of a folder and of the rooms in it do not count."""
    files = [file for file in sources() if file.parts[0] == "megatron"]
    home = {module_name(file): file.parent for file in files}
    below: dict[Path, set[Path]] = defaultdict(set)
    for file in files:
        names = imported_modules(ast.parse((ROOT / file).read_text()), module_name(file), file.name == "__init__.py")
        below[file.parent] |= {home[name] for name in names if name in home and home[name] != file.parent
                               and file.parent not in home[name].parents and home[name] not in file.parent.parents}
    assert len([*TopologicalSorter(below).static_order()]) > 30  # raises CycleError with the circle


def test_nltk_is_imported_only_inside_a_function() -> None:
    assert [str(file) for file in sources() if "nltk" in imports_at_start((ROOT / file).read_text())] == []


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """What a process has loaded that has imported every door but the planner of layouts, and then what it has with it.
    """
    doors = [module_name(file) for file in sources() if file.parent in (Path(), Path("tools"))]
    doors.remove("tools.plan_layout")
    assert len(doors) > 10
    code = ("import importlib, sys\nfor door in sys.argv[1:]: importlib.import_module(door)\nprint(*sys.modules)\n"
            "import tools.plan_layout\nprint(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *doors], cwd=ROOT, capture_output=True, text=True, check=True)
    return [{*line.split()} for line in done.stdout.splitlines()]


def test_no_door_imports_at_start_what_takes_long_and_only_some_runs_need(loaded: list[set[str]]) -> None:
    """torch._dynamo takes as long as torch itself, torch.distributed.checkpoint two thirds of that, matplotlib a
    quarter."""
    slow = {"torch._dynamo", "torch.distributed.checkpoint", "matplotlib", "transformers"}
    assert "torch" in loaded[1] and loaded[1] & slow == set()


def test_only_what_plans_a_layout_imports_at_start_what_shares_tensors_out(loaded: list[set[str]]) -> None:
    """torch.distributed.tensor brings sympy along."""
    assert "torch" in loaded[0] and "torch.distributed.tensor" not in loaded[0]


@pytest.mark.parametrize(("module", "source"), [
    ("megatron.data.batches.loader", "from megatron.train.loop import run"),
    ("megatron.data.batches.loader", "import megatron.model.head"),
    ("megatron.data.batches.loader", "from megatron import model"),
    ("megatron.model.head", "def f():\n    from ..data import batch"),
    ("megatron.config", "import megatron.parallel.mesh as mesh"),
    ("megatron.train.loop", "from protein_tools import fasta2json"),
    ("megatron.kernels.attention", "from megatron.parallel import mesh"),
])
def test_an_import_that_does_not_go_down_is_found(module: str, source: str) -> None:
    assert wrong_imports(source, module)


@pytest.mark.parametrize(("module", "source"), [
    ("megatron.train.loop", "from megatron.model import head\nfrom megatron import config\nimport torch"),
    ("megatron.data.batches.loader", "from .batch import Batch\nfrom megatron.data.rows import packing"),
    ("tools.preprocess_data", "from megatron.data.corpus import indexed\nimport protein_tools.fasta2json"),
    ("megatron.config.command_line", "from megatron.config import Config\nfrom megatron import errors"),
])
def test_an_import_that_goes_down_is_allowed(module: str, source: str) -> None:
    assert wrong_imports(source, module) == []


def test_a_guarded_import_at_module_level_counts_as_one_at_start() -> None:
    assert list(imports_at_start("try:\n    import nltk.tokenize\nexcept ImportError:\n    pass")) == ["nltk"]
    assert list(imports_at_start("def f():\n    import nltk")) == []


def test_a_module_on_no_floor_is_refused() -> None:
    with pytest.raises(AssertionError, match="lies on no floor"):
        wrong_imports("import torch", "megatron.misc.things")


def test_the_readmes_map_lists_the_floors_from_the_highest_to_the_lowest() -> None:
    _, _, text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\nmegatron/\n")
    listed = re.findall(r"(?m)^  (\w+)/ ", text.partition("imports only from those further down")[0])
    heights = [HEIGHT[f"megatron.{name}"] for name in listed]
    assert len(listed) > 10 and heights == sorted(heights, reverse=True)


@pytest.mark.parametrize("file", sorted((ROOT / "megatron").glob("*/**/__init__.py")),
                         ids=lambda file: ".".join(file.relative_to(ROOT).parts[1:-1]))
def test_a_folder_names_each_module_and_room_that_is_there_and_no_other(file: Path) -> None:
    """As `module` and `room/`; what a docstring names besides is written otherwise: `function()`, `Class`, "value"."""
    named = re.findall(r"`([a-z]\w*/?)`", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
    modules = {path.stem for path in file.parent.glob("*.py")}
    rooms = {f"{path.parent.name}/" for path in file.parent.glob("*/*.*")}
    assert {*named} == {name for name in modules | rooms if not name.startswith(("_", "."))}


def test_no_two_classes_of_the_program_have_one_name():
    """What is written beside other programs' checkpoints stands alone there, and may say Attention as we do."""
    homes = defaultdict[str, list[str]](list)
    for source in sources():
        if "remote" not in source.parts:
            for node in ast.walk(ast.parse((ROOT / source).read_text())):
                if isinstance(node, ast.ClassDef):
                    homes[node.name].append(str(source))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {} and "Attention" in homes
