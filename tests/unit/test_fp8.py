"""FP8 numbers against a table of all of them, products and gradients against fp64, and the requirements of GPUs."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron.config import PrecisionConfig
from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.kernels import fp8
from megatron.kernels.fp8 import (
    E4M3,
    E5M2,
    MX_BLOCK,
    Recipe,
    Scaling,
    dequantised,
    largest,
    product,
    product_reference,
    quantised,
    recipe_of,
    swizzled,
    way_of,
)
from megatron.parallel.layout import check_layout
from megatron.parallel.parameters import Normal
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, products_together
from megatron.parallel.tensor.stream import ONE_RANK_STREAM

SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise", "mxfp8")
TOKENS, IN, OUT = 64, 128, 96
# Half of the distance of neighbours, of the smallest number that has that distance.
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}


def table(dtype):
    """By definition: the value of each of the 128 codes without a sign, infinite or NaN where it is no number."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == E4M3 else (5, 2, 15)
    exponent, mantissa = np.divmod(np.arange(128), 2**mantissa_bits)
    values = np.where(exponent == 0, mantissa * 2.0**(1 - bias - mantissa_bits),
                      (1 + mantissa / 2.0**mantissa_bits) * 2.0**(exponent - bias))
    if dtype == E4M3:
        values[127] = np.nan
    else:
        values[exponent == 2**exponent_bits - 1] = np.nan
    return values


def rounded(x, dtype):
    """The nearest number of the table, of two the one with the even code, the largest for whatever is larger."""
    values = table(dtype)
    numbers = values[~np.isnan(values)]
    distance = np.abs(np.abs(x)[..., None] - numbers)
    nearest = distance == distance.min(-1, keepdims=True)
    is_even = np.arange(len(numbers)) % 2 == 0
    code = np.where((nearest & is_even).any(-1), (nearest & is_even).argmax(-1), nearest.argmax(-1))
    return np.copysign(numbers[code], x)


def normal(*shape, seed=0, spread=2.0):
    """bf16 of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
            ).bfloat16()


def in_fp8(x, scaling, dim, dtype=E4M3):
    return quantised(x, largest(x, scaling, dim), scaling, dtype).along(dim)


def scales_by_definition(x, scaling, dtype):
    """Like `x`, fp64: of what shares a scale along rows, the least power of two that brings the largest into range."""
    blocks = {"tensorwise": x.reshape(1, -1), "rowwise": x, "mxfp8": x.reshape(-1, MX_BLOCK)}[scaling]
    amax = np.abs(blocks).max(1, keepdims=True)
    powers = 2.0**np.arange(-126, 128)
    scales = powers[(amax <= np.nanmax(table(dtype)) * powers).argmax(1)]
    return np.broadcast_to(scales[:, None], blocks.shape).reshape(x.shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_tables_are_pytorchs(dtype):
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).double().numpy()
    np.testing.assert_array_equal(np.where(np.isinf(codes), np.nan, codes), table(dtype))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dim", [0, 1])
def test_each_number_becomes_the_nearest_that_there_is_after_scaling_by_the_least_power_of_two(dtype, scaling, dim):
    x = normal(TOKENS, IN, spread=4.0)
    x[:2, :2] = 0
    rows = (x if dim == 1 else x.t()).double().numpy()
    scales = scales_by_definition(rows, scaling, dtype)
    ours = in_fp8(x, scaling, dim, dtype)
    np.testing.assert_array_equal(ours.values.double().numpy(), rounded(rows / scales, dtype))
    np.testing.assert_array_equal(dequantised(ours).double().numpy(), rounded(rows / scales, dtype) * scales)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_halfway_numbers_go_to_the_even_code_and_too_large_ones_to_the_largest(dtype):
    values = table(dtype)
    numbers = values[~np.isnan(values)]
    x = torch.from_numpy(np.concatenate([(numbers[1:] + numbers[:-1]) / 2, [numbers[-1] * 1.5]])).float()[None]
    ours = quantised(x, torch.full((1, 1), numbers[-1]), "tensorwise", dtype)
    np.testing.assert_array_equal(ours.values.double().numpy()[0], rounded(x.double().numpy()[0], dtype))
    assert ours.scale.item() == 1


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen_in_the_product(scaling):
    zero, other = torch.zeros(32, 64).bfloat16(), in_fp8(normal(32, 64), scaling, 1)
    assert not product(in_fp8(zero, scaling, 1), other, torch.float32).any()
    for value in (float("inf"), float("nan")):
        zero[3, 5] = value
        found = product(in_fp8(zero, scaling, 1), other, torch.float32)
        assert not found[3].isfinite().any()


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_product_is_off_by_no_more_than_its_factors_are_rounded(scaling, gradients):
    x, w = normal(TOKENS, IN, spread=0.5), normal(OUT, IN, seed=1, spread=0.5)
    ours = product(in_fp8(x, scaling, 1, gradients), in_fp8(w, scaling, 1), torch.float32).double()
    exact, sizes = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    relative = (1 + ROUNDING[gradients]) * (1 + ROUNDING[E4M3]) - 1
    assert ((ours - exact).abs() <= 1.001 * relative * sizes).all()
    assert ((ours - exact).abs() > 0.01 * relative * sizes).any()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch 2.11 has scaled_mm on GPUs alone")
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_the_reference_gives_what_pytorchs_scaled_mm_gives_on_a_cpu(scaling):
    a, b = in_fp8(normal(TOKENS, IN), scaling, 1, E5M2), in_fp8(normal(OUT, IN, seed=1), scaling, 1)
    theirs = fp8._scaled_product(a, b, torch.float32, False)
    torch.testing.assert_close(product_reference(a, b, torch.float32), theirs, rtol=1e-5, atol=1e-5)


def test_scales_of_blocks_lie_where_cublas_reads_them():
    scale = torch.randint(1, 255, (200, 6), dtype=torch.uint8)
    ours, tiles = swizzled(scale), 2
    assert len(ours) == 256 * 8
    for row in range(200):
        for column in range(6):
            tile = row // 128 * tiles + column // 4
            place = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            assert ours[512 * tile + place] == scale[row, column]
    assert ours.long().sum() == scale.long().sum()


def layers(kind, recipe):
    """Layers of a kind that are multiplied together, with values, and the function of an input that does."""
    if kind == "row":
        made = [RowParallelLinear(IN, OUT, ONE_RANK_STREAM, Normal(1.0))]
    else:
        made = [ColumnParallelLinear(IN, OUT, ONE_RANK_STREAM, Normal(1.0)) for _ in range(2 if kind == "gated" else 1)]
    for number, layer in enumerate(made):
        layer.recipe = recipe
        with torch.no_grad():
            layer.weight.copy_(normal(OUT, IN, seed=number + 1, spread=0.5))
            layer.bias.copy_(normal(OUT, seed=number + 7))
    return made, (lambda x: [y for y, _ in products_together(x, *made)]) if kind == "gated" else (
        lambda x: [made[0](x)])


@pytest.mark.parametrize("has_copies", [False, True])
@pytest.mark.parametrize("kind", ["column", "row", "gated"])
@pytest.mark.parametrize("recipe", [Recipe(scaling, dtype) for scaling in SCALINGS for dtype in (E4M3, E5M2)])
def test_outputs_and_gradients_are_those_of_the_rounded_factors(kind, recipe, has_copies, monkeypatch):
    monkeypatch.setattr("megatron.parallel.tensor.layers.adds_biases", lambda _: False)
    made, run = layers(kind, recipe)
    if has_copies:
        for layer in made:
            layer.weight.data.mul_(1.5)
        copies = ComputeCopies(made, torch.bfloat16)
        for layer in made:
            layer.weight.data.div_(1.5)
        copies.refresh()
    x = normal(TOKENS, IN).requires_grad_()
    outputs = run(x)
    gradients = [normal(TOKENS, OUT, seed=number + 3) for number in range(len(made))]
    torch.autograd.backward(outputs, gradients)

    def stands_for(tensor, dim, dtype=E4M3):
        found = dequantised(in_fp8(tensor.detach().bfloat16(), recipe.scaling, dim, dtype)).double()
        return found if dim == 1 else found.t()

    input_gradient = torch.zeros(TOKENS, IN, dtype=torch.float64)
    for layer, output, gradient in zip(made, outputs, gradients, strict=True):
        expected = stands_for(x, 1) @ stands_for(layer.weight, 1).t() + layer.bias.detach().double()
        assert off_by(output, expected) < 2.0**-8
        input_gradient += stands_for(gradient, 1, recipe.gradients) @ stands_for(layer.weight, 0)
        expected = stands_for(gradient, 0, recipe.gradients).t() @ stands_for(x, 0)
        assert layer.weight.grad.dtype == torch.float32
        assert off_by(layer.weight.grad, expected) < 1e-6
        assert off_by(layer.bias.grad, gradient.double().sum(0)) < 1e-6
    assert off_by(x.grad, input_gradient) < 2.0**-8


def off_by(ours, exact):
    """Relative to the norm."""
    return ((ours.detach().double() - exact).norm() / exact.norm()).item()


def test_weight_gradients_add_up_in_fp32_over_micro_batches():
    (layer,), run = layers("column", Recipe("tensorwise", E5M2))
    alone = []
    for seed in (3, 4):
        layer.weight.grad = None
        run(normal(TOKENS, IN, seed=seed))[0].backward(normal(TOKENS, OUT, seed=seed + 5))
        alone.append(layer.weight.grad.clone())
    run(normal(TOKENS, IN, seed=3))[0].backward(normal(TOKENS, OUT, seed=8))
    torch.testing.assert_close(layer.weight.grad, alone[0] + alone[1], rtol=0, atol=0)


_scaled_mm = torch._scaled_mm


@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gpu_is_given_products_that_it_takes(scaling, is_compiling, monkeypatch):
    """PyTorch checks on `meta` what cuBLAS asks of layouts, sizes and scales; of the public function up to 2.13."""
    module, name = (torch, "_scaled_mm") if is_compiling else (F, "scaled_mm")
    function, seen = getattr(module, name), []

    def noting(a, b, *arguments, **options):
        dtype = options["out_dtype" if is_compiling else "output_dtype"]
        seen.append((a.dtype, b.dtype, a.shape, b.shape, dtype, options["use_fast_accum"]))
        return function(a, b, *arguments, **options)

    monkeypatch.setattr(module, name, noting)
    if is_compiling:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer = layers("column", Recipe(scaling, E5M2))[0][0].to("meta")
    x = torch.empty(TOKENS, IN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer(x).backward(torch.empty(TOKENS, OUT, dtype=torch.bfloat16, device="meta"))
    of_weights = torch.bfloat16 if scaling == "rowwise" else torch.float32
    assert seen == [
        (E4M3, E4M3, (TOKENS, IN), (IN, OUT), torch.bfloat16, scaling != "mxfp8"),
        (E5M2, E4M3, (TOKENS, OUT), (OUT, IN), torch.bfloat16, False),
        (E5M2, E4M3, (OUT, TOKENS), (TOKENS, IN), of_weights, False)]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_a_gpu_does_not_take_is_refused_on_meta(scaling, monkeypatch):
    a, b = (in_fp8(torch.empty(rows, IN, dtype=torch.bfloat16, device="meta"), scaling, 1) for rows in (TOKENS, OUT))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *rest, **more: _scaled_mm(a, b.contiguous(), *rest, **more))
    with pytest.raises(RuntimeError, match="mat2 must be col_major"):
        product(a, b, torch.bfloat16)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_torch_compile_takes_a_layer_whole_with_the_same_numbers(scaling):
    outcomes = []
    for is_compiled in (False, True):
        (layer,), _ = layers("row", Recipe(scaling, E5M2))
        x = normal(TOKENS, IN).requires_grad_()
        run = torch.compile(layer.__call__, backend="aot_eager", fullgraph=True) if is_compiled else layer
        output = run(x)
        output.backward(normal(TOKENS, OUT, seed=5))
        outcomes.append((output, x.grad, layer.weight.grad))
    for eager, compiled in zip(*outcomes, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize(("capability", "scaling", "message"), [
    ((8, 0), "tensorwise", "--fp8 needs a GPU of compute capability 8.9 or later, and A100 has 8.0; leave it out"),
    ((9, 0), "mxfp8", "--fp8-recipe mxfp8 needs a GPU of compute capability 10.0 or later, and A100 has 9.0; give "
     "--fp8-recipe tensorwise"), ((8, 9), "rowwise", None), ((10, 0), "mxfp8", None)])
def test_gpus_that_do_not_multiply_in_fp8_are_refused(capability, scaling, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    recipe, device = Recipe(scaling, E5M2), torch.device("cuda")
    if message is None:
        assert way_of(recipe, device) == "scaled_mm"
        return
    with pytest.raises(ConfigError) as raised:
        way_of(recipe, device)
    assert str(raised.value) == message


def test_hybrid_has_gradients_in_e5m2_and_nothing_is_in_fp8_unless_told():
    assert recipe_of(PrecisionConfig()) is None
    assert recipe_of(PrecisionConfig(fp8="hybrid")) == Recipe("tensorwise", E5M2)
    assert recipe_of(PrecisionConfig(fp8="e4m3", fp8_recipe="rowwise")) == Recipe("rowwise", E4M3)


BASE = ("--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --lr 1e-3 "
        "--train-iters 1").split()


@pytest.mark.parametrize(("flags", "message"), [
    ("--fp8 hybrid", "--fp8 hybrid is for products whose tensors are in bf16; give --bf16 as well"),
    ("--fp8 e4m3 --fp16", "give --bf16 as well"), ("--fp8 e4m3 --precision auto", "give --bf16 as well"),
    ("--bf16 --fp8-recipe rowwise", "--fp8-recipe rowwise says how to scale in FP8, and --fp8 is missing")])
def test_what_does_not_go_with_fp8_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse([*BASE, *flags.split()])


@pytest.mark.parametrize("flags", ["--fp8-amax-history-len 4", "--fp8-margin 1",
                                   "--fp8-amax-compute-algo most_recent"])
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_flags_of_delayed_scaling_are_refused_with_another_recipe(flags, recipe):
    fp8 = ["--bf16", "--fp8", "hybrid", "--fp8-recipe"]
    with pytest.raises(ConfigError, match=f"{flags} is about --fp8-recipe delayed, which is {recipe}; leave one"):
        parse([*BASE, *fp8, recipe, *flags.split()])
    parse([*BASE, *fp8, "delayed", *flags.split()])


@pytest.mark.parametrize(("flags", "ranks", "message"), [
    ("--num-attention-heads 5 --hidden-size 40", 1, "divisible by 16, and --hidden-size is 40"),
    ("--ffn-hidden-size 40", 1, "divisible by 16, and --ffn-hidden-size is 40"),
    ("--fp8-recipe mxfp8 --ffn-hidden-size 48", 1, "divisible by 32, and --ffn-hidden-size is 48"),
    ("--tensor-model-parallel-size 4 --fp8-recipe mxfp8", 4, "by 32 x 4 ranks, and --num-attention-heads x"),
    ("--seq-length 40", 1, "divisible by 16, and --micro-batch-size x --seq-length is 40"),
    ("--context-parallel-size 8", 8, "divisible by 16 x 8 ranks, and --micro-batch-size x --seq-length is 64"),
    ("--tensor-model-parallel-size 4 --sequence-parallel", 4, None), ("--fp8-recipe mxfp8", 1, None)])
def test_sizes_that_do_not_divide_are_refused_before_anything_is_built(flags, ranks, message):
    config, _ = parse([*BASE, "--bf16", "--fp8", "hybrid", *flags.split()])
    if message is None:
        check_layout(config, ranks)
        return
    with pytest.raises(ConfigError, match=message):
        check_layout(config, ranks)
