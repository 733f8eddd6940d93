"""Reads the optimizer's state in a rank's file, where parameters are identified by their number in the groups."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import StoredTensor
from megatron.checkpoint.convert.megatron_v2.names import NamedParameter, decays
from megatron.checkpoint.convert.torch_pickle import PickledObject
from megatron.errors import CheckpointError

_HALVES = (torch.float16, torch.bfloat16)
_REMEDY = "; to go on with it, save it there without --use-distributed-optimizer and with all parameters trained"


@dataclass
class OptimizerState:
    """The optimizer's state of one rank, by our names of the parameters."""

    moments: dict[str, StoredTensor] = field(default_factory=dict)  # by KIND/PARAMETER
    steps: dict[str, float] = field(default_factory=dict)  # number of steps, by parameter
    masters: dict[str, StoredTensor] = field(default_factory=dict)  # fp32 values, by parameter
    loss_scale: list[float] | None = None  # scale, overflows left until it halves, steps in a row without overflow


def optimizer_state(tree: Any, entries: Sequence[NamedParameter], path: Path) -> OptimizerState:
    """The optimizer's state in a file's entry `optimizer`; raises CheckpointError if it does not fit the parameters.

    `entries`: the file's parameters, in the order of Megatron's modules.
    """
    groups = [[entry for entry in entries if decays(entry.name) == is_first] for is_first in (True, False)]
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: its optimizer is no table{_REMEDY}")
    inner = next((tree[key] for key in ("optimizer", "optimizer_state_dict") if key in tree), tree)
    masters = next((tree[key] for key in ("fp32_from_fp16_params", "fp32_from_fp16") if key in tree), None)
    if not isinstance(inner, dict) or not {"state", "param_groups"} <= inner.keys():
        raise CheckpointError(f"{path}: its optimizer holds {', '.join(map(str, list(tree)[:5]))}, not the state of "
                              f"Adam or SGD{_REMEDY}")
    found = [len(group.get("params", ())) for group in inner["param_groups"]]
    if found != [len(group) for group in groups]:
        raise CheckpointError(f"{path}: its optimizer has groups of {found} parameters, where its model's are of "
                              f"{[len(group) for group in groups]}{_REMEDY}")
    state = OptimizerState(loss_scale=loss_scale(tree, path))
    for facts, members in zip(inner["param_groups"], groups, strict=True):
        for number, entry in zip(facts["params"], members, strict=True):
            _take(state, entry, inner["state"].get(number, {}), facts, path)
    if masters is not None:
        _take_masters(state, masters, groups, path)
    return state


def loss_scale(tree: Any, path: Path) -> list[float] | None:
    """The loss scale of `OptimizerState`, from a DynamicGradScaler or the older DynamicLossScaler; None if neither."""
    if not isinstance(tree, dict):
        return None
    scaler = tree.get("grad_scaler") or tree.get("loss_scaler")
    facts = scaler.state if isinstance(scaler, PickledObject) else scaler
    if not isinstance(facts, dict):
        return None
    if "cur_iter" in facts:
        good_steps = (facts["cur_iter"] - 1 - facts["last_overflow_iter"]) % facts["scale_window"]
        return [float(facts["cur_scale"]), float(facts["cur_hysteresis"]), float(good_steps)]
    if not {"scale", "growth_tracker", "hysteresis_tracker"} <= facts.keys():
        return None
    return [_number(facts[name], path) for name in ("scale", "hysteresis_tracker", "growth_tracker")]


def _take(state: OptimizerState, entry: NamedParameter, values: Any, facts: dict[str, Any], path: Path) -> None:
    """Add to `state` one parameter's `values`; `facts`: its parameter group, which may hold the number of steps."""
    for kind, value in values.items():
        if kind == "step":
            continue
        if not isinstance(value, StoredTensor) or value.shape != entry.tensor.shape:
            raise CheckpointError(f"{path}: its optimizer's {kind} of {entry.there} is not of that parameter's shape, "
                                  f"{list(entry.tensor.shape)}{_REMEDY}")
        state.moments[f"{kind}/{entry.name}"] = value
    step = values.get("step", facts.get("step"))
    if values and step is not None:
        state.steps[entry.name] = _number(step, path)


def _take_masters(state: OptimizerState, masters: Any, groups: list[list[NamedParameter]], path: Path) -> None:
    """Add to `state` the fp32 masters, a list for each group, of those parameters that are in half precision."""
    halves = [[entry for entry in group if entry.tensor.dtype in _HALVES] for group in groups]
    if [len(group) for group in masters] != [len(group) for group in halves]:
        raise CheckpointError(f"{path}: its optimizer has fp32 values of {sum(map(len, masters))} parameters, its "
                              f"model {sum(map(len, halves))} in half precision{_REMEDY}")
    for group, members in zip(masters, halves, strict=True):
        for value, entry in zip(group, members, strict=True):
            if not isinstance(value, StoredTensor) or value.shape != entry.tensor.shape:
                raise CheckpointError(f"{path}: the fp32 values of {entry.there} are not of its shape, "
                                      f"{list(entry.tensor.shape)}{_REMEDY}")
            state.masters[entry.name] = value


def _number(value: Any, path: Path) -> float:
    """A number, or the only element of a tensor; raises CheckpointError for anything else."""
    if isinstance(value, StoredTensor):
        value = value.read()
        value = value.item() if value.numel() == 1 else None
    if not isinstance(value, int | float):
        raise CheckpointError(f"{path}: its optimizer has {str(value)[:40]!r} where a number belongs; copy it again")
    return float(value)
