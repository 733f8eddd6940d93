"""Checks Python, packages, C++ helpers and the compiler.

Which packages are needed, and for what, is read from setup.py or, if the project is installed, from its metadata.
"""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from megatron.doctor.finding import NOTE, OK, ROOT, WRONG, Finding

HELPERS = ("megatron.data.rows._packing", "megatron.kernels.pointwise._pointwise",
           "megatron.kernels.attention._packed_attention")  # as setup.py compiles them
_PACKAGE = "proteinlm-pretrain"
BUILD = "pip install pybind11 setuptools && python setup.py build_ext --inplace"
_NEWEST_TRIED = (3, 14)
# Optional packages that setup.py does not list, because they are large, need a GPU, or only some users want them.
_OTHERS = {"optuna": "tools/sweep.py --sampler optuna", "wandb": "--logger wandb", "trackio": "--logger trackio",
           "mlflow": "--logger mlflow", "transformers": "to use models that --to hf wrote",
           "triton": "the kernels of GPUs", "apex": "--optimizer-backend apex"}


@dataclass(frozen=True)
class Needs:
    """The packages in setup.py: required ones, and extras by name, each with its packages and its purpose."""

    required: list[str]
    extras: dict[str, tuple[list[str], str]]


def needs(setup: Path = ROOT / "setup.py") -> Needs:
    """The packages that the project needs, read from setup.py without running it, or from the installed metadata."""
    if not setup.is_file():
        return _of_the_package()
    text = setup.read_text(encoding="utf-8")
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(text).body
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    purposes = dict(re.findall(r'^\s+"(\w+)": \[.*\],\s+# (.*)$', text, re.MULTILINE))
    here = [requirement.partition(";")[0].strip() for requirement in values["REQUIRED"] if _is_for_here(requirement)]
    return Needs(here, {name: (what, purposes.get(name, "")) for name, what in values["EXTRAS"].items()})


def _of_the_package() -> Needs:
    """The packages in the metadata of the installed project."""
    found = Needs([], {})
    for line in requires(_PACKAGE) or ():
        requirement, extra = line.partition(";")[0].strip(), re.search(r"""extra\s*==\s*['"](\w+)""", line)
        if extra:
            found.extras.setdefault(extra[1], ([], "an extra of this project"))[0].append(requirement)
        elif _is_for_here(line):
            found.required.append(requirement)
    return found


def _is_for_here(requirement: str) -> bool:
    """Whether a requirement applies to this Python; `NAME ; python_version < 'X.Y'` only applies before X.Y."""
    before = re.search(r"python_version\s*<\s*['\"](\d+)\.(\d+)", requirement)
    return before is None or sys.version_info[:2] < (int(before[1]), int(before[2]))


def python_and_packages() -> Iterator[Finding]:
    """Reports Python's version, required packages that are missing or too old, and optional ones with their purpose."""
    here = f"Python {sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] > _NEWEST_TRIED:
        yield Finding(NOTE, f"{here}: tried were 3.10 to {'.'.join(map(str, _NEWEST_TRIED))}")
    else:
        yield Finding(OK, here)
    wanted = needs()
    faults = {requirement: fault for requirement in wanted.required if (fault := fault_of(requirement))}
    if faults:
        yield Finding(WRONG, f"needed: {'; '.join(faults.values())}", _install(faults))
    there = [requirement for requirement in wanted.required if requirement not in faults]
    if there:
        yield Finding(OK, "needed and there: " + ", ".join(map(_with_version, there)))
    for extra, (requirements, purpose) in wanted.extras.items():
        faults = {requirement: fault for requirement in requirements if (fault := fault_of(requirement))}
        if faults:
            yield Finding(NOTE, f"{'; '.join(faults.values())} ({extra}: {purpose})", _install(faults))
        else:
            yield Finding(OK, f"{', '.join(map(_with_version, requirements))} ({extra}: {purpose})")
    for package, purpose in _OTHERS.items():
        fault = fault_of(package)
        yield Finding(OK, f"{fault or _with_version(package)} (optional: {purpose})")


def fault_of(requirement: str) -> str | None:
    """Why the requirement `NAME>=VERSION` is not met; None if it is."""
    name, _, least = requirement.partition(">=")
    try:
        there = version(name)
    except PackageNotFoundError:
        return f"{name} is missing"
    if least and _numbers(there) < _numbers(least):
        return f"{name} is {there}, older than {least}"
    return None


def torch_loads() -> Iterator[Finding]:
    """Reports if PyTorch or NumPy is installed but cannot be imported, as when a library that it needs is missing."""
    for name in ("numpy", "torch"):
        if fault_of(name):
            continue  # reported already
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            why = next(iter(str(error).splitlines()), "")
            yield Finding(WRONG, f"{name} is installed and cannot be imported: {type(error).__name__}: {why}",
                          f"pip install --force-reinstall {name}")


def cpp_helpers() -> Iterator[Finding]:
    """Reports whether each C++ helper is built, up to date and loadable; without it, Python code replaces it."""
    for module in HELPERS:
        folder, name = ROOT.joinpath(*module.split(".")[:-1]), module.split(".")[-1]
        built = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)
        if built is None:
            yield Finding(NOTE, f"{module} is not built for this Python: its twin does the work, more slowly", BUILD)
            continue
        sources = [path for ending in ("cpp", "h", "inc") for path in folder.glob(f"*.{ending}")]
        newer = [path.name for path in sources if path.stat().st_mtime > built.stat().st_mtime]
        if newer:
            yield Finding(NOTE, f"{module} is older than {', '.join(sorted(newer))}", BUILD)
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield Finding(WRONG, f"{module} is built and cannot be loaded: {str(error).splitlines()[0]}",
                          f"rm {built.relative_to(ROOT)} && {BUILD}")
        else:
            yield Finding(OK, f"{module} is built and loads")


def compiler() -> Iterator[Finding]:
    """Reports the C++ compiler, which builds the helpers, and which torch.compile and Triton call at run time."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not name or not shutil.which(name):
        yield Finding(NOTE, f"no C++ compiler{f' {name}' if name else ''}: no C++ helpers, no --compile",
                      "apt install g++")
        return
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    yield Finding(OK, f"{name}: {next(iter(said.splitlines()), 'says nothing of its version')}")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        yield Finding(NOTE, f"{sysconfig.get_path('include')}/Python.h is missing, which the helpers and Triton are "
                      "compiled with", f"apt install python{sys.version_info.major}.{sys.version_info.minor}-dev")


def _install(requirements: Iterable[str]) -> str:
    return "pip install " + " ".join(f"'{requirement}'" for requirement in requirements)


def _with_version(requirement: str) -> str:
    """The name and the installed version of a requirement."""
    name = requirement.partition(">=")[0]
    return f"{name} {version(name)}"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]]
