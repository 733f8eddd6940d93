"""Requests to stop are recorded, and the previous signal handlers are restored."""

import ctypes
import signal

import pytest

from megatron.parallel.launch.leaving import leave
from megatron.parallel.mesh import Mesh
from megatron.train.signals import REQUESTS_TO_STOP, leave_when_asked
from megatron.train.stop import StopRequests, interruption


@pytest.mark.parametrize("number", REQUESTS_TO_STOP)
def test_a_signal_is_a_request(number):
    requests, before = StopRequests(None), signal.getsignal(number)
    with requests.listening():
        assert not requests.agreed(Mesh())
        signal.raise_signal(number)
    assert requests.wants_stop()
    assert requests.agreed(Mesh())
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("failed", "said"), [(True, ""), (False, "stopped: there is nothing to save\n")])
def test_a_rank_that_its_launcher_ends_because_another_has_failed_says_nothing(tmp_path, monkeypatch, capfd, failed,
                                                                             said):
    monkeypatch.setattr("os._exit", lambda status: None)
    monkeypatch.setenv("EXIT_STATUS_FILE", str(tmp_path / "status"))
    if failed:
        monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
        monkeypatch.setattr("megatron.parallel.launch.leaving.is_alone", lambda: False)
        leave(2)
    before = {number: signal.getsignal(number) for number in REQUESTS_TO_STOP}
    try:
        leave_when_asked()
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr().out == said


def test_a_signal_that_a_library_has_taken_is_a_request_again_from_the_next_step_on():
    requests = StopRequests(None)
    with requests.listening():
        ctypes.CDLL(None).signal(signal.SIGUSR1, ctypes.c_void_p(int(signal.SIG_IGN)))  # Python does not notice
        assert not requests.wants_stop()
        signal.raise_signal(signal.SIGUSR1)
    assert requests.wants_stop()


def test_a_second_interrupt_is_obeyed_at_once():
    with StopRequests(None).listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_what_an_interrupted_run_has_lost_is_told_by_its_last_checkpoint(tmp_path):
    assert interruption(None).endswith("without --save nothing of this run is kept")
    assert interruption(str(tmp_path / "none")).endswith(f"before anything was saved in {tmp_path}/none")
    for number in (9, 10):
        (tmp_path / f"iter_{number:07d}").mkdir()
    assert f": what came after {tmp_path}/iter_0000010, the last checkpoint, is lost; " in interruption(str(tmp_path))


def test_time_that_is_up_is_a_request():
    assert StopRequests(0.0).wants_stop()
    assert not StopRequests(5.0).wants_stop()
