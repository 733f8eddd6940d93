"""What a rank prints when it fails, and which of several failures the launcher names."""

import json
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron.errors import UserError
from megatron.parallel.launch import failure as failure_module
from megatron.parallel.launch.agent import Agent, cause, line_of
from megatron.parallel.launch.environment import Launch
from megatron.parallel.launch.failure import report, told_once
from megatron.parallel.launch.killed import CUT_SHORT, count_oom_kills, killed_by

HOST = socket.gethostname()
GLOO = ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5539. "
        "This is typically caused by a remote worker crashing.")
LOST_WORKER = ("a process that prepares batches was killed (signal 9), probably for want of memory: give more memory, "
               "or --num-workers 0")


def exited():
    """The loader's error where it finds that a worker has gone."""
    error = RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
    return error


def reported(error, launch, monkeypatch, tmp_path, capsys):
    """What is printed, what is left for the launcher, and the exit status."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        raise error
    except Exception as caught:
        status = report(caught, launch)
    left = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    return capsys.readouterr().err, left, status


@pytest.mark.parametrize(("error", "line", "status"), [
    (UserError("no such file"), f"no such file (rank 3 on {HOST})", 2),
    (KeyError("name"), f"rank 3 on {HOST}: KeyError: 'name'", 1),
    (RuntimeError("shapes differ\nat length"), f"rank 3 on {HOST}: RuntimeError: shapes differ", 1),
    (RuntimeError(GLOO), f"rank 3 on {HOST} lost its peers: Connection closed by peer [10.0.0.2]:5539", 1),
    (dist.DistStoreError("timed out waiting for ranks 1, 2 to start"),
     f"rank 3 on {HOST} lost its peers: timed out waiting for ranks 1, 2 to start", 1),
    (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "), f"rank 3 on {HOST}: {LOST_WORKER}", 1),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers"),
     f"rank 3 on {HOST}: a process that prepares batches was killed (signal 7), probably because {CUT_SHORT}", 1),
    (exited(), f"rank 3 on {HOST}: {LOST_WORKER}", 1),
    (RuntimeError("EADDRINUSE"), f"port 6000 is taken; set MASTER_PORT to a free one (rank 3 on {HOST})", 2),
], ids=["user", "bug", "long", "gloo", "store", "worker", "cut short", "loader", "port"])
def test_a_rank_that_fails_says_who_where_and_why(error, line, status, monkeypatch, tmp_path, capsys):
    launch = Launch(rank=3, size=4, master_port=6000)
    printed, left, ended = reported(error, launch, monkeypatch, tmp_path, capsys)
    assert printed.splitlines()[-1] == f"error: {line}"
    assert left.partition(": ")[2] == line
    assert ended == status
    assert ("Traceback" in printed) == (type(error).__name__ in line)


def printed_by(ranks, capsys, store=None, text="no such file", launcher="srun"):
    """What each of `ranks`, one after another, prints of a mistake of the user's; of 3 ranks in all."""
    store, printed = store or dist.HashStore(), []
    for rank in ranks:
        launch = Launch(rank=rank, size=3, launcher=launcher)
        try:
            with told_once(store, launch):
                raise UserError(text)
        except UserError as error:
            assert report(error, launch) == 2
        printed.append(capsys.readouterr().err)
    return printed


def test_of_ranks_with_the_same_mistake_the_first_prints_it_and_one_with_another_its_own(capsys, monkeypatch):
    monkeypatch.setattr(failure_module, "OTHERS_S", 0.1)
    line, store = f"error: no such file (rank 2 on {HOST})\n", dist.HashStore()
    assert printed_by([2, 0, 1], capsys, store) == [line, "", ""]
    assert printed_by([1], capsys, store, text="no such flag") == [f"error: no such flag (rank 1 on {HOST})\n"]
    monkeypatch.setattr(socket, "gethostname", lambda: "second")
    assert printed_by([1], capsys, store) == [""]
    assert len(list(filter(None, printed_by([0, 1], capsys, store, launcher="torchrun")))) == 1


