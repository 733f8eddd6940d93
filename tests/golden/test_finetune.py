"""Fine-tuning by the command line, from checkpoint and files to model, report and predictions; and what it refuses."""

import csv
import errno
import json
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretrain_tape
from megatron import load_pretrained
from megatron.checkpoint import saving
from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.lora import peft_files
from megatron.checkpoint.sharded import write_parts
from megatron.checkpoint.store import iterations, open_place
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError, ConfigError
from megatron.finetune import training
from megatron.finetune.model import Described
from megatron.finetune.progress import UNFINISHED
from megatron.infer.pretrained import config_of
from megatron.log import Log
from megatron.parallel.launch.environment import Launch
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.parallel.program import status_of
from tests.families import ESM2
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.transformers_models import PROTEINS, one_row, trained_here
from tests.unit.labelled_files import json_lines
from tests.unit.test_pretrained import TINY, saved
from tools.evaluate import evaluate, parser
from tools.finetune import prepare

MODEL = replace(TINY, hidden_dropout=0.0, attention_dropout=0.0)
TWO = PROTEINS[:2]
QUICK = "--lr 1e-2 --head-dropout 0 --bootstrap 20 --global-batch-size 4 --log-interval 5".split()


def proteins(number, seed, label):
    """Records with random residues and what `label` makes of them."""
    rng = random.Random(seed)
    letters = ["".join(rng.choices("ACDEFGHIKL", k=rng.randint(8, 40))) for _ in range(number)]
    return [{"id": f"p{place}", "seq": seq, "label": label(seq)} for place, seq in enumerate(letters)]


LABELS = {"number": lambda seq: 10 + 5 * seq.count("A") / len(seq),
          "residues": lambda seq: "".join("H" if letter in "ACDEF" else "C" for letter in seq),
          "class": lambda seq: "rich" if seq.count("A") >= len(seq) / 5 else "poor"}


def task(folder, kind):
    """A folder of a task's files, with a kind of LABELS or what gives them."""
    folder.mkdir()
    for seed, (part, number) in enumerate((("train", 80), ("valid", 30), ("test", 20))):
        json_lines(folder / f"{part}.jsonl", proteins(number, seed, LABELS.get(kind, kind)))
    return folder


