"""Runs that resume from checkpoints of Megatron v2, made by hand in the original's layout."""

import pytest
import torch

from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.convert.formats import FORMATS
from megatron.infer.pretrained import load_pretrained
from megatron.log import Log
from pretrain_tape import main
from tests.golden.training import losses, run_on_ranks
from tests.megatron_files import CONSUMED, ITERATION, POSITIONS, ROWS, loaded, wholes, write_original

RUN = ["--seq-length", POSITIONS, "--micro-batch-size", 2, "--global-batch-size", 4, "--lr", 1e-3, "--min-lr", 1e-4,
       "--train-samples", CONSUMED + 16, "--lr-decay-samples", 160, "--lr-warmup-samples", 16, "--attention-dropout", 0,
       "--hidden-dropout", 0, "--num-workers", 0, "--log-interval", 1, "--peak-tflops", 1, "--eval-iters", 1]


def train(corpus, load, save, *flags, ranks=1):
    arguments = [*map(str, [*RUN, "--data-path", corpus, "--load", load, "--save", save, *flags])]
    assert (run_on_ranks(*arguments, ranks=ranks) if ranks > 1 else [main(arguments)]) == [0] * ranks
    return losses(save)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    values = {name: value.square() if name.startswith("exp_avg_sq") else 0.1 * value
              for name, value in wholes().items()}  # as training leaves them
    write_original(folder, values=values, tensor=2, pipeline=(2, 2), version=1.0)
    return folder


def test_a_run_goes_on_from_megatrons_files_in_any_layout(original, corpus, tmp_path, capsys):
    alone = train(corpus, original, tmp_path / "alone")
    said = capsys.readouterr().out
    assert f"going on from iteration {ITERATION} in {original}" in said and "--mask-prob" not in said
    assert list(alone) == [ITERATION + 1, ITERATION + 2, ITERATION + 3, ITERATION + 4]
    for number, flags in enumerate((["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2],
                                    ["--data-parallel-sharding", "parameters"])):
        split = train(corpus, original, tmp_path / f"split{number}", *flags, ranks=2)
        assert split == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("saver", ["sharded", "whole"])
def test_what_was_converted_goes_on_as_what_it_was_converted_from(original, corpus, tmp_path, saver):
    direct = train(corpus, original, tmp_path / "direct")
    convert(original, tmp_path / "converted", "auto", saver, tensor=1, pipeline=1, iteration=None, vocab_size=None,
            log=Log(is_speaker=False))
    assert train(corpus, tmp_path / "converted", tmp_path / "run") == direct


def test_padding_of_more_ranks_changes_no_run(original, corpus, tmp_path, capsys):
    one = FORMATS["megatron-v2"].read(original)
    one.state["config"]["make_vocab_size_divisible_by"] = ROWS
    FORMATS["whole"].write(one, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "split", "auto", "megatron-v2", tensor=4, pipeline=1, iteration=None,
            vocab_size=None, log=Log(is_speaker=False))
    direct = train(corpus, tmp_path / "one", tmp_path / "direct")
    capsys.readouterr()
    assert train(corpus, tmp_path / "split", tmp_path / "run") == direct
    assert f"has {4 * ROWS} rows of the vocabulary, a model here {ROWS}" in capsys.readouterr().out
    asked = [load_pretrained(str(tmp_path / name)).embed(["MKTAYIAKQ"]) for name in ("one", "split")]
    assert (asked[0] == asked[1]).all()


@pytest.mark.parametrize("saver", ["megatron-core", "megatron-core-dist"])
def test_megatron_cores_weights_are_taken_as_the_originals(original, corpus, tmp_path, saver):
    direct = train(corpus, original, tmp_path / "direct", "--finetune")
    convert(original, tmp_path / "core", "auto", saver, tensor=1, pipeline=2, iteration=None, vocab_size=None,
            log=Log(is_speaker=False))
    assert train(corpus, tmp_path / "core", tmp_path / "run", "--finetune") == direct


def test_a_flipped_bit_and_a_missing_rank_are_said_in_one_line(corpus, tmp_path, capsys):
    place = write_original(tmp_path / "made", tensor=2)
    file = place / "mp_rank_01" / "model_optim_rng.pt"
    content, at = file.read_bytes(), wholes()["transformer.layers.1.mlp.dense_4h_to_h.bias"].numpy().tobytes()
    flags = [*map(str, [*RUN, "--data-path", corpus, "--load", tmp_path / "made", "--save", tmp_path / "run"])]
    for damaged in (content.replace(at, bytes([at[0] ^ 1]) + at[1:]), content[:-200], b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert main(flags) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {place}") and errors.count("\n") == 1
        # Each rank reads the file that is its own, if any, and all come to the same end.
        assert run_on_ranks(*flags, "--tensor-model-parallel-size", 2, ranks=2) == [2, 2]


def test_weights_alone_are_not_gone_on_from_but_taken(corpus, tmp_path, capsys):
    write_original(tmp_path / "weights", with_optimizer=False)
    arguments = [*map(str, [*RUN, "--data-path", corpus, "--load", tmp_path / "weights", "--save", tmp_path / "run"])]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--finetune", "--num-layers", "3"]) == 2
    assert "--num-layers is 3, but the checkpoint was trained with 4" in capsys.readouterr().err
    assert min(train(corpus, tmp_path / "weights", tmp_path / "run", "--finetune")) == 1


def test_a_run_without_its_distributed_optimizers_state_goes_on_where_it_is_not_wanted(corpus, tmp_path, capsys):
    file = write_original(tmp_path / "made") / "mp_rank_00" / "model_optim_rng.pt"
    tree = loaded(file)
    for group in tree["optimizer"]["param_groups"]:
        del group["params"]
    torch.save(tree | {"optimizer": {"optimizer": {"param_groups": tree["optimizer"]["param_groups"]}}}, file)
    flags = [*map(str, [*RUN, "--data-path", corpus, "--load", tmp_path / "made", "--save", tmp_path / "refused"])]
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert "note: the optimizer's state is not taken over" in printed.out
    assert printed.err.count("\n") == 1 and "--no-load-optim" in printed.err and "--finetune" in printed.err
    assert min(train(corpus, tmp_path / "made", tmp_path / "on", "--no-load-optim")) == ITERATION + 1
    assert min(train(corpus, tmp_path / "made", tmp_path / "anew", "--finetune")) == 1
    assert load_pretrained(str(tmp_path / "made")).iteration == ITERATION
