"""What tools/doctor.py reports of machines with and without faults."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import setuptools
from packaging.requirements import Requirement

from megatron.config.reading.presets import PRESETS
from megatron.doctor import computing, disk, job, machine, run, software
from megatron.doctor.data import data, sizes
from megatron.doctor.finding import NOTE, OK, WRONG, Finding, found, lines
from tests.indexed_files import write_indexed

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "tools" / "doctor.py"


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_without_any_package_it_says_what_to_install():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-S", str(DOOR), "--save", "/dev/shm"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert said.returncode == 1 and not said.stderr
    assert "torch is missing" in said.stdout and "-> pip install 'torch>=" in said.stdout
    assert "GB free" in said.stdout  # what needs no package is looked at all the same
    second = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment | second)
    assert (said.returncode, said.stdout, said.stderr) == (1, "", "")  # one rank a host tells


def test_what_is_needed_is_what_setup_py_asks_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: asked.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    needs = software.needs()
    for_here = [one.partition(";")[0].strip() for one in asked["install_requires"]
                if (marker := Requirement(one).marker) is None or marker.evaluate()]
    assert needs.required == for_here
    assert {name: what for name, (what, _) in needs.extras.items()} == asked["extras_require"]
    assert all(purpose for _, purpose in needs.extras.values())
    assert [*software.HELPERS] == [extension.name for extension in asked["ext_modules"]]


def test_without_setup_py_it_is_what_the_installed_package_says(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "requires", lambda name: [
        "torch>=2.11", "tomli>=2.0; python_version < '3.11'", 'h5py>=3.8; extra == "hdf5"'] if name == (
        "proteinlm-pretrain") else None)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    needs = software.needs(tmp_path / "setup.py")
    assert needs.required == ["torch>=2.11"] and needs.extras["hdf5"][0] == ["h5py>=3.8"]
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert not [finding for finding in machine.environment() if "is not set" in finding.text]


@pytest.mark.parametrize(("there", "requirement", "fault"), [
    ("2.13.0+cpu", "torch>=2.11", None), ("2.9.1", "torch>=2.11", "older than 2.11"), ("2.11", "torch>=2.11", None),
    ("1.0rc1", "torch", None), ("5.0.1", "torch>=5.0.2", "older")])
def test_versions_are_compared_by_their_numbers(monkeypatch, there, requirement, fault):
    monkeypatch.setattr(software, "version", lambda name: there)
    said = software.fault_of(requirement)
    assert said is None if fault is None else said is not None and fault in said


def test_a_missing_package_is_wrong_where_it_is_needed_and_a_note_where_some_need_it(monkeypatch):
    wanted = software.Needs(["no-such-a>=1"], {"extra": (["no-such-b>=2"], "for b")})
    monkeypatch.setattr(software, "needs", lambda: wanted)
    monkeypatch.setattr(software, "_NEWEST_TRIED", sys.version_info[:2])
    findings = list(software.python_and_packages())
    bad = [finding for finding in findings if finding.level != OK]
    assert bad == [Finding(WRONG, "needed: no-such-a is missing", "pip install 'no-such-a>=1'"),
                   Finding(NOTE, "no-such-b is missing (extra: for b)", "pip install 'no-such-b>=2'")]


def test_helpers_that_are_missing_stale_or_broken_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "ROOT", tmp_path)
    monkeypatch.setattr(software, "HELPERS", ("kernels._none", "kernels._broken"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernels").mkdir()
    built = tmp_path / "kernels" / f"_broken{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.write_bytes(b"no library")
    (tmp_path / "kernels" / "broken.cpp").write_text("")
    os.utime(built, (1, 1))
    missing, stale, broken = software.cpp_helpers()
    assert (missing.level, stale.level, broken.level) == (NOTE, NOTE, WRONG)
    assert "_none is not built" in missing.text and "older than broken.cpp" in stale.text
    assert broken.command == f"rm kernels/{built.name} && {software.BUILD}"


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "150000 100000\n"}, 1.5), ({"cpu.max": "max 100000\n"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None)])
def test_a_containers_share_of_the_cores_is_read_from_either_kind_of_control_group(tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("load", "level"), [(0.0, OK), (1000.0, NOTE)])
def test_other_work_on_the_cores_is_told(monkeypatch, load, level):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert levels(machine.processor())[-1] == level


@pytest.mark.parametrize(("threads", "level"), [("none", WRONG), ("0", WRONG), ("100000", NOTE)])
def test_a_wrong_number_of_threads_is_told(monkeypatch, threads, level):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert [finding.level for finding in machine.environment()
            if finding.text.startswith("OMP_NUM_THREADS is")] == [level]


def test_what_the_scripts_export_is_asked_for(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    commands = [finding.command for finding in machine.environment()]
    assert "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in commands and "export GOMP_SPINCOUNT=30000" in commands


def test_this_machine_has_a_processor_and_memory():
    for check in (machine.processor, machine.memory, machine.limits, software.compiler):
        assert WRONG not in levels(found(check()))
    assert 2**20 < machine.available_memory() < 2**60


def test_a_disk_is_measured_and_nothing_is_left_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK", 1 << 12)
    (finding,) = disk.disk(tmp_path / "not" / "yet")
    assert finding.level in (OK, NOTE) and str(tmp_path) in finding.text and not list(tmp_path.iterdir())
    assert all(rate > 0 for rate in disk.rates(tmp_path))


def test_a_place_that_cannot_be_saved_to_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert levels(disk.disk(tmp_path / "file")) == [WRONG]

    def refuse(folder):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(disk, "rates", refuse)
    (finding,) = disk.disk(tmp_path)
    assert finding.level == WRONG and "Permission denied" in finding.text


def test_data_is_opened_and_what_is_missing_is_named(tmp_path):
    write_indexed(tmp_path / "a", [np.array([6, 7]), np.array([8])])
    good, missing = (tuple(str(tmp_path / name) for name in names) for names in ("a", "ab"))
    (finding,) = data(good)
    assert finding.level == OK and "2 proteins, 3 ids in 1 file; its rows are packed in memory" in finding.text
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}
    (finding,) = data(missing)
    assert finding.level == WRONG and "b.idx: no such file" in finding.text
    assert sizes(missing) == [6, (tmp_path / "a.idx").stat().st_size, -1, -1]
    assert levels(data(("1", "a", "2"))) == [WRONG] and list(data(())) == []


def test_the_largest_preset_that_fits_memory_and_a_day_is_named(monkeypatch):
    monkeypatch.setattr(computing, "PRESETS", {name: PRESETS[name] for name in ("demo", "esm2-8m", "esm2-15b")})
    monkeypatch.setattr(computing, "available_memory", lambda: 2**30)
    monkeypatch.setattr(computing, "peak", lambda dtype: 1e12)
    best, fitting, large = computing.presets()
    # A row of 1,024 tokens of ESM-2 8M: 6 FLOPs a weight and token, 7.4 M weights in its matrices, and attention.
    per_s = float(fitting.text.split("esm2-8m ")[1].split(",")[0] + fitting.text.split("esm2-8m ")[1].split(",")[1])
    assert best.text.startswith("esm2-8m is the largest") and best.command is not None and "esm2-8m" in best.command
    assert 0.6e12 / (6 * 7.4e6) > per_s > 0.6e12 / (6 * 7.4e6 * 2)
    assert "esm2-15b" in large.text and "esm2-15b" not in fitting.text
    monkeypatch.setattr(computing, "peak", lambda dtype: 1e9)
    assert next(iter(computing.presets())).level == NOTE


def test_a_check_that_the_system_refuses_is_a_note():
    def refused():
        yield Finding(OK, "first")
        raise PermissionError(13, "Permission denied")
    assert levels(found(refused())) == [OK, NOTE]


def test_hosts_that_differ_are_named_with_what_differs():
    same = {"Python": "3.12", "data": [5], "GPU": "H100"}
    (finding,) = job.agreement(["a", "a", "b"], [same] * 3)
    assert finding.level == OK and "3 ranks on 2 hosts agree" in finding.text
    differing = list(job.agreement(["a", "a", "b"], [same, same, {"Python": "3.11", "data": [5], "GPU": "A100"}]))
    assert [(finding.level, finding.text) for finding in differing] == [
        (WRONG, "Python differs: 3.12 on a; 3.11 on b"), (NOTE, "GPU differs: H100 on a; A100 on b")]
    assert all(finding.command for finding in differing)


def test_the_sources_checksum_changes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ROOT", tmp_path)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "a.py").write_text("1")
    before = job.checksum()
    (tmp_path / "megatron" / "notes.md").write_text("no source")
    assert job.checksum() == before
    (tmp_path / "megatron" / "a.py").write_text("2")
    assert job.checksum() != before


def door():
    spec = importlib.util.spec_from_file_location("door", DOOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("level", "status"), [(OK, 0), (NOTE, 0), (WRONG, 1)])
def test_the_exit_status_tells_whether_anything_is_wrong(tmp_path, monkeypatch, capsys, level, status):
    monkeypatch.setattr(run, "_here", lambda *_: {"Weather": [Finding(level, "rain", "umbrella --open")]})
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", str(tmp_path / "found.json")])
    assert door().main() == status
    assert list(lines([Finding(level, "rain", "umbrella --open")]))[1] in capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "found.json").read_text())["Weather"] == [
        {"level": level, "text": "rain", "command": "umbrella --open"}]


def test_a_file_of_findings_that_cannot_be_written_is_a_users_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_here", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", str(tmp_path / "no" / "found.json")])
    assert door().main() == 2 and "--json" in capsys.readouterr().err


def test_what_only_an_older_python_needs_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "setup.py").write_text("""REQUIRED = ["torch>=2.11", "tomli>=2.0 ; python_version < '3.11'"]
EXTRAS = {}
""")
    for version, names in (((3, 11, 7), ["torch>=2.11"]), ((3, 10, 13), ["torch>=2.11", "tomli>=2.0"])):
        monkeypatch.setattr(sys, "version_info", version)
        assert software.needs(tmp_path / "setup.py").required == names
