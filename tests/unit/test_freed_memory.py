"""Memory that one step has freed is reused by the next, without new pages from the kernel."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, json, resource
from megatron.train.step.freed_memory import keep_freed_memory

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # the kernel may clear pages of 2 MiB, a fault each

def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [bytearray(2**22) for _ in range(8)]
    del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([{keeps} and keep_freed_memory(), *(pages_of_a_step() for _ in range(3))]))
"""


def pages_of_steps(keeps):
    """Whether the C library keeps what is freed, and how many pages each of three steps fetches."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keeps=keeps)], capture_output=True, check=True)
    kept, *pages = json.loads(done.stdout)
    return kept, pages


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_later_step_takes_no_new_pages():
    kept, pages = pages_of_steps(keeps=True)
    if not kept:
        pytest.skip("the C library is not glibc")
    assert pages[1] < pages[0] / 100 and pages[2] < pages[0] / 100
    _, pages = pages_of_steps(keeps=False)
    assert pages[2] > pages[0] / 2, "by itself it does"
