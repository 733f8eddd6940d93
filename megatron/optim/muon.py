"""Muon: momentum, orthogonalised: all singular values become about 1 (Jordan, 2024, kellerjordan.github.io/posts/muon).

NorMuon (Li et al., 2025, arXiv 2510.05491) also normalises the rows, whose lengths differ after that.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.kernels.device import takes_gpu_way
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
        self._of_parameter = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
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
        updates = [self._mixed_with_momentum(parameter, group["step"], is_taken)
                   for parameter, group in self._of_parameter]
        for results in self._matrices.worked_on(updates, self._orthogonalised):
            number = results[0].matrix.parameter
            parameter, group = self._of_parameter[number]
            update = self._matrices.joined(number, list(self._scaled(results, self.state[parameter], is_taken)))
            rate = group["lr"] * is_taken
            if group["weight_decay"]:
                along = parameter * update if self._config.cautious_weight_decay else None
                decay(parameter, group["weight_decay"] * rate, along)
            parameter.addcmul_(update.to(parameter.dtype), -rate)

    def momentum(self, step: int) -> float:
        """The momentum of step number `step`, counted from 1: it rises linearly during its warm-up."""
        end, warmup = self._config.muon_momentum, self._config.muon_momentum_warmup_iters
        start = min(_MOMENTUM_AT_START, end)
        return start + (end - start) * min(1.0, step / warmup) if warmup else end

    def _mixed_with_momentum(self, parameter: Tensor, step: int, is_taken: Tensor) -> Tensor:
        """Nesterov momentum: update the momentum buffer, and mix the gradient with it."""
        assert parameter.grad is not None
        gradient, momentum, state = parameter.grad, self.momentum(step), self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient.div_(self.grad_scale)
        if takes_gpu_way(gradient):
            gradient.masked_fill_(is_taken == 0, 0.0)
        elif not is_taken:  # on a CPU there is nothing to wait for
            gradient.zero_()
        state["momentum_buffer"].lerp_(gradient, (1 - momentum) * is_taken)
        return gradient.lerp_(state["momentum_buffer"], momentum)

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
