"""Sphinx builds the documentation offline without a warning; the flags, files and links that it names exist."""

import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron.config import Config
from megatron.config.declaration import flag_name
from tests.golden.test_readme_commands import bash_blocks
from tests.unit.test_imports_go_down import HEIGHT

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BUILT = ("docs/_build", "docs/generated")
# Flags of other programs that the pages name: docker, apptainer, sbatch and srun, scancel, torchrun, Megatron-LM.
FOREIGN = set("--build-arg --ipc --nv --rm --user --nodes --ntasks-per-node --partition --requeue --signal --time "
              "--nproc-per-node --max-restarts --spec".split())
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of pages that the command of docs/index.md makes in a copy of docs beside links to all else."""
    pytest.importorskip("sphinx")
    place = tmp_path_factory.mktemp("docs")
    for path in ROOT.iterdir():
        if path.name == "docs":
            shutil.copytree(path, place / "docs", ignore=shutil.ignore_patterns("_build", "generated", "__pycache__"))
        elif not path.name.startswith(".") and path.name != "runs":
            (place / path.name).symlink_to(path)
    [[command]] = bash_blocks((DOCS / "index.md").read_text(encoding="utf-8"))
    python, *words = shlex.split(command)
    assert python == "python"
    result = subprocess.run([sys.executable, *words], cwd=place, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return place / "docs" / "_build" / "html"


def test_the_reference_has_every_flag(built: Path) -> None:
    page = (built / "generated" / "flags.html").read_text(encoding="utf-8")
    names = {word.replace("--[no-]", "--") for word in re.findall(r'class="pre">(--[^<]+)<', page)}
    items = [item for _, section in Config().sections() for item in fields(section) if not item.metadata["is_hidden"]]
    assert {flag_name(item) for item in items} <= names
    assert "--inject-fault" not in names


def test_pages_name_no_flag_that_is_not_there(built: Path) -> None:
    reference = "".join((built.parents[1] / "generated" / f"{name}.md").read_text(encoding="utf-8")
                        for name in ("flags", "tools"))
    known = set(FLAG.findall(reference.replace("--[no-]", "--")))
    known |= {f"--no-{name[2:]}" for name in known} | FOREIGN
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        assert set(FLAG.findall(page.read_text(encoding="utf-8"))) - known == set(), page.name


def test_no_text_has_what_a_merge_left() -> None:
    pages = [path for pattern in ("*.md", "docs/*", "examples/**/*", "benchmarks/*", "protein_tools/*")
             for path in ROOT.glob(pattern) if path.suffix in {".md", ".sh", ".txt", ".jsonl", ".toml", ".yaml"}]
    assert len(pages) > 30
    for page in pages:
        assert not re.search(r"^(<<<<<<<|>>>>>>>) ", page.read_text(encoding="utf-8"), re.MULTILINE), page


def test_every_tool_tells_its_flags_in_the_reference(built: Path) -> None:
    pages = [(built / "generated" / f"{name}.html").read_text(encoding="utf-8") for name in ("tools", "flags")]
    for path in (ROOT / "tools").glob("*.py"):
        assert any(f"tools/{path.name}</h2>" in re.sub("<a [^>]*>.*?</a>", "", page) for page in pages), path.name


def test_equations_are_mathml_and_nothing_is_fetched_to_show_a_page(built: Path) -> None:
    page = (built / "arithmetic.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 40 and "merror" not in page
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', page) == []


def test_the_python_door_is_in_the_reference(built: Path) -> None:
    page = (built / "api.html").read_text(encoding="utf-8")
    for name in ("megatron.load_pretrained", "Pretrained.embed", "Pretrained.contacts", "errors.ConfigError"):
        assert f"{name}\"" in page


def test_what_is_built_is_not_in_git() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"/{place}/" in ignored for place in BUILT)


def test_the_diagrams_are_what_their_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    assert spec and spec.loader
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, text in draw.pictures().items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == text, name


def test_the_picture_of_the_floors_has_each_folder_at_its_height() -> None:
    lines = (DOCS / "pictures" / "floors.svg").read_text(encoding="utf-8").splitlines()
    folders = {name.split(".")[1]: height for name, height in HEIGHT.items() if (ROOT / name.replace(".", "/")).is_dir()
               and name.startswith("megatron.")}
    drawn = {name: next(number for number, line in enumerate(lines) if f"{name}/" in line) for name in folders}
    for one, other in itertools.combinations(folders, 2):
        assert (folders[one] > folders[other]) == (drawn[one] < drawn[other]), (one, other)


@pytest.mark.parametrize("page", ["README.md", "protein_tools/README.md", *sorted(
    str(path.relative_to(ROOT)) for path in DOCS.glob("*.md"))])
def test_links_lead_to_what_is_there(page: str) -> None:
    """As GitHub shows them: pages that a build alone makes are left out."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text(encoding="utf-8"))
    for link, heading in links:
        target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
        assert target.exists() or link.startswith("generated/"), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}, heading


@pytest.mark.parametrize("page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.glob("*.md"))])
def test_files_of_the_project_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(r"`((?:megatron|tests|tools|examples|benchmarks|protein_tools)/[\w./-]+\.\w+)`",
                       (ROOT / page).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []
