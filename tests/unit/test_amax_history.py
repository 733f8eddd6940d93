"""Delayed scaling for FP8 against a history of largest magnitudes in NumPy.

Growing values saturate; values that are not finite are noticed, and left out of the history.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron.config import PrecisionConfig
from megatron.kernels.fp8 import E4M3, E5M2, Delay, Recipe, dequantised, quantised, recipe_of
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import Normal
from megatron.parallel.tensor.amax_history import AmaxHistory
from megatron.parallel.tensor.layers import ColumnParallelLinear, products_together
from megatron.parallel.tensor.stream import ONE_RANK_STREAM

TOKENS, IN, OUT = 32, 48, 64
MAX = Delay(3, True, 0)
DELAYS = [MAX, Delay(3, False, 0), Delay(1, True, 2), Delay(5, True, 1)]
# By what inputs and gradients of each step's micro-batches are multiplied.
SIZES = [(1.0, 2.0), (8.0, 0.5), (0.25, 0.125), (0.25, 0.25), (0.0, 0.0), (0.5, 0.01), (float("nan"), 1.0), (3.0, 4.0)]


def made(delay, gradients=E5M2, num_layers=1):
    """Layers, with values, and their history."""
    layers = [ColumnParallelLinear(IN, OUT, ONE_RANK_STREAM, Normal(1.0)) for _ in range(num_layers)]
    for number, layer in enumerate(layers):
        layer.recipe = Recipe("tensorwise", gradients, delay)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(number))
        torch.nn.init.zeros_(layer.bias)
    return layers, AmaxHistory([torch.nn.ModuleList(layers)], Mesh())


def values(width, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(TOKENS, width, generator=generator).bfloat16()


def passed(layer, x, gradient):
    """The output, and the gradients of input and weight."""
    layer.weight.grad, x = None, x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, layer.weight.grad


def expected_amaxes(delay, steps):
    """By which magnitude each step is scaled, and the one after the last, of those of steps' tensors; 0: by its own."""
    kept, found = [], [0.0]
    for tensors in steps:
        amax = max(np.abs(tensor).max() for tensor in tensors)
        if not np.isfinite(amax) or amax == 0:
            amax = kept[-1] if kept else 0.0
        kept.append(amax)
        found.append((max(kept[-delay.num_steps:]) if delay.takes_max else kept[-1]) * 2.0**delay.margin)
    return found


@pytest.mark.parametrize("delay", DELAYS)
def test_each_step_is_scaled_by_the_largest_magnitudes_of_those_before(delay):
    (layer,), history = made(delay)
    inputs = [[values(IN, 10 * step + part, size) for part, size in enumerate(sizes)]
              for step, sizes in enumerate(SIZES)]
    gradients = [[values(OUT, 10 * step + 5 + part, size) for part, size in enumerate(sizes)]
                 for step, sizes in enumerate(SIZES)]
    scaled_by = [expected_amaxes(delay, [[part.float().numpy() for part in step] for step in tensors])
                 for tensors in (inputs, gradients)]
    weight = dequantised(quantised(layer.weight.detach().bfloat16(), layer.weight.detach().bfloat16().abs().amax()
                                   .float().view(1, 1), "tensorwise", E4M3))
    for step, parts in enumerate(zip(inputs, gradients, strict=True)):
        with history.of_step():
            for x, gradient in zip(*parts, strict=True):
                amax_x, amax_gradient = (torch.tensor(amaxes[step] or tensor.abs().amax().item()).view(1, 1).float()
                                         for amaxes, tensor in zip(scaled_by, (x, gradient), strict=True))
                x8 = dequantised(quantised(x, amax_x, "tensorwise", E4M3))
                gradient8 = dequantised(quantised(gradient, amax_gradient, "tensorwise", E5M2))
                outcome = passed(layer, x, gradient)
                for ours, exact in zip(outcome, (x8 @ weight.t(), gradient8 @ weight, gradient8.t() @ x8), strict=True):
                    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=2.0**-7, atol=1e-6, equal_nan=True)
        known = [amax.known.item() for amax in layer.amaxes]
        assert known == [amaxes[step + 1] for amaxes in scaled_by]


