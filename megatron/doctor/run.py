"""Runs all checks in order: on this host, or on each host of a job and then between its ranks."""

import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron.doctor.disk import disk
from megatron.doctor.finding import NOTE, WRONG, Finding, found, lines
from megatron.doctor.machine import environment, limits, memory, processor
from megatron.doctor.software import compiler, cpp_helpers, python_and_packages, torch_loads
from megatron.errors import LaunchError, OutputError
from megatron.files import write_json
from megatron.parallel.launch.environment import launched

Report = dict[str, list[Finding]]
PACKAGES = "Python and packages"


def examine(save: Path, data_path: tuple[str, ...], json_file: Path | None) -> int:
    """Run all checks; rank 0 prints the findings and writes them to `json_file`.

    `save`, `data_path`: the folder where a run would save, and its data, () for none. Returns the exit status: 1 if
    something is WRONG, else 0.
    """
    report: Report = {PACKAGES: found(python_and_packages(), torch_loads())}
    if _is_wrong(report):  # without the packages the rest of the project cannot be imported
        report |= _without_packages(save)
        report[PACKAGES].append(Finding(NOTE, "the rest needs these packages: run this again when they are there",
                                        "bash examples/setup.sh run"))
        with suppress(LaunchError):
            if not launched().speaks_for_host():
                return 1
        return _tell(report, json_file)
    return _examine_with_ranks(save, data_path, json_file, report)


def _examine_with_ranks(save: Path, data_path: tuple[str, ...], json_file: Path | None, report: Report) -> int:
    """Run the checks that need the packages, on all ranks of a job; `report`: of the packages. Returns the exit status.
    """
    from megatron.config import ParallelConfig
    from megatron.doctor.job import job
    from megatron.log import Log
    from megatron.parallel.collectives import all_gather_object
    from megatron.parallel.launch.environment import Launch
    from megatron.parallel.mesh import Mesh
    from megatron.parallel.program import status_of
    outcome: list[int] = []

    def work(mesh: Mesh, log: Log) -> None:
        # Only one rank of each host examines it, so that ranks do not slow each other down.
        host, is_first = socket.gethostname(), mesh.world.rank == 0
        hosts = all_gather_object(host, mesh.world)
        own = report | _here(save, data_path) if hosts.index(host) == mesh.world.rank else {}
        reports = all_gather_object(own, mesh.world)
        whole = _together(hosts, reports)
        if mesh.world.size > 1:
            whole["The job"] = job(data_path, mesh)
        outcome.append(_tell(whole, json_file) if is_first else int(_is_wrong(whole)))

    def prepare(launch: Launch) -> tuple:
        return ParallelConfig(), work

    return status_of(prepare) or outcome[0]


def _here(save: Path, data_path: tuple[str, ...]) -> Report:
    """The report on this host, where the packages are installed."""
    from megatron.doctor.computing import gpus, presets, speed
    from megatron.doctor.data import data
    report = {"C++ helpers": found(cpp_helpers()), **_without_packages(save), "GPUs": found(gpus()),
              "Data": found(data(data_path)), "Speed": found(speed()), "What fits": found(presets())}
    return {title: findings for title, findings in report.items() if findings}


def _without_packages(save: Path) -> Report:
    """The part of the report that needs no packages."""
    return {"Compiler and processor": found(compiler(), processor(), memory(), limits()),
            "Environment": found(environment()), "Disk": found(disk(save))}


def _together(hosts: list[str], reports: list[Report]) -> Report:
    """The report of the first host, with the problems of each other host."""
    whole = dict(reports[0])
    for host, report in list(zip(hosts, reports, strict=True))[1:]:
        bad = [Finding(finding.level, f"{title}: {finding.text}", finding.command)
               for title, findings in report.items() for finding in findings if finding.level in (NOTE, WRONG)]
        if bad:
            whole[f"Host {host}"] = bad
    return whole


def _is_wrong(report: Mapping[str, list[Finding]]) -> bool:
    return any(finding.level == WRONG for findings in report.values() for finding in findings)


def _tell(report: Report, json_file: Path | None) -> int:
    """Print a report and write it to `json_file`; returns the exit status."""
    for title, findings in report.items():
        print(title, *lines(findings), sep="\n")
    levels = [finding.level for findings in report.values() for finding in findings]
    print(f"\n{levels.count(WRONG)} wrong, {levels.count(NOTE)} notes")
    sys.stdout.flush()
    if json_file is not None:
        told = {title: [vars(finding) for finding in findings] for title, findings in report.items()}
        try:
            write_json(json_file, told)
        except OSError as error:
            raise OutputError(f"--json {json_file}: cannot be written ({error.strerror})") from None
    return int(_is_wrong(report))
