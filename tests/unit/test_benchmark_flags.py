"""The benchmarks train what their pages say, whatever becomes of the presets."""

import pytest

from benchmarks import layouts, optimizer_step
from megatron.config.command_line import parse


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("model", layouts.MODELS)
def test_every_model_and_layout_is_a_run_that_the_program_takes(model, layout):
    flags = [*layouts.FLAGS, *layouts.MODELS[model].split(), *layouts.LAYOUTS[layout][1].split()]
    for more in layouts.RECOMPUTATION.values():
        parse([*flags, *more.split()])


def test_the_families_differ_from_bert_by_what_they_name():
    bert, demo = (parse([*layouts.FLAGS, *layouts.MODELS[name].split()])[0] for name in ("proteinlm", "demo"))
    assert (bert.model.normalization, bert.model.squared_relu, bert.optimizer.optimizer) == ("LayerNorm", False, "adam")
    assert not bert.precision.bf16
    preset = parse(["--preset", "demo"])[0]
    assert (demo.model, demo.optimizer.optimizer) == (preset.model, preset.optimizer.optimizer)


def test_the_share_of_an_optimizer_is_of_the_recipes_model():
    config, _ = parse(optimizer_step.FLAGS)
    assert config.model.squared_relu and (config.model.num_layers, config.model.hidden_size) == (4, 256)
