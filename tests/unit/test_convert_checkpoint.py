"""Conversions between every two formats, by the command line, lose nothing and hold one tensor at a time."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.contents import stored
from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.convert.formats import FORMATS, recognised
from megatron.checkpoint.convert.inspection import inspect
from megatron.checkpoint.convert.vocabulary import with_rows
from megatron.checkpoint.store import find
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.parallel.mesh import ONE_RANK_AXIS
from tests.megatron_checks import check_values
from tests.megatron_files import ROWS, wholes, write_original
from tests.tables import tried
from tools import convert_checkpoint, inspect_checkpoint, merge_mp_partitions

ROOT = Path(__file__).resolve().parents[2]
OF_RANKS = [name for name in FORMATS if name.startswith("megatron")]


def run(tool, monkeypatch, capsys, *flags):
    """The exit status, what it said and the errors."""
    monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, flags)])
    status = tool.main()
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(("first", "second"), tried(itertools.product(("sharded", "whole", "megatron-v2"), repeat=2), [
    ("sharded", "whole"), ("whole", "megatron-v2"), ("megatron-v2", "sharded")]))
def test_a_checkpoint_comes_through_two_formats_bit_by_bit(first, second, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original", tensor=2, pipeline=(2, 2), precision="fp16")
    before = FORMATS["megatron-v2"].read(tmp_path / "original")
    folder = tmp_path / "original"
    for number, saver in enumerate((first, second, "megatron-v2")):
        target = tmp_path / f"{number}-{saver}"
        layout = ["--target-tensor-parallel-size", 4] if saver in OF_RANKS else []
        status, said, wrong = run(convert_checkpoint, monkeypatch, capsys, "--load-dir", folder, "--save-dir", target,
                                  "--saver", saver, *layout)
        assert (status, wrong) == (0, "")
        assert f"wrote {target}" in said
        assert recognised(target) == saver
        folder = target
    after = FORMATS["megatron-v2"].read(folder)
    check_values(after, wholes())
    for name in ("progress", "schedule", "loss_scale"):
        assert after.state[name] == before.state[name]
    assert {name: after.state["config"][name] for name in before.state["config"]} == before.state["config"]


def test_an_iteration_can_be_chosen_and_the_vocabulary_cut(tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "run")
    (tmp_path / "run" / "iter_0000007").rename(tmp_path / "run" / "iter_0000009")
    write_original(tmp_path / "run", values={name: value + 1 for name, value in wholes().items()})
    flags = ["--load-dir", tmp_path / "run", "--saver", "whole", "--iteration", 9, "--true-vocab-size", 21]
    assert run(convert_checkpoint, monkeypatch, capsys, *flags, "--save-dir", tmp_path / "cut")[0] == 0
    cut = FORMATS["whole"].read(tmp_path / "cut")
    assert cut.model["embedding.word_embeddings.weight"].shape == (24, 16)  # a multiple of 4
    name = "lm_head.bias"
    assert torch.equal(cut.model[name].read(), wholes()[name][:24])
    assert cut.optimizer[f"exp_avg/{name}"].shape == (24,)


@pytest.mark.parametrize("tensor", [2, 4])
def test_padding_that_more_ranks_have_goes_where_fewer_follow(tensor, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original")
    original = FORMATS["megatron-v2"].read(tmp_path / "original")
    original.state["config"]["make_vocab_size_divisible_by"] = ROWS
    FORMATS["whole"].write(original, tmp_path / "one")
    flags = ["--load-dir", tmp_path / "one", "--save-dir", tmp_path / "split", "--to", "megatron-v2"]
    assert run(convert_checkpoint, monkeypatch, capsys, *flags, "--target-tensor-parallel-size", tensor)[0] == 0
    assert FORMATS["megatron-v2"].read(tmp_path / "split").model["lm_head.bias"].shape == (tensor * ROWS,)
    for saver in ("sharded", "whole", "megatron-v2", "megatron-core", "megatron-core-dist"):
        flags = ["--load-dir", tmp_path / "split", "--save-dir", tmp_path / saver, "--to", saver]
        status, said, _ = run(convert_checkpoint, monkeypatch, capsys, *flags)
        assert status == 0 and f"note: of {tensor * ROWS} rows of the vocabulary {ROWS} are kept" in said
        check_values(FORMATS[saver].read(tmp_path / saver), wholes())
    flags = ["--model-type", "BERT", "--load", tmp_path / "split", "--save", tmp_path / "merged"]
    assert run(merge_mp_partitions, monkeypatch, capsys, *flags)[0] == 0
    check_values(FORMATS["megatron-v2"].read(tmp_path / "merged"), wholes())


@pytest.mark.parametrize("known", [{}, {"vocab_file": "iupac"}])
def test_rows_that_may_be_of_tokens_are_kept(known, tmp_path):
    write_original(tmp_path / "original")
    original = with_rows(FORMATS["megatron-v2"].read(tmp_path / "original"), 40)  # on one rank 31 tokens have 32
    original.state["config"] |= known
    FORMATS["whole"].write(original, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", "auto", "sharded", tensor=1, pipeline=1, iteration=None,
            vocab_size=None, log=Log(is_speaker=False))
    assert FORMATS["sharded"].read(tmp_path / "two").model["lm_head.bias"].shape == (32 if known else 40,)


@pytest.mark.parametrize("source", ["sharded", "megatron-v2", "megatron-core-dist"])
def test_an_iteration_that_a_checkpoint_is_not_of_is_refused(source, tmp_path, monkeypatch, capsys):
    place = write_original(tmp_path / "original")
    if source != "megatron-v2":
        place = FORMATS[source].write(FORMATS["megatron-v2"].read(place), tmp_path / source)
    flags = ["--load-dir", place, "--to", "whole", "--save-dir", tmp_path / "new", "--iteration"]
    status, _, wrong = run(convert_checkpoint, monkeypatch, capsys, *flags, 5)
    assert status == 2 and f"--iteration is 5, but {place} is the checkpoint of iteration 7" in wrong
    assert run(inspect_checkpoint, monkeypatch, capsys, place, "--iteration", 5)[0] == 2
    assert run(convert_checkpoint, monkeypatch, capsys, *flags, 7)[0] == 0


def test_the_state_of_muon_stays_behind_where_the_original_has_none(tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original")
    adam = FORMATS["megatron-v2"].read(tmp_path / "original")
    moments = {key.replace("exp_avg/", "momentum_buffer/"): value for key, value in adam.optimizer.items()
               if key.startswith("exp_avg/")}
    muon = replace(adam, optimizer=moments, state=adam.state | {"config": adam.state["config"] | {"optimizer": "muon"}})
    FORMATS["whole"].write(muon, tmp_path / "muon")
    for saver, note in (("sharded", None), ("megatron-v2", "note: megatron-v2 knows no Muon; the optimizer")):
        flags = ["--load-dir", tmp_path / "muon", "--save-dir", tmp_path / saver, "--saver", saver]
        status, said, _ = run(convert_checkpoint, monkeypatch, capsys, *flags)
        assert status == 0 and (note is None or note in said)
    assert FORMATS["sharded"].read(tmp_path / "sharded").optimizer.keys() == moments.keys()
    weights = FORMATS["megatron-v2"].read(tmp_path / "megatron-v2")
    assert weights.optimizer is None
    check_values(weights, wholes())


@pytest.mark.parametrize("saver", OF_RANKS)
@pytest.mark.parametrize(("lacks", "flag", "value"), [
    ("embedding.position_embeddings.weight", "--position-embedding-type", "rope"),
    ("lm_head.layernorm.bias", "--normalization", "RMSNorm"), ("lm_head.dense.bias", "--disable-bias-linear", True)])
def test_what_megatron_cannot_compute_is_refused_by_its_flag(saver, lacks, flag, value, tmp_path):
    write_original(tmp_path / "original")
    one = FORMATS["megatron-v2"].read(tmp_path / "original")
    config = one.state["config"] | {flag.removeprefix("--").replace("-", "_"): value}
    model = {name: tensor for name, tensor in one.model.items() if name != lacks}
    with pytest.raises(CheckpointError, match=f"was trained with {flag} {value}, which Megatron-LM's BERT does not"):
        FORMATS[saver].write(replace(one, model=model, state=one.state | {"config": config}), tmp_path / "new")


@pytest.mark.parametrize("saver", OF_RANKS)
def test_what_megatron_has_no_place_for_is_left_out_with_a_note(saver, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original")
    one = FORMATS["megatron-v2"].read(tmp_path / "original")
    heads = {"contact_head.weight": stored(torch.ones(1, 8)), "contact_head.bias": stored(torch.ones(1))}
    state = one.state | {"config": one.state["config"] | {"contact_head": True}, "meters": {}}
    FORMATS["whole"].write(replace(one, model={**one.model, **heads}, state=state), tmp_path / "whole")
    status, said, wrong = run(convert_checkpoint, monkeypatch, capsys, "--load-dir", tmp_path / "whole", "--save-dir",
                              tmp_path / "new", "--saver", saver)
    assert (status, wrong) == (0, "")
    assert f"note: {saver} knows no contact head; it is left out" in said
    assert ("knows no counts of residues, seconds and FLOPs" in said) == (saver == "megatron-v2")
    assert FORMATS[saver].read(tmp_path / "new").model.keys() == one.model.keys()


def test_partitions_are_merged_and_split_with_the_original_tools_flags(tmp_path, monkeypatch, capsys):
    write_original(tmp_path, tensor=2, pipeline=(2, 2))
    flags = ["--model-type", "BERT", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
             "--num-layers", 4, "--hidden-size", 16, "--num-attention-heads", 4, "--seq-length", 12, "--fp16",
             "--ffn-hidden-size", 24, "--kv-channels", 4, "--num-query-groups", 4, "--layernorm-epsilon", 1e-12,
             "--tokenizer-type", "BertWordPieceCase", "--use-cpu-initialization", "--micro-batch-size", 4,
             "--load", tmp_path]
    assert run(merge_mp_partitions, monkeypatch, capsys, *flags)[0] == 0
    merged = FORMATS["megatron-v2"].read(tmp_path / "merged")
    assert [file.name for file in merged.path.iterdir()] == ["mp_rank_00"]
    check_values(merged, wholes())
    flags = ["--model-type", "BERT", "--load", tmp_path / "merged", "--save", tmp_path / "split",
             "--target-tensor-model-parallel-size", 4, "--target-pipeline-model-parallel-size", 2,
             "--vocab-file", ROOT / "protein_tools" / "iupac_vocab.txt"]
    assert run(merge_mp_partitions, monkeypatch, capsys, *flags)[0] == 0
    split = FORMATS["megatron-v2"].read(tmp_path / "split")
    assert len(list(split.path.iterdir())) == 8
    assert split.model["lm_head.bias"].shape == (ROWS,)
    check_values(split, wholes())


@pytest.mark.parametrize(("tool", "flags", "message"), [
    (convert_checkpoint, ["--load-dir", "{there}", "--save-dir", "{there}", "--saver", "whole"], "holds something"),
    (convert_checkpoint, ["--load-dir", "{new}", "--save-dir", "{new}", "--saver", "whole"],
     "holds no checkpoint of a known format"),
    (convert_checkpoint, ["--load-dir", "{new}", "--save-dir", "{new}", "--saver", "gguf"], "invalid choice"),
    (convert_checkpoint, ["--load-dir", "{there}", "--loader", "whole", "--save-dir", "{new}", "--saver", "whole"],
     "is not of this program"),
    (convert_checkpoint, ["--load-dir", "{there}", "--save-dir", "{new}", "--saver", "whole",
                          "--target-tensor-parallel-size", "2"], "leave them out"),
    (convert_checkpoint, ["--load-dir", "{there}", "--save-dir", "{new}", "--saver", "megatron-v2",
                          "--target-tensor-parallel-size", "3"], "give a divisor"),
    (convert_checkpoint, ["--load-dir", "{there}", "--iteration", "5", "--save-dir", "{new}", "--saver", "whole"],
     "iter_0000005 is not there"),
    *((convert_checkpoint, ["--load-dir", "{there}", "--save-dir", "{new}", "--saver", "whole", "--true-vocab-size",
                            size], f"--true-vocab-size is {size}, but") for size in ("-5", "0", "33")),
    (merge_mp_partitions, ["--model-type", "BERT", "--load", "{there}", "--save", "{there}"],
     "--save {there} holds something"),
    (merge_mp_partitions, ["--model-type", "BERT", "--load", "{there}", "--save", "{new}", "--num-layers", "12"],
     "--num-layers is 12, but the checkpoint in"),
    *((merge_mp_partitions, ["--model-type", "BERT", "--load", "{there}", "--save", "{new}", *flags],
       f"{flags[0]} is {flags[-1]}, but the checkpoint in") for flags in (
           ["--ffn-hidden-size", "999"], ["--normalization", "RMSNorm"], ["--kv-channels", "3"],
           ["--num-query-groups", "2"])),
    (merge_mp_partitions, ["--model-type", "BERT", "--load", "{there}", "--save", "{new}",
                           "--target-tensor-model-parallel-size", "3"], "tensor-parallel size to write for is 3"),
    (merge_mp_partitions, ["--model-type", "BERT", "--load", "{there}", "--save", "{new}",
                           "--model-parallel-size", "4"], "--tensor-model-parallel-size is 4"),
    (merge_mp_partitions, ["--model-type", "GPT", "--load", "{there}"], "invalid choice"),
])
def test_mistakes_are_told_in_one_line(tool, flags, message, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "there")
    places = {"there": tmp_path / "there", "new": tmp_path / "new"}
    status, _, wrong = run(tool, monkeypatch, capsys, *(flag.format(**places) for flag in flags))
    assert status == 2
    assert message.format(**places) in wrong
    assert wrong.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("saver", ["sharded", "whole", "megatron-v2"])
def test_damage_in_a_conversion_leaves_nothing_behind(saver, tmp_path):
    place = write_original(tmp_path / "made")
    checkpoint = FORMATS["megatron-v2"].read(tmp_path / "made")
    file = place / "mp_rank_00" / "model_optim_rng.pt"
    content, at = bytearray(file.read_bytes()), wholes()["lm_head.dense.weight"].numpy().tobytes()
    content[content.index(at) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        FORMATS[saver].write(checkpoint, tmp_path / "written")
    assert list((tmp_path / "written").iterdir()) == []


@pytest.mark.parametrize("source", ["megatron-v2", "megatron-core", "megatron-core-dist"])
@pytest.mark.parametrize(("saver", "tensor"), [("megatron-v2", 4), ("sharded", 1)])
def test_damage_is_found_where_parts_are_read(source, saver, tensor, tmp_path):
    name, folder = "transformer.layers.2.mlp.dense_4h_to_h.weight", tmp_path / source
    if source == "megatron-v2":
        write_original(folder)
    else:
        FORMATS[source].write(FORMATS["megatron-v2"].read(write_original(tmp_path / "made")), folder)
    file = next(file for file in sorted(folder.rglob("*")) if file.suffix in (".pt", ".distcp"))
    content, at = bytearray(file.read_bytes()), wholes()[name].numpy().tobytes()
    content[content.index(at) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        convert(folder, tmp_path / "written", "auto", saver, tensor=tensor, pipeline=1, iteration=None,
                vocab_size=None, log=Log(is_speaker=False))
    assert not inspect(folder, "auto", None, Log(is_speaker=False))
    assert not (tmp_path / "written").exists()


def test_a_flipped_bit_in_our_own_files_is_found_before_a_conversion(tmp_path):
    checkpoint = FORMATS["megatron-v2"].read(write_original(tmp_path / "made"))
    file = FORMATS["sharded"].write(checkpoint, tmp_path / "ours") / "optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="optimizer-00000.safetensors is damaged"):
        convert(tmp_path / "ours", tmp_path / "written", "auto", "whole", tensor=1, pipeline=1, iteration=None,
                vocab_size=None, log=Log(is_speaker=False))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 900),
                                    lambda file: file.write_bytes(bytes(file.stat().st_size))])
def test_weights_are_taken_whatever_befell_the_optimizers_file(damage, tmp_path, monkeypatch, capsys):
    checkpoint = FORMATS["megatron-v2"].read(write_original(tmp_path / "made"))
    damage(FORMATS["sharded"].write(checkpoint, tmp_path / "ours") / "optimizer-00000.safetensors")
    flags = ["--load-dir", tmp_path / "ours", "--save-dir"]
    assert run(convert_checkpoint, monkeypatch, capsys, *flags, tmp_path / "core", "--to", "megatron-core")[0] == 0
    check_values(FORMATS["megatron-core"].read(tmp_path / "core"), wholes())
    status, _, wrong = run(convert_checkpoint, monkeypatch, capsys, *flags, tmp_path / "whole", "--to", "whole")
    assert status == 2 and wrong.count("\n") == 1
    assert "optimizer-00000.safetensors" in wrong and "the weights alone can be taken without it" in wrong
    log = Log(is_speaker=False)
    found = find(str(tmp_path / "ours"), ONE_RANK_AXIS, log, with_optimizer=False)
    check_values(replace(found, optimizer=None), wholes())
    with pytest.raises(CheckpointError, match="the weights alone can be taken without it"):
        find(str(tmp_path / "ours"), ONE_RANK_AXIS, log)


@pytest.mark.parametrize("left", [".unfinished-iter_0000007", ".unfinished-release"])
def test_a_conversion_that_was_killed_can_be_begun_again(left, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original")
    (tmp_path / "new" / left).mkdir(parents=True)
    flags = ["--load-dir", tmp_path / "original", "--save-dir", tmp_path / "new", "--to", "sharded"]
    assert run(convert_checkpoint, monkeypatch, capsys, *flags)[0] == 0
    assert run(convert_checkpoint, monkeypatch, capsys, *flags)[0] == 2


STREAMED = """
import sys
from pathlib import Path
import torch.distributed.checkpoint  # which writing megatron-core-dist imports, and which takes more than a tensor
from megatron.checkpoint.convert.conversion import convert
from megatron.log import Log
from tests import megatron_files as made

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

