"""Two hosts on one machine: network namespaces, joined by a pair of virtual Ethernet devices, each with its own name.

Making them needs root and `ip`; the tests are skipped where these are missing.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.golden.training import ROOT, TINY, losses, run_on_ranks

RUN = [*TINY, "--num-attention-heads", "4", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters",
       "20", "--save-interval", "3", "--tensor-model-parallel-size", "2", "--distributed-timeout-minutes", "1"]
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

    def start(self, name: str, *command: object) -> "subprocess.Popen[str]":
        """`command` on the host `name`, errors among its output. What enters the host is replaced by the command."""
        inside = ["unshare", "--uts", "bash", "-c", 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"', name]
        return subprocess.Popen(["ip", "netns", "exec", self.namespaces[name], *inside, *map(str, command)], cwd=ROOT,
                                env=os.environ | {"GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"},
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


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The losses of the same run on four ranks of one host."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_on_ranks(*RUN, "--data-path", corpus, "--save", folder, ranks=4) == [0] * 4
    return losses(folder)


def start_on_both(hosts, corpus, folder, restarts):
    return [hosts.start(name, sys.executable, "-m", "megatron.parallel.launch", "--nnodes", 2, "--node_rank",
                        number, "--master_addr", ADDRESSES["first"], "--master_port", 6001, "--nproc_per_node", 2,
                        "--max-restarts", restarts, ROOT / "pretrain_tape.py", *RUN, "--data-path", corpus,
                        "--save", folder, "--load", folder) for number, name in enumerate(ADDRESSES)]


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process numbers of the ranks that a launcher has started."""
    return [int(number) for number in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def wait_for(path: Path, processes: "list[subprocess.Popen[str]]") -> None:
    deadline_s = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline_s and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    assert path.exists(), [process.communicate(timeout=10)[0] for process in processes if process.poll() is not None]


def kill_rank_1_of(victim, processes, folder):
    """Kills the second rank of a launcher once there is a checkpoint; the launchers' outputs when they have ended."""
    wait_for(folder / "latest_checkpointed_iteration.txt", processes)
    os.kill(ranks_of(victim)[1], signal.SIGKILL)
    return [process.communicate(timeout=90)[0] for process in processes]


def errors_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_both_hosts_end_at_once_and_say_which_rank_died_where(corpus, tmp_path, hosts):
    processes = start_on_both(hosts, corpus, tmp_path, restarts=0)
    outputs = kill_rank_1_of(processes[0], processes, tmp_path)
    line = "error: rank 1 on first: killed by signal 9 (SIGKILL)"
    assert list(map(errors_in, outputs)) == [[line], [line]]
    assert all(process.returncode != 0 for process in processes)


def test_a_rank_killed_on_the_other_host_is_started_again(corpus, tmp_path, hosts, undisturbed):
    processes = start_on_both(hosts, corpus, tmp_path, restarts=1)
    outputs = kill_rank_1_of(processes[1], processes, tmp_path)
    assert [process.returncode for process in processes] == [0, 0], "".join(outputs)
    line = "error: rank 3 on second: killed by signal 9 (SIGKILL); starting again, restart 1 of 1"
    assert list(map(errors_in, outputs)) == [[line], [line]]
    assert "going on from iteration" in outputs[0]
    assert losses(tmp_path) == undisturbed