def test_rank_0_waits_no_longer_than_until_the_ranks_of_all_hosts_have_asked(capsys, monkeypatch):
    store = dist.HashStore()
    for host, rank in (("first", 1), ("second", 2)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert printed_by([rank], capsys, store, launcher="torchrun") == [
            f"error: no such file (rank {rank} on {host})\n"]
    monkeypatch.setattr(socket, "gethostname", lambda: "first")
    monkeypatch.setattr(failure_module, "OTHERS_S", 60)
    began_s = time.monotonic()
    assert printed_by([0], capsys, store, launcher="torchrun") == [""]
    assert time.monotonic() - began_s < 30


def test_a_rank_whose_peers_have_gone_prints_its_mistake_itself(capsys):
    class Gone:
        def add(self, key, amount):
            raise dist.DistNetworkError("connection closed by peer")

    assert printed_by([1, 2], capsys, Gone()) == [f"error: no such file (rank {rank} on {HOST})\n" for rank in (1, 2)]


def test_a_rank_whose_launcher_tells_leaves_it_the_line(monkeypatch, tmp_path, capsys):
    heard = Launch(rank=3, size=4, is_heard=True)
    assert reported(UserError("no such file"), heard, monkeypatch, tmp_path, capsys)[0] == ""
    printed, left, _ = reported(RuntimeError(GLOO), heard, monkeypatch, tmp_path, capsys)
    assert (printed, left.partition(": ")[0]) == ("", "LostPeersError")


def test_ranks_that_make_room_for_other_machines_are_not_killed_while_they_save(monkeypatch, tmp_path):
    saving = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(0)));"
              "print('listens', flush=True); time.sleep(60)")
    rank = subprocess.Popen([sys.executable, "-c", saving], stdout=subprocess.PIPE, text=True)
    context, ended = SubprocessContext.__new__(SubprocessContext), []
    context.subprocess_handlers = {0: SimpleNamespace(proc=rank)}
    agent = Agent.__new__(Agent)
    agent._pcontext = context
    monkeypatch.setattr(LocalElasticAgent, "_stop_workers", lambda self, group: ended.append(rank.poll()))
    assert rank.stdout.readline() == "listens\n"
    agent._stop_workers(None)
    assert ended == [0]


def test_one_process_fails_without_naming_a_rank(monkeypatch, tmp_path, capsys):
    assert reported(UserError("no such file"), Launch(), monkeypatch, tmp_path, capsys)[0] == "error: no such file\n"


def failure(folder, exit_code, recorded="", second=0):
    """A rank's failure as the launcher sees it, with what the rank recorded (`Type: line`)."""
    path = folder / f"{exit_code}-{second}.json"
    if recorded:
        path.write_text(json.dumps({"message": {"message": recorded, "extraInfo": {"timestamp": str(second)}}}))
    found = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file=str(path))
    found.timestamp = second
    return found


def test_the_launcher_names_the_rank_that_the_others_followed(tmp_path):
    lost = failure(tmp_path, 1, "LostPeersError: rank 0 lost its peers", second=1)
    ended = failure(tmp_path, -15, second=2)
    killed = failure(tmp_path, -9, second=3)
    assert cause({0: lost, 1: ended, 2: killed}) == (2, killed)
    assert cause({0: lost, 1: ended}) == (0, lost)
    failed = failure(tmp_path, 1, "RankError: rank 3 on b: KeyError: 'name'", second=2)
    assert cause({0: lost, 2: killed, 3: failed}) == (3, failed)


@pytest.mark.parametrize(("exit_code", "recorded", "has_hung", "line"), [
    (-9, "", False, f"rank 5 on {HOST}: {killed_by(signal.SIGKILL)}"),
    (-7, "", False, f"rank 5 on {HOST}: {killed_by(signal.SIGBUS)}"),
    (-11, "", False, f"rank 5 on {HOST}: killed by signal 11 (SIGSEGV)"),
    (-9, "", True, f"rank 5 on {HOST}: did not answer, and was killed"),
    (1, "", False, f"rank 5 on {HOST}: ended with exit status 1"),
    (1, "RankError: rank 5 on b: KeyError: 'name'", False, "rank 5 on b: KeyError: 'name'"),
    (2, "RankError: no such file (rank 5 on b)", False, "no such file (rank 5 on b)"),
    (2, "", False, ""),  # a flag that all refuse: one of them has said so
])
def test_the_launcher_says_who_where_and_why(tmp_path, exit_code, recorded, has_hung, line):
    assert line_of(5, failure(tmp_path, exit_code, recorded), has_hung) == line


def test_a_rank_killed_by_the_kernel_is_told_from_one_that_may_have_been(tmp_path):
    killed, remedy = failure(tmp_path, -9), "lower --micro-batch-size or --num-workers, or ask for more memory"
    assert f"(SIGKILL), probably for want of memory: {remedy}" in line_of(0, killed, False)
    assert f"(SIGKILL), by the kernel for want of memory: {remedy}" in line_of(0, killed, False, num_oom_kills=1)


@pytest.mark.parametrize(("told", "file", "content"), [
    ("0::/job/step", "job/step/memory.events", "low 0\noom 4\noom_kill 3\noom_group_kill 0"),
    ("0::/not/seen/here", "memory.events", "oom 4\noom_kill 3"),
    ("2:cpu:/job\n1:memory,misc:/job:1\n0::/", "memory/job:1/memory.oom_control", "under_oom 0\noom_kill 3"),
])
def test_the_kernels_count_of_kills_for_want_of_memory_is_found(tmp_path, told, file, content):
    assert count_oom_kills(tmp_path / "absent", tmp_path) == 0
    (tmp_path / "cgroup").write_text(f"{told}\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    assert count_oom_kills(tmp_path / "cgroup", tmp_path) == 0
    (tmp_path / file).write_text(f"{content}\n")
    assert count_oom_kills(tmp_path / "cgroup", tmp_path) == 3
