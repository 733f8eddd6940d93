"""Requests to stop are noted, and handlers are given back."""

import signal

import pytest

from megatron.parallel.mesh import Mesh
from megatron.train.starting import REQUESTS_TO_STOP
from megatron.train.stop import StopRequests


@pytest.mark.parametrize("number", REQUESTS_TO_STOP)
def test_a_signal_is_a_request(number):
    requests, before = StopRequests(None), signal.getsignal(number)
    with requests.listening():
        assert not requests.agreed(Mesh())
        signal.raise_signal(number)
    assert requests.wants_stop()
    assert requests.agreed(Mesh())
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_obeyed_at_once():
    with StopRequests(None).listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_time_that_is_up_is_a_request():
    assert StopRequests(0.0).wants_stop()
    assert not StopRequests(5.0).wants_stop()
