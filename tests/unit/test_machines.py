"""How the launchers of several machines meet, and what they say of machines that are missing or numbered wrongly."""

import socket
import threading
from contextlib import closing
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.errors import LaunchError
from megatron.parallel.launch import machines
from megatron.parallel.launch.agent import met, prepared
from megatron.parallel.launch.hosts import is_own
from megatron.parallel.launch.machines import find, meet, telling_a_long_wait, timeout_of

HOST = socket.gethostname()
LOCAL = "127.0.0.1"
SOON, LONG = timedelta(seconds=0.5), timedelta(seconds=60)


@pytest.fixture
def port():
    with closing(socket.create_server((LOCAL, 0))) as server:
        return server.getsockname()[1]


@pytest.fixture
def foreign_port():
    """A port at which something listens that is no launcher."""
    with closing(socket.create_server(("", 0))) as server:
        yield server.getsockname()[1]


def ends(numbers, num_machines, port, timeout=LONG):
    """What each machine's launcher ends with, in the order of `numbers`: nothing, or an error's type and text."""
    found = [""] * len(numbers)

    def one(index, kept):
        try:
            kept.append(meet(numbers[index], num_machines, LOCAL, port, timeout))
        except (LaunchError, dist.DistError) as error:
            found[index] = f"{type(error).__name__}: {error}"

    kept = []
    threads = [threading.Thread(target=one, args=(index, kept)) for index in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_machines_with_numbers_of_their_own_meet_in_silence(port, capfd):
    assert ends([2, 0, 1], 3, port) == ["", "", ""]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("numbers", [[0, 0], [0, 1, 1]])
def test_two_machines_with_one_number_are_refused_on_all(numbers, port):
    line = (f"LaunchError: {HOST} and {HOST} both have NODE_RANK {numbers[-1]}, and meet at {LOCAL}:{port}; give each "
            f"machine its own, from 0 to {len(numbers) - 1}")
    assert ends(numbers, len(numbers), port) == [line] * len(numbers)


@pytest.mark.parametrize(("numbers", "num_machines", "missing"), [
    ([0, 2], 4, "machines with NODE_RANK 1, 3"), ([1], 2, "machine with NODE_RANK 0"),
    ([0], 30, "machines with NODE_RANK 1, 2, 3, 4, 5, 6, 7, 8 and 21 more")])
def test_machines_that_do_not_come_are_named_soon_and_when_the_time_is_up(
        numbers, num_machines, missing, port, monkeypatch, capfd):
    monkeypatch.setattr(machines, "TELL_AFTER_S", 1)
    line = (f"DistStoreError: 0.0333 minutes (--distributed-timeout-minutes) are up, and the {missing} did not come to "
            f"{LOCAL}:{port}")
    assert ends(numbers, num_machines, port, timedelta(seconds=2)) == [line] * len(numbers)
    note = f"note: {HOST} waits at {LOCAL}:{port} for the {missing}, for at most 0.0333 minutes"
    assert [told.split(" (")[0] for told in capfd.readouterr().err.splitlines()] == [note] * len(numbers)


def test_machine_0_is_told_that_its_address_is_that_of_another(port, monkeypatch):
    monkeypatch.setattr(machines, "answers", lambda *_: False)
    with pytest.raises(LaunchError, match=f"NODE_RANK is 0 on {HOST}, but MASTER_ADDR node1 does not lead there"):
        meet(0, 2, "node1", port, LONG)


def test_a_number_beyond_the_machines_is_refused(port):
    with pytest.raises(LaunchError, match="NODE_RANK is 2 and NNODES is 2"):
        meet(2, 2, LOCAL, port, LONG)


@pytest.mark.parametrize("start", [lambda port: meet(0, 1, LOCAL, port, LONG), lambda port: find(LOCAL, port, LONG)],
                         ids=["numbered", "elastic"])
def test_a_port_that_is_taken_is_named_and_not_taken_for_lost_machines(start, foreign_port, monkeypatch):
    monkeypatch.setattr(machines, "GREETING_S", 0.2)
    with pytest.raises(LaunchError, match=f"port {foreign_port} is taken on {HOST}; set MASTER_PORT to a free one"):
        start(foreign_port)


def test_another_machine_does_not_wait_for_an_answer_of_what_is_no_launcher(foreign_port, monkeypatch):
    monkeypatch.setattr(machines, "GREETING_S", 0.2)
    with pytest.raises(LaunchError, match=f"something listens at {LOCAL}:{foreign_port}, but no launcher"):
        meet(1, 2, LOCAL, foreign_port, LONG)


def test_machines_without_numbers_wait_for_the_one_whose_address_is_given(port, monkeypatch):
    assert is_own(LOCAL)
    monkeypatch.setattr(machines, "is_own", lambda _: False)
    with pytest.raises(dist.DistStoreError, match="the machine of that address did not come"):
        find(LOCAL, port, SOON)
    kept = dist.TCPStore(LOCAL, port, is_master=True, wait_for_workers=False)
    assert find(LOCAL, port, LONG) is None
    del kept


def test_only_a_long_wait_inside_torch_is_told(monkeypatch, capsys):
    monkeypatch.setattr(machines, "LONG_WAIT_S", 0.01)
    with telling_a_long_wait():
        for thread in threading.enumerate():  # not read until it has printed: reading may lose what comes meanwhile
            if isinstance(thread, threading.Timer):
                thread.join(60)
        assert capsys.readouterr().err.startswith(f"note: {HOST} waits for other machines")
    monkeypatch.setattr(machines, "LONG_WAIT_S", 60)
    with telling_a_long_wait():
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("words", "minutes"), [
    ([], 10), (["--distributed-timeout-minutes", "3"], 3), (["--lr", "1", "--distributed-timeout-minutes=0.5"], 0.5),
    (["--config", "run.toml"], 7), (["--config=run.toml", "--distributed-timeout-minutes", "3"], 3),
    (["--config", "absent.toml"], 10), *((["--distributed-timeout-minutes", *value], 10)
                                         for value in ([], ["soon"], ["0"], ["nan"], ["inf"], ["1e300"]))])
def test_machines_wait_as_long_as_ranks_do(words, minutes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("distributed-timeout-minutes = 7\n")
    assert timeout_of(["-u", "pretrain_tape.py", *words]) == timedelta(minutes=minutes)


@pytest.mark.parametrize(("minutes", "seconds"), [("3", 180), ("0.1", 60)])
def test_launchers_wait_as_long_at_a_restart(minutes, seconds, tmp_path):
    config = prepared(["--nnodes", "2", "--master-addr", LOCAL, "--log-dir", str(tmp_path), "program",
                       "--distributed-timeout-minutes", minutes])[0]
    assert config.rdzv_configs["timeout"] == seconds


def test_a_launcher_that_is_alone_meets_nobody(tmp_path):
    assert met(prepared(["--log-dir", str(tmp_path), "program"])[0], LONG) is None
