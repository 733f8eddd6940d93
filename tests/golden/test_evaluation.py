"""What a run reports of each of its corpora, and of the weights that it started from."""

import json

import pytest

from pretrain_tape import main
from tests.golden.training import TINY, losses, run_on_ranks, write_corpus

FLAGS = [*TINY, "--eval-iters", "0", "--train-iters", "4", "--lr-decay-iters", "4"]
EACH = ["--eval-each", "--eval-at-start"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A blend of two corpora of different sizes, as --data-path has it."""
    folders = [tmp_path_factory.mktemp(name) for name in ("few", "many")]
    few, many = (write_corpus(folder, count) for folder, count in zip(folders, (60, 200), strict=True))
    return ["0.3", few, "0.7", many]


def run(folder, data_path, *flags):
    """Run the program in this process; every record of its evaluations by kind and iteration, without the clock."""
    assert main([*FLAGS, "--data-path", *data_path, "--save", str(folder), *map(str, flags)]) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record.pop("training_s") > 0 or record["iteration"] == 0
        assert record.pop("written_s") > 0
    return {(record["kind"], record["iteration"]): record for record in records if record["kind"] != "train"}


@pytest.fixture(scope="module")
def each(corpora, tmp_path_factory):
    """The folder of a run with both flags, and its evaluations."""
    folder = tmp_path_factory.mktemp("each")
    return folder, run(folder, corpora, *EACH)


def names(corpora):
    # Both end in "corpus": the whole prefix tells them apart.
    return corpora[1], corpora[3]


def test_the_blends_loss_is_that_of_its_corpora_together(each, corpora):
    for split in ("valid", "test"):
        for iteration in (0, 4):
            whole, *parts = (each[1][kind, iteration] for kind in (
                split, *(f"{split}/{name}" for name in names(corpora))))
            assert whole["num_targets"] == sum(part["num_targets"] for part in parts) > 0
            together = sum(part["loss"] * part["num_targets"] for part in parts) / whole["num_targets"]
            assert whole["loss"] == pytest.approx(together, rel=1e-6)


def test_a_corpus_that_is_alone_is_said_to_have_no_others_beside_it(corpora, tmp_path, capsys):
    run(tmp_path, corpora[1:2], "--eval-each")
    note = "note: --eval-each changes nothing without several weighted corpora in --data-path"
    assert note in capsys.readouterr().out


def test_a_corpus_beside_others_is_evaluated_as_it_is_alone(each, corpora, tmp_path):
    for number, name in enumerate(names(corpora)):
        alone = run(tmp_path / str(number), [name], "--eval-at-start")
        assert alone["valid", 0]["num_targets"] == each[1][f"valid/{name}", 0]["num_targets"]
        assert alone["valid", 0]["loss"] == pytest.approx(each[1][f"valid/{name}", 0]["loss"], rel=1e-6)


def test_more_evaluations_change_no_bit_of_a_run(each, corpora, tmp_path):
    plain = run(tmp_path, corpora)
    assert set(plain) == {("valid", 4), ("test", 4)}
    assert {key: each[1][key] for key in plain} == plain
    assert losses(tmp_path) == losses(each[0])


def test_a_run_from_weights_begins_where_they_were_left_and_says_both_losses(each, corpora, tmp_path, capsys):
    again = run(tmp_path, corpora, *EACH, "--load", each[0], "--finetune")
    for kind, iteration in each[1]:
        if iteration == 4:
            assert again[kind, 0] == {**each[1][kind, 4], "iteration": 0, "consumed_samples": 0, "consumed_residues": 0,
                                      "consumed_flops": 0.0}
    summary = capsys.readouterr().out.splitlines()
    for name in names(corpora):
        line = next(line for line in summary if line.startswith(f"  validation loss on {name}"))
        assert f"{again[f'valid/{name}', 4]['loss']:.4f} nats" in line
        assert line.endswith(f"before the first step {again[f'valid/{name}', 0]['loss']:.4f}")


def test_a_run_that_goes_on_keeps_what_was_before_its_first_step(corpora, tmp_path, capsys):
    flags = [*EACH, "--load", tmp_path]
    first = run(tmp_path, corpora, *flags, "--exit-interval", 2)
    again = run(tmp_path, corpora, *flags)
    assert {iteration for _, iteration in first} == {0} and {iteration for _, iteration in again} == {0, 4}
    assert capsys.readouterr().out.count("before the first step") == 6


def test_tensorboard_has_each_corpus_by_its_name(each, corpora):
    content = b"".join(file.read_bytes() for file in (each[0] / "tensorboard").iterdir())
    for name in names(corpora):
        assert f"valid/{name}/loss".encode() in content and f"test/{name}/loss".encode() in content


def test_ranks_evaluate_each_corpus_together(each, corpora, tmp_path):
    flags = [*FLAGS, "--data-path", *corpora, "--save", tmp_path, *EACH, "--micro-batch-size", 1]
    assert run_on_ranks(*flags, ranks=2) == [0, 0]
    for name in names(corpora):
        assert losses(tmp_path, f"valid/{name}")[4] == pytest.approx(each[1][f"valid/{name}", 4]["loss"], rel=1e-4)


def test_what_is_not_evaluated_and_not_kept_is_told(tmp_path, capsys):
    few = write_corpus(tmp_path, 9)
    assert main([*FLAGS, "--data-path", few, "--split", "969,30,1"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes[-2:] == [
        "note: of so few proteins --split 969,30,1 leaves none for validation and test: there is no validation and no "
        "test loss; give larger shares, such as 80,10,10", "note: without --save nothing of this run is kept"]
    assert main([*FLAGS, "--data-path", few, "--split", "80,19,1"]) == 0
    assert "leaves none for test: there is no test loss; give" in capsys.readouterr().out
    assert main([*FLAGS, "--data-path", few, "--split", "1,0,0", "--save", str(tmp_path / "kept")]) == 0
    assert "note: " not in capsys.readouterr().out


def test_a_complete_run_that_is_evaluated_on_other_data_keeps_its_own_results(corpora, tmp_path, capsys):
    own, other = ([*FLAGS, "--data-path", path, "--save", str(tmp_path), "--load", str(tmp_path)]
                  for path in (corpora[3], corpora[1]))
    assert main([*own, "--save-interval", "2"]) == 0
    names = ["metrics.jsonl", "loss.png", "report.html", "iter_0000004/validation.json"]
    before = [(tmp_path / name).read_bytes() for name in names]
    capsys.readouterr()
    for flags in (other, [*own, "--split", "80,17,3"], [*own, "--eval-iters", "1"]):
        assert main(flags) == 0
        said = capsys.readouterr().out
        assert "note: the run is complete, and its validation loss was measured on other data" in said
        assert ("including those that --eval-iters leaves out" in said) == (flags[-1] == "1")
        assert "  validation loss     " in said and "report.html" not in said and "metrics.jsonl" not in said
        assert [(tmp_path / name).read_bytes() for name in names] == before
    assert main(own) == 0  # on its own data it is evaluated as before
    assert "report.html" in capsys.readouterr().out and (tmp_path / names[-1]).read_bytes() == before[-1]


def test_a_run_that_goes_on_with_other_data_chooses_its_best_among_those_of_these(corpora, tmp_path, capsys):
    flags = ["--load", tmp_path, "--save-interval", "2", "--eval-interval", "2", "--lr", "2"]  # it gets worse
    first = run(tmp_path, [corpora[3]], *flags)
    second = run(tmp_path, [corpora[1]], *flags, "--train-iters", "8")
    assert second["valid", 4]["measured_on"] == first["valid", 4]["measured_on"] != second["valid", 8]["measured_on"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: best has the lowest loss")]
    assert len(told) == 1 and "evaluated on what iter_0000006 was: that of others, up to iter_0000004, is of" in told[0]
    best = min((6, 8), key=lambda step: second["valid", step]["loss"])
    assert (tmp_path / "best").resolve().name == f"iter_{best:07d}"
    report = (tmp_path / "report.html").read_text()
    assert "validation loss: 2 of its evaluations before this are of other data" in report
    assert report.count("on other data") == 2  # of its checkpoints
