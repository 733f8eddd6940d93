"""The optimizer: groups parameters by their declarations, chooses implementations, and takes steps or skips them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config import OptimizerConfig
from megatron.errors import ConfigError
from megatron.optim.decay import BesideAdamW
from megatron.optim.muon import Muon
from megatron.optim.scaling import LossScale
from megatron.optim.sgd import DecoupledSGD
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import gradient_norm, is_any_trained
from megatron.parallel.waits import read

_ONE_RANK_MESH = Mesh()


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step, as scalars on the device."""

    grad_norm: Tensor  # L2 norm of the whole gradient, unscaled, before clipping
    is_taken: Tensor  # bool: False where the step was skipped


class Optimizer:
    """Steps fp32 parameters along their summed, loss-scaled gradients; keeps no state of frozen ones.

    A step whose gradients are not all finite changes nothing. `parameters`: this rank's part of each, by name.
    `peak_lr`: the schedule's; a group with a learning rate of its own follows the schedule in proportion to it.
    `is_captured`: steps are captured as a CUDA graph, so that all they read must keep its address. `varies_decay`: the
    weight decay changes over the run. A collective; raises ConfigError if all parameters are frozen.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, mesh: Mesh = _ONE_RANK_MESH,
                 peak_lr: float | None = None, is_captured: bool = False, varies_decay: bool = False) -> None:
        if not is_any_trained(parameters.values(), mesh.pipeline):
            raise ConfigError("every parameter of the model is frozen, so there is nothing to train; leave some "
                              "trainable")
        self._all, self._pipeline = list(parameters.values()), mesh.pipeline
        self._trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._clip_grad = config.clip_grad
        self._is_apex = config.optimizer_backend == "apex"
        peaks = {"matrix": config.muon_lr, "embedding": config.embedding_lr, "head": config.head_lr,
                 "vector": config.scalar_lr}
        self._lr_scales = {group: lr / peak_lr for group, lr in peaks.items() if lr is not None and peak_lr}
        self._is_captured = is_captured
        groups = _groups(self._all, config.weight_decay, varies_decay)
        self.inner = _build(groups, config, mesh, is_captured, is_captured and varies_decay)
        if is_captured:
            for group in self._param_groups():
                group["lr"] = torch.zeros((), device=self._all[0].device)
                if varies_decay:
                    group["decay"] = torch.zeros((), device=self._all[0].device)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the following steps; groups with their own peak get theirs in proportion."""
        rates = self.learning_rates(learning_rate)
        for group in self._param_groups():
            _set(group, "lr", rates.get(group["group"], learning_rate))

    def set_weight_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the following steps, for all parameters that decay."""
        for group in self._param_groups():
            if group["decays"]:
                _set(group, "decay" if "decay" in group else "weight_decay", weight_decay)

    def step(self, learning_rate: float | None, loss_scale: LossScale,
             is_normal: Callable[[Tensor], Tensor] | None = None) -> StepOutcome:
        """Unscale and clip the gradients, update the parameters, clear the gradients, update `loss_scale`.

        `learning_rate`: None keeps the one set before. `is_normal`: from the gradient's norm, whether to take the step,
        both scalars on the device.
        """
        if learning_rate is not None:
            self.set_learning_rate(learning_rate)
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        assert len(gradients) == len(self._trained), "every parameter that is trained takes part in the loss"
        scale = loss_scale.value
        norm = gradient_norm(self._all, self._pipeline) / scale
        is_finite = torch.isfinite(norm)
        is_taken = is_finite if is_normal is None else is_finite & is_normal(norm)
        # Megatron's clipping: multiply by max_norm / (norm + 1e-6) if that is below 1.
        divisor = scale * torch.clamp((norm + 1e-6) / self._clip_grad, min=1.0) if self._clip_grad else scale
        for inner in self.inner:
            if not self._is_apex:
                # As torch.amp.GradScaler does: the fused kernels divide by grad_scale and skip where found_inf is 1.
                inner.grad_scale = divisor  # type: ignore[attr-defined]
                inner.found_inf = (~is_taken).float()  # type: ignore[attr-defined]
                inner.step()
            elif bool(read(is_taken)):
                torch._foreach_div_(gradients, divisor)
                inner.step()
            if self._is_apex:
                inner.zero_grad()
            else:
                inner.zero_grad(set_to_none=not self._is_captured)
        loss_scale.update(is_finite)
        return StepOutcome(norm, is_taken)

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """The learning rates of the groups that have their own, when that of all others is `learning_rate`."""
        return {group: learning_rate * scale for group, scale in self._lr_scales.items()}

    def state(self) -> dict[str, Tensor]:
        """This rank's state tensors, by `KIND/PARAMETER`, e.g. `exp_avg/lm_head.bias`."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._trained.items()}
        state = {f"{kind}/{names[parameter]}": tensor for inner in self.inner
                 for parameter, values in inner.state.items()
                 for kind, tensor in values.items() if isinstance(tensor, Tensor)}
        for group in self._param_groups():
            if "step" in group:  # apex and Muon count steps per group, torch per parameter
                state |= {f"step/{names[p]}": torch.tensor(float(group["step"])) for p in group["params"]}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state()` of any implementation returned, except for parameters that are frozen by now."""
        for inner in self.inner:
            mine = {name: parameter for name, parameter in self._trained.items()
                    if any(parameter is one for group in inner.param_groups for one in group["params"])}
            counts_by_group = self._is_apex or isinstance(inner, Muon)
            for key, tensor in state.items():
                kind, name = key.split("/", 1)
                if name in mine and not (counts_by_group and kind == "step"):
                    inner.state[mine[name]][kind] = tensor.to(mine[name].device)
            if counts_by_group:
                steps = [int(state[f"step/{name}"]) for name in mine if f"step/{name}" in state]
                for group in inner.param_groups:
                    group["step"] = max(steps, default=0)

    def _param_groups(self) -> list[dict]:
        return [group for inner in self.inner for group in inner.param_groups]


def _set(group: dict, name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float, varies_decay: bool) -> list[dict]:
    """Parameter groups for torch's optimizers: one for each combination of declared `group` and `decays`.

    Frozen parameters are left out, but their group stays, perhaps empty: torch's optimizers refuse to have no group.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        declaration = declaration_of(parameter)
        members = groups.setdefault((declaration.group, declaration.decays), [])
        members += [parameter] if parameter.requires_grad else []
    return [{"params": members, "group": group, "weight_decay": weight_decay if decays else 0.0,
             "decays": decays and (weight_decay > 0 or varies_decay)} for (group, decays), members in groups.items()]


def _build(groups: list[dict], config: OptimizerConfig, mesh: Mesh, is_captured: bool,
           captures_decay: bool) -> list[torch.optim.Optimizer]:
    """The optimizers that step the groups: one for all, or Muon for matrices and AdamW for the others."""
    betas = (config.adam_beta1, config.adam_beta2)

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"betas": betas, "eps": config.adam_eps, "capturable": is_captured}
        if config.cautious_weight_decay or captures_decay:
            return BesideAdamW(groups, is_cautious=config.cautious_weight_decay, **options)
        return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)

    if config.uses_muon:
        matrices, others = ([group for group in groups if (group["group"] == "matrix") is is_matrix]
                            for is_matrix in (True, False))
        return [*([Muon(matrices, config, mesh)] if matrices else []), *([adamw(others)] if others else [])]
    if config.optimizer_backend == "torch":
        return [adamw(groups) if config.optimizer == "adam" else DecoupledSGD(groups, momentum=config.sgd_momentum)]
    try:
        from apex.optimizers import FusedAdam, FusedSGD  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"--optimizer-backend apex: apex cannot be imported ({error}); install it, or give "
                          "torch") from error
    groups = [group for group in groups if group["params"]]  # apex reads the first parameter of each
    if not groups:
        return []
    if config.optimizer == "adam":
        return [FusedAdam(groups, lr=0.0, betas=betas, eps=config.adam_eps)]
    return [FusedSGD(groups, lr=0.0, momentum=config.sgd_momentum, wd_after_momentum=True)]
