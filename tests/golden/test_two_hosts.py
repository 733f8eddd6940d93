"""Runs over two hosts, played on one machine by two network namespaces.

Each has its own host name; a pair of virtual Ethernet devices joins them. Making them needs root and `ip`; without
these the tests are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.parallel.launch.killed import killed_by
from tests.golden.training import ROOT, TINY

pytestmark = pytest.mark.table
RUN = [*TINY, "--num-attention-heads", "4", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters",
       "100000", "--save-interval", "3", "--tensor-model-parallel-size", "2", "--distributed-timeout-minutes", "1"]
PATIENCE_S = 240
ADDRESSES = {"first": "10.97.0.1", "second": "10.97.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces, `first` and `second`, whose processes reach each other at ADDRESSES."""

    def __init__(self) -> None:
        self.namespaces = {name: f"{name}-{os.getpid()}" for name in ADDRESSES}

    def make(self) -> None:
        first, second = self.namespaces.values()
        for namespace in (first, second):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
        for name, address in ADDRESSES.items():
            ip("-n", self.namespaces[name], "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", self.namespaces[name], "link", "set", "wire", "up")

    def remove(self) -> None:
        for namespace in self.namespaces.values():
            running = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
            for number in map(int, running):
                os.kill(number, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def start(self, name: str, *command: object, **environment: str) -> "subprocess.Popen[str]":
        """`command` on the host `name`, errors among its output. What enters the host is replaced by the command."""
        inside = ["unshare", "--uts", "bash", "-c", 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"', name]
        return subprocess.Popen(["ip", "netns", "exec", self.namespaces[name], *inside, *map(str, command)], cwd=ROOT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def hosts():
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("making network namespaces needs the commands ip (Debian: iproute2) and unshare (util-linux)")
    pair = Hosts()
    try:
        pair.make()
    except subprocess.CalledProcessError as error:
        pair.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield pair
    pair.remove()


def start_on_both(hosts, corpus, folder):
    return [hosts.start(name, sys.executable, "-m", "megatron.parallel.launch", "--nnodes", 2, "--node_rank",
                        number, "--master_addr", ADDRESSES["first"], "--master_port", 6001, "--nproc_per_node", 2,
                        "--max-restarts", 1, ROOT / "pretrain_tape.py", *RUN, "--data-path", corpus,
                        "--save", folder, "--load", folder, GLOO_SOCKET_IFNAME="wire")
            for number, name in enumerate(ADDRESSES)]


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process numbers of the ranks that a launcher has started."""
    return [int(number) for number in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def wait_for(condition, processes: "list[subprocess.Popen[str]]") -> None:
    while not condition():
        ended = [process.communicate(timeout=10)[0] for process in processes if process.poll() is not None]
        assert not ended, ended
        time.sleep(0.02)


def errors_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_both_hosts_start_again_or_end_and_say_which_rank_died_where(corpus, tmp_path, hosts):
    first, second = processes = start_on_both(hosts, corpus, tmp_path)
    pointer = tmp_path / "latest_checkpointed_iteration.txt"
    wait_for(pointer.exists, processes)
    before = ranks_of(second)
    os.kill(before[1], signal.SIGKILL)
    wait_for(lambda: ranks_of(second) and not set(ranks_of(second)) & set(before), processes)
    saved = pointer.read_text()
    wait_for(lambda: pointer.read_text() != saved, processes)
    os.kill(ranks_of(first)[1], signal.SIGKILL)
    outputs = [process.communicate()[0] for process in processes]
    lines = [f"error: rank 3 on second: {killed_by(signal.SIGKILL)}; starting again, restart 1 of 1",
             f"error: rank 1 on first: {killed_by(signal.SIGKILL)}"]
    assert list(map(errors_in, outputs)) == [lines, lines]
    assert "going on from iteration" in outputs[0]
    assert not [line for output in outputs for line in output.splitlines() if line.startswith(("[W", "frame #"))]
    assert all(process.returncode != 0 for process in processes)


def test_a_forgotten_number_is_told_on_both_hosts(hosts):
    def start(name):
        return hosts.start(name, sys.executable, "-m", "megatron.parallel.launch", "--nnodes", 2, "--node_rank", 0,
                           "--master_addr", ADDRESSES["first"], "--master_port", 6002, "no-program.py")

    look = ("import sys; from megatron.parallel.launch.hosts import answers; "
            f"sys.exit(not answers({ADDRESSES['first']!r}, 6002, {PATIENCE_S}))")
    first = start("first")
    assert hosts.start("second", sys.executable, "-c", look).wait() == 0, first.communicate()[0]
    processes = [first, start("second")]
    line = (f"error: first and second both have NODE_RANK 0, and meet at {ADDRESSES['first']}:6002; give each machine "
            "its own, from 0 to 1")
    assert [errors_in(process.communicate(timeout=PATIENCE_S)[0]) for process in processes] == [[line], [line]]
    assert [process.returncode for process in processes] == [2, 2]


def test_one_host_does_not_need_its_own_name(corpus, tmp_path, hosts):
    flags = [*RUN, "--train-iters", 2, "--data-path", corpus, "--save", tmp_path]
    process = hosts.start("first", sys.executable, "-m", "megatron.parallel.launch", "--nproc_per_node", 2,
                          ROOT / "pretrain_tape.py", *flags)
    output = process.communicate()[0]
    assert process.returncode == 0, output
