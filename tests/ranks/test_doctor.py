"""The doctor on several ranks: it measures links and clocks, and every rank reports what the ranks disagree on."""

from pathlib import Path

from megatron.doctor import job
from megatron.doctor.finding import OK, WRONG
from megatron.parallel.mesh import Axis, Mesh
from tests.ranks.launch import run_ranks


def examined(axis: Axis, folder: str) -> list[tuple[str, str]]:
    """What a rank finds, whose data differ from the other's."""
    (Path(folder) / f"{axis.rank}.bin").write_bytes(bytes(axis.rank))
    found = job.job((f"{folder}/{axis.rank}",), Mesh(world=axis))
    return [(finding.level, finding.text) for finding in found]


def test_ranks_find_the_same_and_name_what_differs(tmp_path):
    first, second = run_ranks(examined, 2, str(tmp_path))
    assert first == second
    differing, clocks, links = first
    assert differing[0] == WRONG and differing[1].startswith("data differs: [0, -1] on ")
    assert clocks[0] == OK and abs(float(clocks[1].split("differs by ")[1].split(" s")[0])) < 1
    assert links[0] == OK and "µs for one number" in links[1]
