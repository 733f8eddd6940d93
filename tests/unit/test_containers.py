"""The container recipes against the checkout and setup.sh: what they copy and what they run.

No image is built here.
"""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.programs import find_program

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "containers"


def docker_instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and its arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    """The paths of the checkout that the Dockerfile copies."""
    return [path for name, rest in docker_instructions() if name == "COPY" for path in rest.split()[:-1]]


def docker_commands() -> list[str]:
    """What the Dockerfile runs as root to install."""
    return [command.strip() for name, rest in docker_instructions() if name == "RUN" and "useradd" not in rest
            for command in rest.split("&&")]


def apptainer_sections() -> dict[str, list[str]]:
    """The lines of each section of the Apptainer recipe, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (FOLDER / "proteinlm.def").read_text())
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("%"):
            sections[line[1:]] = lines = []
        elif line.startswith("    "):
            lines.append(line.strip())
    return sections


def is_ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out of what the engine gets: the last pattern that fits decides."""
    answer, parts = False, path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        above = ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]
        fits = any(fnmatch(part, pattern[3:]) for part in parts) if pattern.startswith("**/") else (
            any(place == pattern or (pattern == "*" and "/" not in place) for place in above))
        if fits:
            answer = not line.startswith("!")
    return answer


def test_what_is_copied_is_there_and_not_ignored():
    paths = copied()
    assert "megatron" in paths and "requirements.txt" in paths
    assert [path for path in paths if not (ROOT / path).exists() or is_ignored(path)] == []
    assert not is_ignored("examples/proteins/small.fasta.gz") and not is_ignored("megatron/config/model.py")


@pytest.mark.parametrize("path", [".git/HEAD", "runs/demo/x", ".venv/bin/python", "tests/conftest.py", "docs/index.md",
                                  "megatron/__pycache__/x.pyc", "megatron/data/rows/_packing.so"])
def test_what_an_image_does_not_need_stays_outside(path):
    assert is_ignored(path)


def test_what_is_copied_is_enough_to_run_the_programs(tmp_path):
    for path in copied():
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, tmp_path / path)
    for program in ("pretrain_tape.py", "tools/preprocess_data.py"):
        result = subprocess.run([sys.executable, program, "--help"], cwd=tmp_path, text=True, capture_output=True,
                                env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
        assert result.returncode == 0, result.stderr
        assert "usage: " in result.stdout


def test_both_recipes_copy_and_run_the_same():
    sections = apptainer_sections()
    assert [line.split()[0] for line in sections["files"]] == copied()
    post = [line for line in sections["post"] if not line.startswith(("set ", "cd "))]
    assert post == docker_commands()
    variables = next(rest for name, rest in docker_instructions() if name == "ENV")
    assert sections["environment"] == [f"export {variables}"]


def test_the_project_is_installed_as_the_scripts_install_it():
    script = (ROOT / "examples" / "setup.sh").read_text()
    how = "--use-pep517 --no-build-isolation --no-deps -e"
    assert f'{how} "$root"' in script and any(f"{how} ." in command for command in docker_commands())
    build = "setup.py --quiet build_ext --inplace"
    assert build in script and f"python {build}" in docker_commands()
    for variable in ("GOMP_SPINCOUNT", "GLIBC_TUNABLES"):
        value = re.search(rf"export {variable}=\${{{variable}:-([^}}]*)}}", script)
        assert value and f"{variable}={value[1]}" in (FOLDER / "Dockerfile").read_text()


def test_packages_have_the_versions_of_the_requirements():
    assert "python -m pip install --no-cache-dir -r requirements.txt" in docker_commands()


def test_services_build_the_dockerfile_with_arguments_that_it_has():
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert services.keys() == {"cpu", "cuda"}
    known = {rest.split("=")[0] for name, rest in docker_instructions() if name == "ARG"}
    for service in services.values():
        build = service["build"]
        assert (FOLDER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
        assert build.get("args", {}).keys() <= known
        assert [volume.rsplit(":", 1)[1] for volume in service["volumes"]] == ["/data"]
    assert services["cuda"]["image"] != services["cpu"]["image"]


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "proteinlm.def"])
def test_a_recipe_says_whether_somebody_has_built_it(name):
    head = (FOLDER / name).read_text().split("\n\n")[0]
    assert re.search(r"BUILT ONCE|NOT (BUILT|TRIED) YET", head)


def test_hadolint_finds_nothing_in_the_dockerfile():
    result = subprocess.run([find_program("hadolint"), str(FOLDER / "Dockerfile")], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout
