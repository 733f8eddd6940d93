"""A rank whose host reads what ranks have summed is known to wait for others, whichever part of the program reads it.

Read here from the meta device, which refuses: the error's innermost frame is where the host of a GPU would stand.
"""

from traceback import walk_tb
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from megatron.config import PrecisionConfig
from megatron.config.command_line import parse
from megatron.data.batches.batch import BatchShape
from megatron.finetune.data.tasks import NUMBER
from megatron.finetune.predictions.collected import _Predicting
from megatron.optim.average import WeightAverage
from megatron.optim.scaling import LossScale
from megatron.parallel.launch.watch import _is_waiting
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.placement import is_any_trained
from megatron.train.observation.memory import peak_memory_gib
from megatron.train.setup import precision
from megatron.train.step import evaluate
from megatron.train.step.agreement import Arriving
from megatron.train.step.meters import Meters
from megatron.train.stop import StopRequests

META = torch.device("meta")
MESH = Mesh(device=META)


def meters(**kept):
    of_run = Meters(Axis(), META, **kept)
    of_run.add_step(torch.ones((), device=META), torch.ones((), device=META))
    return of_run


def times_of_ranks():
    of_run = meters(waits=MagicMock(take_s=lambda: 0.0))
    of_run._times_of_ranks()


def arriving():
    numbers = Arriving(torch.zeros(2))
    numbers._event = SimpleNamespace(synchronize=iter(()).__next__)  # which raises where it is called
    numbers.read()


def evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "batches", lambda *arguments, **named: (_ for _ in ()))
    engine = MagicMock(mesh=MESH, **{"config.training.micro_batch_size": 1})
    evaluate.evaluate(engine, MagicMock(), BatchShape(1, 1, 1, 1), MagicMock(), num_rows=0, label="",
                      wants_stop=lambda: False)


def choice_of_precision(monkeypatch):
    monkeypatch.setattr(precision, "summed", lambda numbers, axis, device: torch.ones(1, device=META))
    config, _ = parse(["--preset", "demo"])
    precision._measured(config, SimpleNamespace(world=Axis(rank=1, size=2), device=META))


def prediction():
    batch = SimpleNamespace(sequence=SimpleNamespace(cu_seqlens=torch.zeros(2, device=META)))
    _Predicting.take(SimpleNamespace(_mesh=Mesh(), _head=SimpleNamespace(kind=NUMBER)), batch, torch.zeros(1))


READERS = {
    "stopping": lambda: StopRequests(None).agreed(MESH), "wishes": arriving, "memory": lambda: peak_memory_gib(MESH),
    "log event": lambda: meters().read(), "totals": lambda: meters().totals(), "saving": lambda: meters().state(),
    "times": times_of_ranks, "evaluation": evaluation, "precision": choice_of_precision,
    "frozen": lambda: is_any_trained([nn.Parameter(torch.ones(1, device=META), requires_grad=False)], Axis()),
    "loss scale": lambda: LossScale(PrecisionConfig(), META).state(),
    "prediction": prediction, "average": lambda: WeightAverage({}, 0.9, META).num_steps}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_what_ranks_have_summed_is_known_to_wait_for_them(reader, monkeypatch):
    call = READERS[reader]
    with pytest.raises((NotImplementedError, RuntimeError, StopIteration)) as refused:
        call(monkeypatch) if call.__code__.co_argcount else call()
    *_, (innermost, _) = walk_tb(refused.tb)
    assert _is_waiting(innermost)
