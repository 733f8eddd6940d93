"""Muon: momentum, orthogonalised: all singular values become about 1 (Jordan, 2024, kellerjordan.github.io/posts/muon).

NorMuon (Li et al., 2025, arXiv 2510.05491) also normalises the rows, whose lengths differ after that.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.kernels.device import in_one_kernel, takes_gpu_way
from megatron.kernels.newton_schulz.orthogonal import orthogonalised, working_dtype
from megatron.optim.decay import decay
from megatron.parallel.matrices.exchange import MatrixResult, WholeMatrices
from megatron.parallel.mesh import Mesh

_MOMENTUM_AT_START = 0.85
_EPSILON = 1e-8


class Muon(torch.optim.Optimizer):
    """Steps matrices; each rank steps its parts, with the result that one rank would get for the whole matrices.

    A step is `lr` times a matrix whose singular values are about 1, times sqrt(rows / columns) if that is above 1. So
    it changes a layer's outputs equally at any width (Yang et al., 2023, arXiv 2310.17813), and a learning rate tuned
    on a narrow model also suits a wide one. Weight decay is decoupled. Like torch's fused optimizers, it divides
    gradients by `grad_scale`, and where `found_inf` is 1 it changes nothing but the step count, which momentum's
    warm-up follows; the host does not wait to know. State of each parameter: `momentum_buffer`, and with NorMuon
    `row_moment`, a number per row of its whole matrices, one matrix after another, the same on every rank.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: list[dict], config: OptimizerConfig, mesh: Mesh) -> None:
        super().__init__(groups, {"lr": 0.0, "step": 0})
        self._config, self._evens_rows = config, config.optimizer == "normuon"
        self._of_parameter = [(parameter, place) for place, group in enumerate(self.param_groups)
                              for parameter in group["params"]]
        parameters = [parameter for parameter, _ in self._of_parameter]
        self._matrices = WholeMatrices(parameters, mesh, working_dtype(parameters[0]), self._evens_rows) if (
            parameters) else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients, which are overwritten."""
        for group in self.param_groups:
            group["step"] += 1
        if self._matrices is None:
            return
        is_taken = 1 - self.found_inf
        rates = [self._rates(group, is_taken) for group in self.param_groups]
        updates = [self._mixed_with_momentum(parameter, rates[place], is_taken)
                   for parameter, place in self._of_parameter]
        for results in self._matrices.worked_on(updates, self._orthogonalised):
            number = results[0].matrix.parameter
            parameter, place = self._of_parameter[number]
            update = self._matrices.joined(number, list(self._scaled(results, self.state[parameter], is_taken)))
            # Detached, since torch.compile takes the shapes of parameters as constants.
            _advance(parameter.detach(), update, rates[place].step, rates[place].decay,
                     self._config.cautious_weight_decay)

    def momentum(self, step: int) -> float:
        """The momentum of step number `step`, counted from 1: it rises linearly during its warm-up."""
        end, warmup = self._config.muon_momentum, self._config.muon_momentum_warmup_iters
        start = min(_MOMENTUM_AT_START, end)
        return start + (end - start) * min(1.0, step / warmup) if warmup else end

    def _rates(self, group: dict, is_taken: Tensor) -> "_Rates":
        momentum, step = self.momentum(group["step"]), group["lr"] * is_taken
        return _Rates(torch.full_like(is_taken, momentum), (1 - momentum) * is_taken, step,
                      step * group["weight_decay"] if group["weight_decay"] else None)

    def _mixed_with_momentum(self, parameter: Tensor, rates: "_Rates", is_taken: Tensor) -> Tensor:
        """Nesterov momentum: update the momentum buffer, and mix the gradient with it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        _mix(parameter.grad, state["momentum_buffer"], self.grad_scale, is_taken, rates.momentum, rates.gradient)
        return parameter.grad

    def _orthogonalised(self, stack_kmn: Tensor) -> Tensor:
        return orthogonalised(stack_kmn, self._config.muon_num_ns_steps)

    def _scaled(self, results: list[MatrixResult], state: dict[str, Tensor], is_taken: Tensor) -> Iterator[Tensor]:
        """This rank's parts of a parameter's orthogonalised matrices, scaled by shape, and with NorMuon by row."""
        scales = self._row_scales(results, state, is_taken) if self._evens_rows else [None] * len(results)
        for result, scale_m in zip(results, scales, strict=True):
            rows, columns = result.matrix.shape
            part = result.part if rows <= columns else result.part * (rows / columns)**0.5
            yield part if scale_m is None else part * scale_m[result.rows, None]

    def _row_scales(self, results: list[MatrixResult], state: dict[str, Tensor], is_taken: Tensor) -> Iterable[Tensor]:
        """For each matrix the factors [m] of its rows: they equalise the rows' recent root mean squares, and keep the
        matrix's norm."""
        squares = torch.cat([result.squares for result in results])
        if "row_moment" not in state:
            state["row_moment"] = torch.zeros_like(squares)
        state["row_moment"].lerp_(squares, (1 - self._config.normuon_beta2) * is_taken)
        for result, moment_m in zip(results, state["row_moment"].split([len(r.squares) for r in results]), strict=True):
            inverse_m = 1 / (moment_m.sqrt() + _EPSILON)
            after = (result.squares * inverse_m.square()).sum()
            yield inverse_m * (result.squares.sum() / after.clamp(min=_EPSILON)).sqrt()


class _Rates(NamedTuple):
    """A step's numbers for the parameters of a group, on the device; all but `momentum` are 0 if it is not taken.

    They are tensors, since torch.compile (2.13) may keep the value that a float had when it compiled.
    """

    momentum: Tensor
    gradient: Tensor  # how far the momentum buffer goes towards the gradient
    step: Tensor
    decay: Tensor | None


@in_one_kernel("muon_mix", changes=("gradient", "buffer"))
def _mix(gradient: Tensor, buffer: Tensor, divisor: Tensor, is_taken: Tensor, momentum: Tensor, share: Tensor) -> None:
    """Divide the gradient, move the buffer towards it by `share`, and it towards the buffer by `momentum`, in place.

    `is_taken`: 1, or 0 where the gradient, which may not be finite, counts as 0.
    """
    gradient.div_(divisor)
    if takes_gpu_way(gradient):
        gradient.masked_fill_(is_taken == 0, 0.0)
    elif not is_taken:  # on a CPU there is nothing to wait for
        gradient.zero_()
    buffer.lerp_(gradient, share)
    gradient.lerp_(buffer, momentum)


@in_one_kernel("muon_advance", changes=("parameter",))
def _advance(parameter: Tensor, update: Tensor, rate: Tensor, share: Tensor | None, is_cautious: bool) -> None:
    """Let a parameter decay by `share`, and take the step of `rate` times the update, in place."""
    if share is not None:
        decay(parameter, share, parameter * update if is_cautious else None)
    parameter.addcmul_(update.to(parameter.dtype), -rate)
