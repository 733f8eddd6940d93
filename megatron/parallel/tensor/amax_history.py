"""Delayed scaling: FP8 scales come from the largest magnitudes (amax) that the layers saw in the last steps.

As in NVIDIA's TransformerEngine, except that the first step, without a history, takes its scales from its own tensors.
Shapes: l layers, p = 2 for a layer's input and its output's gradient, s steps, the latest first.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_gather_object, all_reduce_max
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor.fp8 import Amax, Amaxes
from megatron.parallel.tensor.layers import Matrix
from megatron.parallel.waits import read

_UNSEEN = 1.0  # the amax assumed for a tensor that was 0 in every step so far


class AmaxHistory:
    """The amax history of those layers of this rank's `stages` whose recipe delays scaling; it sets their `amaxes`.

    Ranks with the same layers have the same history. It is updated in place on the device: no step waits for it.
    """

    def __init__(self, stages: Iterable[nn.Module], mesh: Mesh) -> None:
        self._layers = {name: layer for stage in stages for name, layer in stage.named_modules()
                        if isinstance(layer, Matrix) and layer.recipe and layer.recipe.delay}
        self._mesh, size = mesh, len(self._layers)
        self._delay = next((layer.recipe.delay for layer in self._layers.values() if layer.recipe), None)
        num_steps = self._delay.num_steps if self._delay else 0
        self._before_slp = torch.zeros(num_steps, size, 2, device=mesh.device)
        self._known_lp = torch.ones(size, 2, device=mesh.device)
        # Each in memory of its own: to a compiled graph that writes to one, all that shares its memory has changed.
        self._seen = [torch.zeros(1, 1, device=mesh.device) for _ in range(2 * size)]
        self._probes = [torch.zeros(1, 1, device=mesh.device, requires_grad=layer.weight.requires_grad)
                        for layer in self._layers.values()]
        for probe, seen in zip(self._probes, self._seen[1::2], strict=True):
            if probe.requires_grad:
                probe.register_post_accumulate_grad_hook(partial(_take, seen))
        self.is_known = size == 0  # whether there is a history to scale the next step by
        self._give()

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """A context for one training step, whose amaxes join the history at its end; earlier ones are discarded."""
        for seen in self._seen:
            seen.zero_()
        yield
        if self._delay is not None:
            self._note()

    @torch.no_grad()
    def _note(self) -> None:
        seen_lp = torch.nan_to_num(torch.cat(self._seen).view(-1, 2), nan=0.0, posinf=0.0)
        for axis in (self._mesh.tensor, self._mesh.replicas):
            all_reduce_max(seen_lp, axis)
        # A tensor that was all 0 or not finite in this step keeps its amax of the step before.
        seen_lp = torch.where(seen_lp > 0, seen_lp, self._before_slp[0])
        self._before_slp.copy_(torch.cat([seen_lp[None], self._before_slp[:-1]]))
        self._choose()

    def _choose(self) -> None:
        assert self._delay is not None
        amax_lp = self._before_slp.amax(0) if self._delay.takes_max else self._before_slp[0]
        self._known_lp.copy_(torch.where(amax_lp > 0, amax_lp, _UNSEEN) * 2.0**self._delay.margin)
        if not self.is_known:
            self.is_known = True
            self._give()

    def _give(self) -> None:
        for layer, known_p, seen, probe in zip(self._layers.values(), self._known_lp, self._seen[::2], self._probes,
                                               strict=True):
            of_input, of_gradient = (known.view(1, 1) if self.is_known else None for known in known_p)
            # The gradient of a frozen layer's output is scaled by its own amax: there may be none in some steps.
            layer.amaxes = Amaxes(Amax(of_input, seen),
                                  Amax(of_gradient, probe) if probe.requires_grad else Amax())

    def state(self) -> dict[str, list[list[float]]]:
        """What a checkpoint keeps: each layer's history [p, s], by name, of all pipeline ranks' layers.

        A collective over the pipeline, also for ranks without such layers.
        """
        here = dict(zip(self._layers, read(self._before_slp.permute(1, 2, 0)).tolist(), strict=True))
        return {name: steps for part in all_gather_object(here, self._mesh.pipeline) for name, steps in part.items()}

    def load_state(self, state: Mapping[str, list[list[float]]]) -> None:
        """Continue from what `state()` returned, as many steps as are kept here; ignore it if it lacks a layer."""
        if self._delay is None or not state.keys() >= self._layers.keys():
            return
        saved_slp = torch.tensor([state[name] for name in self._layers]).permute(2, 0, 1)[:len(self._before_slp)]
        self._before_slp[:len(saved_slp)] = saved_slp.to(self._before_slp)
        self._choose()


@torch.no_grad()
def _take(seen: Tensor, probe: Tensor) -> None:
    """Move an amax, which arrives as the gradient of a probe, to `seen`."""
    assert probe.grad is not None
    seen.copy_(torch.maximum(seen, probe.grad))
    probe.grad = None