def test_what_has_grown_since_is_cut_off_at_the_largest_number_and_shapes_the_next_step():
    (layer,), history = made(Delay(2, True, 1))
    with history.of_step():
        passed(layer, torch.ones(TOKENS, IN).bfloat16(), torch.ones(TOKENS, OUT).bfloat16())
    x, gradient = torch.ones(TOKENS, IN).bfloat16(), torch.ones(TOKENS, OUT).bfloat16()
    x[3], gradient[5] = 64.0, -64.0
    # An amax of 1, and room for 2, in E4M3 a scale of 2^-7 (448 x 2^-8 < 2), in E5M2 of 2^-14.
    with history.of_step():
        outcome = passed(layer, x, gradient)
    x[3], gradient[5] = 448 * 2.0**-7, -57344 * 2.0**-14
    for ours, cut_off in zip(outcome, passed(*made(None)[0], x, gradient), strict=True):
        assert torch.equal(ours, cut_off)
    assert [amax.known.item() for amax in layer.amaxes] == [128.0, 128.0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_seen_in_the_product_under_a_known_scale(value):
    (layer,), history = made(MAX)
    with history.of_step():
        passed(layer, values(IN, 0), values(OUT, 1))
    x, gradient = values(IN, 2), values(OUT, 3)
    x[3, 4] = value
    y, _, of_weight = passed(layer, x, gradient)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and not of_weight.isfinite().all()
    gradient[3, 4] = value
    assert not passed(layer, values(IN, 2), gradient)[1][3].isfinite().any()


def test_what_is_seen_between_steps_and_what_is_computed_again_changes_nothing():
    known = []
    for is_disturbed in (False, True):
        (layer,), history = made(MAX)
        for step in range(3):
            if is_disturbed:
                with torch.no_grad():
                    layer(values(IN, 9, 100.0))
            x = values(IN, step).requires_grad_()
            with history.of_step():
                y = checkpoint(layer, x, use_reentrant=False) if is_disturbed else layer(x)
                y.backward(values(OUT, step))
        known.append([amax.known.item() for amax in layer.amaxes])
    assert known[0] == known[1]


def test_layers_multiplied_together_share_the_inputs_scale_and_have_their_own_of_gradients():
    layers, history = made(MAX, num_layers=2)
    x = values(IN, 1)
    with history.of_step():
        outputs = [y for y, _ in products_together(x.clone().requires_grad_(), *layers)]
        torch.autograd.backward(outputs, [values(OUT, 2), values(OUT, 3, 16.0)])
    assert layers[0].amaxes.input.known.item() == x.abs().max().item()
    for layer, gradient in zip(layers, (values(OUT, 2), values(OUT, 3, 16.0)), strict=True):
        assert layer.amaxes.gradient.known.item() == gradient.abs().max().item()


@pytest.mark.parametrize("num_steps", [2, 3, 5])
def test_a_history_goes_on_with_as_many_of_its_steps_as_are_kept(num_steps):
    layers, history = made(MAX, num_layers=2)
    for step in range(4):
        with history.of_step():
            for number, layer in enumerate(layers):
                passed(layer, values(IN, step, 2.0**-step), values(OUT, 9 * step + number, 2.0**step))
    others, resumed = made(Delay(num_steps, True, 0), num_layers=2)
    assert not resumed.is_known
    resumed.load_state(history.state())
    assert resumed.is_known
    for name, kinds in resumed.state().items():
        for ours, saved in zip(kinds, history.state()[name], strict=True):
            assert ours == [*saved[:num_steps], *[0.0] * (num_steps - 3)]
            assert len({*saved}) == 3
    newest = [values(IN, step, 2.0**-step).abs().max().item() for step in range(4)][-min(3, num_steps):]
    assert others[0].amaxes.input.known.item() == max(newest)
    assert all(before > after for before, after in pairwise(newest))


def test_a_layer_that_is_not_trained_has_gradients_scaled_as_they_are():
    layer = ColumnParallelLinear(IN, OUT, ONE_RANK_STREAM, Normal(1.0)).requires_grad_(False)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    layer.recipe = Recipe("tensorwise", E5M2, MAX)
    history = AmaxHistory([layer], Mesh())
    for size in (1.0, 2.0**-40):
        with history.of_step():
            assert not layer(values(IN, 0)).requires_grad
            x, gradient = values(IN, 0).requires_grad_(), values(OUT, 1, size)
            layer(x).backward(gradient)
        gradient8 = dequantised(quantised(gradient, gradient.abs().amax().float().view(1, 1), "tensorwise", E5M2))
        torch.testing.assert_close(x.grad.float(), gradient8.sum(1, keepdim=True).expand(-1, IN), rtol=2.0**-7, atol=0)
    assert layer.amaxes.input.known is not None and layer.amaxes.gradient.known is None


def test_a_history_that_lacks_a_layer_begins_afresh():
    _, history = made(MAX)
    with history.of_step():
        pass
    (layer, _), other = made(MAX, num_layers=2)
    other.load_state(history.state())
    assert not other.is_known and layer.amaxes.input.known is None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.table)])
def test_torch_compile_takes_a_layer_whole_with_the_same_numbers_and_the_same_history(backend):
    torch._dynamo.reset()
    outcomes = []
    for is_compiled in (False, True):
        (first, second), history = made(MAX, num_layers=2)

        def run(x, first=first, second=second):
            return first(x) + second(x.tanh())

        function = torch.compile(run, backend=backend, fullgraph=True, dynamic=False) if is_compiled else run
        found = []
        for step in range(3):
            x = values(IN, step, 2.0**step).requires_grad_()
            with history.of_step():
                outputs = [function(x * factor) for factor in (1.0, 4.0)]  # a pipeline goes forward more than once
                for y in outputs:
                    y.backward(values(OUT, step, 2.0**-step))
            found += [*(y.detach() for y in outputs), x.grad, history._before_slp.clone()]
        outcomes.append([*found, first.weight.grad, second.weight.grad])
    for eager, compiled in zip(*outcomes, strict=True):
        if backend == "aot_eager":
            assert torch.equal(eager, compiled)
        else:
            assert (eager.float() - compiled.float()).norm() <= 2.0**-5 * eager.float().norm()


def test_flags_make_the_recipe():
    assert recipe_of(PrecisionConfig(fp8="hybrid", fp8_recipe="delayed")) == Recipe("tensorwise", E5M2,
                                                                                  Delay(16, True, 0))
    assert recipe_of(PrecisionConfig(fp8="e4m3", fp8_recipe="delayed", fp8_amax_history_len=4, fp8_margin=1,
                                     fp8_amax_compute_algo="most_recent")) == Recipe("tensorwise", E4M3,
                                                                                     Delay(4, False, 1))