folder = Path(sys.argv[1])
if len(sys.argv) == 2:
    made.LAYERS, made.HIDDEN, made.WIDTH, made.FEED_FORWARD = 1, 1024, 256, 8192
    made.write_original(folder / "given", tensor=4, pipeline=(1,))
for source, saver, target, tensor in (argument.split() for argument in sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = kilobytes("VmRSS")
    convert(folder / source, folder / target, "auto", saver, tensor=int(tensor), pipeline=1, iteration=None,
            vocab_size=None, log=Log(False))
    print((kilobytes("VmHWM") - before) * 1024)
"""


def streamed(*arguments):
    gives_back_at_once = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed, which the allocator else may keep
    result = subprocess.run([sys.executable, "-c", STREAMED, *map(str, arguments)], cwd=ROOT, capture_output=True,
                            text=True, check=True, env=os.environ | gives_back_at_once)
    return [int(line) for line in result.stdout.splitlines()]


@pytest.mark.table
def test_conversions_hold_one_tensor_at_a_time(tmp_path):
    """Of 260 MB, of which the largest tensor has 34: the whole of it, a rank's quarter and what is imported, and no
    second one."""
    streamed(tmp_path)
    largest = 1024 * 8192 * 4
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.pt")) > 7 * largest
    peaks = streamed(tmp_path, "given sharded a 1", "a megatron-v2 b 4", "b whole c 1", "c megatron-v2 d 1",
                     "d megatron-core e 4", "e megatron-core-dist f 1", "f whole g 1", "g hf h 1", "h sharded i 1")
    assert len(peaks) == 9
    assert all(largest / 2 < peak < 1.7 * largest for peak in peaks), [peak / largest for peak in peaks]