def finetune(*argv):
    return status_of(partial(prepare, [str(word) for word in argv]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def taught(base, tmp_path_factory):
    """A folder with a model of each kind and the task that it learnt."""
    folder = tmp_path_factory.mktemp("taught")
    for kind, epochs in (("number", 8), ("residues", 4)):
        data = task(folder / f"{kind}-data", kind)
        assert finetune("own", "--load", base, "--data", data, "--save", folder / kind, "--epochs", epochs, *QUICK) == 0
    return folder


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def records_of(folder, kind):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def test_what_letters_tell_is_learnt(taught):
    measures = {kind: report_of(taught / kind)["measures"] for kind in ("number", "residues")}
    assert measures["number"]["test"]["spearman"][0] > 0.8
    assert measures["residues"]["test"]["accuracy"][0] > 0.9
    for of_parts in measures.values():
        for measures_of_part in of_parts.values():
            for value, low, high in measures_of_part.values():
                assert low <= high and low - 0.2 <= value <= high + 0.2


def test_the_best_epoch_is_kept_and_training_stops_behind_it(taught, base, tmp_path):
    data = taught / "number-data"
    assert finetune("own", "--load", base, "--data", data, "--save", tmp_path / "out", "--epochs", 12, "--patience", 1,
                    "--head-only", *QUICK, "--lr", 3e-1) == 0
    valid, report = records_of(tmp_path / "out", "valid"), report_of(tmp_path / "out")
    values = [-np.inf if record["spearman"] is None else record["spearman"] for record in valid]
    best = int(np.argmax(values))
    assert (report["epoch"], report["iteration"]) == (valid[best]["epoch"], valid[best]["iteration"])
    assert report["measures"]["valid"]["spearman"][0] == pytest.approx(values[best], abs=1e-6)
    assert len(valid) == min(best + 2, 12) < 12, "the rate is made so high that some epoch is worse"


def test_an_epoch_as_good_as_the_best_is_no_better_so_that_patience_ends(taught, base, tmp_path):
    assert finetune("own", "--load", base, "--data", taught / "number-data", "--save", tmp_path / "out", "--epochs", 9,
                    "--patience", 2, "--head-only", *QUICK, "--lr", 1e-30) == 0
    assert len({record["spearman"] for record in records_of(tmp_path / "out", "valid")} - {None}) == 1
    assert len(records_of(tmp_path / "out", "valid")) == 3 and report_of(tmp_path / "out")["epoch"] == 1


def test_a_disk_that_is_full_while_it_trains_ends_no_fine_tuning(taught, base, tmp_path, monkeypatch, capsys):
    def refused(place, *rest):
        if UNFINISHED in place.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_parts(place, *rest)

    monkeypatch.setattr(saving, "write_parts", refused)
    monkeypatch.setattr(training, "forget_after", lambda metrics, iteration: metrics.mkdir())  # so none can be written
    flags = ["own", "--load", base, "--data", taught / "number-data", "--epochs", 2, *QUICK]
    assert finetune(*flags, "--save", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path}/out/metrics.jsonl cannot be written (Is a directory)") == 1
    assert said.count("No space left on device") == 2 == said.count("The run goes on, and the next save tries again")
    assert report_of(tmp_path / "out")["iteration"] > 0
    assert finetune(*flags, "--save", tmp_path / "stopped", "--exit-interval", 5) == 4
    assert "the same command goes on from there" not in capsys.readouterr().out


@pytest.mark.parametrize(("refused_there", "times", "repeats"), [
    ("iter_", 1, None), ("iter_", 9, "goes on from iteration"), ("", 9, "begins the training again, of which nothing")])
def test_a_model_that_the_disk_refuses_is_tried_once_more_and_the_error_says_what_is_kept(
        taught, base, tmp_path, monkeypatch, capsys, refused_there, times, repeats):
    out, refused = tmp_path / "out", []

    def refuse(place, *rest):
        if len(refused) < times and place.relative_to(out).parts[0].startswith(refused_there):
            refused.append(place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_parts(place, *rest)

    monkeypatch.setattr(saving, "write_parts", refuse)
    flags = ["own", "--load", base, "--data", taught / "number-data", "--epochs", 2, *QUICK, "--save", out]
    assert finetune(*flags) == (4 if repeats else 0)
    said, error = capsys.readouterr()
    assert "It is tried once more" in said and ("refused this checkpoint, too" in said) == bool(repeats)
    if repeats:
        assert f"Once there is room, the same command {repeats}" in error and error.count("\n") == 1
        refused += [out] * times
        assert finetune(*flags) == 0
        assert ("going on from iteration" in capsys.readouterr().out) == (refused_there == "iter_")
    assert report_of(out)["iteration"] > 0


def test_predictions_of_a_saved_model_are_those_of_its_validation(taught, tmp_path):
    for kind in ("number", "residues"):
        lines = [json.loads(line) for line in (taught / f"{kind}-data" / "valid.jsonl").read_text().splitlines()]
        data, output = taught / f"{kind}-data" / "valid.jsonl", tmp_path / f"{kind}.jsonl"
        assert finetune("predict", taught / kind, data, output) == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [one["name"] for one in found] == [line["id"] for line in lines]
        measures = report_of(taught / kind)["measures"]["valid"]
        if kind == "number":
            errors = [one["prediction"] - line["label"] for one, line in zip(found, lines, strict=True)]
            assert np.square(errors).mean() == pytest.approx(measures["mse"][0], rel=1e-4)
            continue
        right = [a == b for one, line in zip(found, lines, strict=True)
                 for a, b in zip(one["prediction"], line["label"], strict=True)]
        assert np.mean(right) == pytest.approx(measures["accuracy"][0])
        assert [len(one["probabilities"]["H"]) for one in found] == [len(line["seq"]) for line in lines]


def foretold(axis, argv):
    """What `finetune.py` does with `argv` on a rank of `axis`."""
    parallel, work = prepare(argv, Launch(rank=axis.rank, size=axis.size))
    work(build_mesh(parallel, torch.device("cpu"), TIMEOUT), Log(is_speaker=axis.rank == 0))


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_two_ranks_predict_what_one_does_each_layer_split_over_them_or_not(taught, tmp_path, tensor_size):
    argv = ["predict", str(taught / "number"), str(taught / "number-data" / "valid.jsonl")]
    assert finetune(*argv, tmp_path / "one.jsonl") == 0
    run_ranks(foretold, 2, [*argv, str(tmp_path / "two.jsonl"), "--tensor-model-parallel-size", str(tensor_size)])
    one, two = ([json.loads(line)["prediction"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.fixture(scope="module")
def adapted(taught, base):
    """The folder of a model that learnt by adapters."""
    assert finetune("own", "--load", base, "--data", taught / "residues-data", "--save", taught / "adapted", "--epochs",
                    4, "--lora-rank", 4, "--lora-targets", "query", "value", *QUICK, "--lr", 4e-2) == 0
    return taught / "adapted"


def test_adapters_learn_and_are_saved_for_peft_too(taught, adapted, tmp_path):
    data = taught / "residues-data"
    accuracy = report_of(adapted)["measures"]["valid"]["accuracy"][0]
    assert accuracy > 0.65, "half of the letters have either class"
    said = json.loads((adapted / "adapters" / peft_files.CONFIG).read_text())
    adapters = load_file(adapted / "adapters" / peft_files.WEIGHTS)
    assert (said["r"], said["base_model_name_or_path"], len(adapters)) == (4, None, 4)
    assert any(tensor.abs().max() > 0 for name, tensor in adapters.items() if ".lora_B." in name)
    assert finetune("predict", adapted, data / "valid.jsonl", tmp_path / "out.jsonl") == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    lines = [json.loads(line)["label"] for line in (data / "valid.jsonl").read_text().splitlines()]
    assert np.mean([a == b for pair in zip(found, lines, strict=True) for a, b in zip(*pair, strict=True)]) == (
        pytest.approx(accuracy))


def states_of(folder):
    """The states of two proteins behind the last norm, by the model with its head and adapters."""
    (place,) = iterations(folder).values()
    checkpoint = open_place(place)
    config = config_of(checkpoint, "fp32")
    engine = Described.read(folder).open(config, Mesh(), Vocab.from_file(), checkpoint)
    with torch.no_grad():
        return engine.stages[0].eval().hidden(one_row(Vocab.from_file(), TWO, "start"))


@pytest.mark.parametrize("kind", ["number", "adapted"])
def test_a_fine_tuned_model_is_asked_without_its_head_and_its_adapters_are_merged(kind, taught, adapted, base):
    loaded, expected = load_pretrained(str(taught / kind)), states_of(taught / kind)
    with torch.no_grad():
        found = loaded.model.hidden(loaded.row(TWO))
        before = load_pretrained(str(base)).model.hidden(loaded.row(TWO))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-2, "it has learnt"
    with pytest.raises(ConfigError, match="which has no masked-LM head; ask the one that it was begun from"):
        loaded.logits(TWO)


@pytest.mark.parametrize("kind", ["number", "adapted"])
def test_a_fine_tuned_model_is_taught_another_task_from_its_own_weights(kind, taught, adapted, tmp_path):
    assert finetune("own", "--load", taught / kind, "--data", taught / "residues-data", "--save", tmp_path / "out",
                    "--train-iters", 1, *QUICK, "--head-only") == 0
    torch.testing.assert_close(states_of(tmp_path / "out"), states_of(taught / kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["number", "adapted"])
def test_pretraining_does_not_go_on_from_a_fine_tuned_model(kind, taught, adapted, base, corpus, tmp_path, capsys):
    (place,) = iterations(taught / kind).values()
    assert pretrain_tape.main([str(word) for word in (
        "--load", taught / kind, "--finetune", "--save", tmp_path / "out", "--data-path", corpus, "--seq-length", 64,
        "--micro-batch-size", 1, "--lr", 1e-3, "--train-iters", 1)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == (f"error: {place} was taught a task, and has a head for that in place of the masked-LM head; give "
                    f"what it was begun from, {base}")


def test_a_model_of_transformers_is_taught_too(taught, tmp_path):
    hf.write(trained_here(replace(ESM2, ffn_hidden_size=128), "esm", "both"), tmp_path / "esm")
    data = taught / "residues-data"
    assert finetune("own", "--load", tmp_path / "esm", "--data", data, "--save", tmp_path / "out", "--train-iters", 4,
                    "--lora-rank", 2, *QUICK) == 0
    adapters = json.loads((tmp_path / "out" / "adapters" / peft_files.CONFIG).read_text())
    assert adapters["base_model_name_or_path"] == str(tmp_path / "esm")
    assert finetune("predict", tmp_path / "out", data / "test.jsonl", tmp_path / "out.jsonl") == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    lines = [json.loads(line)["label"] for line in (data / "test.jsonl").read_text().splitlines()]
    assert [len(one) for one in found] == [len(line) for line in lines]
    right = np.mean([a == b for pair in zip(found, lines, strict=True) for a, b in zip(*pair, strict=True)])
    assert right == pytest.approx(report_of(tmp_path / "out")["measures"]["test"]["accuracy"][0])


def test_a_fine_tuned_model_is_not_written_for_programs_that_have_no_place_for_its_head(taught, tmp_path):
    flags = {"tensor": 1, "pipeline": 1, "iteration": None, "vocab_size": None, "log": Log(is_speaker=False)}
    with pytest.raises(CheckpointError, match="was taught a task"):
        convert(taught / "number", tmp_path / "hf", "auto", "hf", **flags)
    convert(taught / "number", tmp_path / "whole", "auto", "whole", **flags)
    assert torch.equal(load_pretrained(str(tmp_path / "whole")).model.hidden(one_row(Vocab.from_file(), TWO, "start")),
                       states_of(taught / "number"))


def test_fasta_is_predicted_by_its_names(taught, tmp_path):
    (tmp_path / "in.fasta").write_text(">one first\nAAAAAACDEF\n>two\nCDEFGHIKLG\n")
    assert finetune("predict", taught / "number", tmp_path / "in.fasta", tmp_path / "out.csv") == 0
    one, two = csv.DictReader((tmp_path / "out.csv").open())
    assert (one["name"], two["name"]) == ("one", "two")
    assert float(one["prediction"]) > float(two["prediction"])


def test_a_number_of_each_residue_is_learnt_and_predicted(base, tmp_path):
    values = dict(zip("ACDEFGHIKL", np.linspace(-1, 3, 10).round(2).tolist(), strict=True))
    data = task(tmp_path / "data", lambda seq: [None if letter == "G" else values[letter] for letter in seq])
    assert finetune("own", "--load", base, "--data", data, "--save", tmp_path / "out", "--epochs", 3, *QUICK) == 0
    measures = report_of(tmp_path / "out")["measures"]["test"]
    assert measures["spearman"][0] > 0.7
    assert finetune("predict", tmp_path / "out", data / "test.jsonl", tmp_path / "out.jsonl") == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    lines = [json.loads(line)["label"] for line in (data / "test.jsonl").read_text().splitlines()]
    errors = [one - label for pair in zip(found, lines, strict=True) for one, label in zip(*pair, strict=True)
              if label is not None]
    assert np.square(errors).mean() == pytest.approx(measures["mse"][0], rel=1e-4)


def test_pairs_of_residues_are_learnt_as_contacts(base, tmp_path, capsys):
    data = task(tmp_path / "data", lambda seq: [[i + 1, j + 1] for i in range(len(seq)) for j in range(i + 6, len(seq))
                                                if seq[i] == seq[j]])
    command = ["own", "--load", base, "--data", data, "--save", tmp_path / "out", "--train-iters", 20, *QUICK]
    assert "lists pairs" in refusal(capsys, *command)
    assert finetune(*command, "--pairs-from", 1) == 0
    losses = [record["loss"] for record in records_of(tmp_path / "out", "train")]
    assert losses[-1] < losses[0] and report_of(tmp_path / "out")["measures"]["test"]["short_p_at_l5"][0] > 0
    assert finetune("predict", tmp_path / "out", data / "test.jsonl", tmp_path / "out.jsonl") == 0
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        one = json.loads(line)
        assert len(one["prediction"]) == len(one["probabilities"]) and all(i < j for i, j in one["prediction"])
        assert one["probabilities"] == sorted(one["probabilities"], reverse=True)


def test_seeds_have_a_model_each_and_the_same_command_does_none_again(taught, base, tmp_path, capsys):
    command = ["own", "--load", base, "--data", task(tmp_path / "data", "class"), "--save", tmp_path / "out",
               "--class-weights", "balanced", "--train-iters", 6, *QUICK, "--seeds"]
    assert finetune(*command, 1, 2) == 0
    report = report_of(tmp_path / "out")
    values = [report["seeds"][seed]["measures"]["test"]["accuracy"][0] for seed in ("1", "2")]
    assert {one["chosen_by"] for one in report["seeds"].values()} == {"mcc"}
    assert report["spread"]["test"]["accuracy"] == pytest.approx([np.mean(values), np.std(values, ddof=1)])
    said = capsys.readouterr().out
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in said and "best so far by mcc" in said
    assert "labels of the kind class, 2 classes: poor " in said and "auroc" in said
    assert finetune(*command, 1, 2, 3) == 0
    said = capsys.readouterr().out
    assert said.count("is done already") == 2 and "training, seed" not in said
    assert report_of(tmp_path / "out")["seeds"].keys() == {"1", "2", "3"}
    assert finetune(*command, 1, 2, "--pooling", "cls") == 2
    assert "holds the report of another run: --pooling is cls, it was mean before" in capsys.readouterr().err


def test_the_rate_is_taken_that_is_best_by_validation(taught, base, tmp_path, capsys):
    command = ["own", "--load", base, "--data", taught / "residues-data", "--save", tmp_path / "out", *QUICK[2:],
               "--train-iters", 4, "--calibrate-lr", 1e-6, 1e-2]
    assert finetune(*command) == 0
    tries = [records_of(tmp_path / "out" / "calibration" / f"lr-{rate}", "valid") for rate in ("1e-06", "0.01")]
    values = [max(record["accuracy"] for record in records) for records in tries]
    assert values[0] < values[1] and "learning rate 0.01, by accuracy on validation" in capsys.readouterr().out
    assert report_of(tmp_path / "out")["lr"] == 0.01
    assert finetune(*command) == 0 and "is done already" in capsys.readouterr().out
    assert "give one" in refusal(capsys, *command, "--lr", 1)


def refusal(capsys, *argv):
    """The one line that refuses a command."""
    assert finetune(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


BAD = {
    "a label is missing": ([{"seq": "ACDE", "label": "H"}, {"seq": "ACDE", "label": None}], "the label is missing"),
    "lengths differ": ([{"seq": "ACDE", "label": "HHHH"}, {"seq": "ACDE", "label": "HHC"}],
                       "4 residues, but 3 classes in the label"),
    "no label at all": ([{"seq": "ACDE"}], "no label under 'label'"),
    "no residue": ([{"seq": "", "label": "H"}], "has no residue"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_are_refused_with_their_place(base, tmp_path, capsys, name):
    records, said = BAD[name]
    path = json_lines(tmp_path / "train.jsonl", records)
    kind = ["--label-kind", "residues"] if name == "lengths differ" else []
    line = refusal(capsys, "own", "--load", base, "--train-data", path, "--save", tmp_path / "out", *kind)
    assert said in line and str(path) in line


def test_records_with_bad_labels_are_left_out_of_training_where_asked(base, tmp_path, capsys):
    for part, seed in (("train", 0), ("valid", 1)):
        records = proteins(12, seed, LABELS["number"])
        records[3]["label"] = None
        json_lines(tmp_path / f"{part}.jsonl", [*records, {"seq": "ACDE", "label": "n.d."}])
    command = ["own", "--load", base, "--data", tmp_path, "--save", tmp_path / "out", "--train-iters", 1, *QUICK]
    assert "line 4: the label is missing; give it, or leave the record out, as --skip-bad-records does" in refusal(
        capsys, *command)
    command += ["--label-kind", "number", "--skip-bad-records"]
    assert finetune(*command) == 0
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 4 and said.count("skipped 2 records of ") == 2 == said.count(": bad label 2")
    assert report_of(tmp_path / "out")["proteins"] == {"train": 11, "valid": 11}


def test_a_class_that_training_has_not_is_refused(base, tmp_path, capsys):
    train = json_lines(tmp_path / "train.jsonl", proteins(6, 0, LABELS["class"]) + [
        {"seq": "AAAAAA", "label": "rich"}, {"seq": "CCCCCC", "label": "poor"}])
    valid = json_lines(tmp_path / "valid.jsonl", [{"seq": "ACDE", "label": "middling"}])
    files = ["--train-data", train, "--valid-data", valid]
    line = refusal(capsys, "own", "--load", base, *files, "--save", tmp_path / "out")
    assert f"{valid}" in line and "the class 'middling' is none of the training file's (poor, rich)" in line


def test_an_empty_file_is_refused(base, taught, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    for command in (["own", "--load", base, "--data", tmp_path, "--save", tmp_path / "out"],
                    ["predict", taught / "number", tmp_path / "train.jsonl", tmp_path / "out.csv"]):
        assert str(tmp_path / "train.jsonl") in refusal(capsys, *command)


def test_a_model_of_another_vocabulary_is_refused(taught, tmp_path, capsys):
    other = saved(tmp_path / "other", MODEL, vocabulary="of another")
    said = refusal(capsys, "own", "--load", other, "--data", taught / "number-data", "--save", tmp_path / "out")
    assert "its vocabulary, iupac, is not there, or has changed" in said


def test_what_is_no_fine_tuned_model_cannot_predict(base, tmp_path, capsys):
    assert "holds no fine-tuned model" in refusal(capsys, "predict", base, tmp_path / "a.fasta", tmp_path / "out.csv")
    assert "ends in .csv or .jsonl" in refusal(capsys, "predict", base, tmp_path / "a.fasta", tmp_path / "out.xml")


@pytest.mark.parametrize(("flags", "said"), [
    (["own", "--save", "x"], "--load is missing"), (["own", "--load", "x"], "--save is missing"),
    (["own", "--load", "/nowhere", "--save", "x"], "/nowhere holds no checkpoint"),
    (["own", "--load", "x", "--save", "y", "--epochs", "0"], "--epochs is 0; it must be greater than 0"),
    (["own", "--load", "x", "--save", "y", "--seeds", "1", "1"], "give each once"),
    (["own", "--load", "x", "--save", "y", "--lora-alpha", "3"], "--lora-rank is missing"),
    (["own", "--load", "x", "--save", "y", "--lora-rank", "3", "--head-only"], "leave one out"),
    (["fluoresence", "--load", "x", "--save", "y"], "invalid choice: 'fluoresence'")])
def test_flags_that_cannot_be_are_refused(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *flags)


def test_precision_is_chosen_and_what_no_cpu_can_is_refused(base, taught, tmp_path, capsys):
    command = ["own", "--load", base, "--data", taught / "number-data", "--train-iters", 1, *QUICK]
    assert finetune(*command, "--save", tmp_path / "auto", "--precision", "auto") == 0
    assert "precision: " in capsys.readouterr().out
    for flag in (["--tf32"], ["--flash-attention", "FA3"]):
        said = refusal(capsys, *command, "--save", tmp_path / "out", *flag)
        assert said.startswith(flag[0]) and "this run is on cpu" in said


def test_a_folder_of_pretraining_is_not_written_over(base, taught, tmp_path, capsys):
    run = saved(tmp_path / "run", MODEL)
    (run / "metrics.jsonl").write_text('{"kind": "train", "iteration": 7}\n')
    command = ["own", "--load", run, "--data", taught / "number-data", "--train-iters", 1, *QUICK]
    assert "holds another run, which would be lost; name a new folder" in refusal(capsys, *command, "--save", run)
    assert [*iterations(run)] == [7] and "train" in (run / "metrics.jsonl").read_text()


def test_other_labels_and_other_weights_are_another_run(base, taught, tmp_path, capsys):
    data, start = task(tmp_path / "data", "number"), saved(tmp_path / "start", MODEL)
    command = ["own", "--load", start, "--data", data, "--save", tmp_path / "out", "--train-iters", 1, *QUICK]
    assert finetune(*command) == 0 and finetune(*command) == 0
    records = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    records[0]["label"] += 1
    json_lines(data / "train.jsonl", records)
    assert "of another run: the content of the task's files is not what it was" in refusal(capsys, *command)


def test_a_rate_that_diverges_is_not_chosen(base, taught, tmp_path, capsys):
    command = ["own", "--load", base, "--data", taught / "number-data", "--save", tmp_path / "out", *QUICK[2:],
               "--log-interval", 1, "--train-iters", 4, "--calibrate-lr", 1e-3, 1e30]
    assert finetune(*command) == 0
    said = capsys.readouterr().out
    assert "learning rate 1e+30: the gradients of the last 1 steps" in said and "learning rate 0.001, by" in said


def test_proteins_longer_than_rows_of_training_are_read_whole_and_from_fasta_whatever_the_key_was(base, tmp_path):
    records = [{"id": record["id"], "aa": record["seq"], "label": record["label"]}
               for record in proteins(40, 0, LABELS["residues"])]
    data = json_lines(tmp_path / "train.jsonl", records)
    assert finetune("own", "--load", base, "--train-data", data, "--sequence-key", "aa", "--save", tmp_path / "out",
                    "--seq-length", 32, "--train-iters", 2, *QUICK) == 0
    text = "ACDEFGHIKL" * 5
    (tmp_path / "long.fasta").write_text(f">a\n{text}\n")
    assert finetune("predict", tmp_path / "out", tmp_path / "long.fasta", tmp_path / "out.csv") == 0
    _, row = csv.reader((tmp_path / "out.csv").open())
    assert len(row[1]) == len(text)


def test_evaluation_refuses_a_fine_tuned_model(taught, tmp_path, capsys):
    given = parser().parse_args([str(taught / "number"), "--on", "x.fasta", "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="a fine-tuned model, which has no masked-LM head"):
        evaluate(given, Mesh(), Log(is_speaker=False))


def test_weights_of_classes_are_for_classes(base, taught, tmp_path, capsys):
    said = refusal(capsys, "own", "--load", base, "--data", taught / "number-data", "--save", tmp_path / "out",
                   "--class-weights", "balanced")
    assert "--class-weights balanced is for classes" in said
