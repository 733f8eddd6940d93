"""tools/evaluate.py reports losses that agree with the definition, on the masks of every evaluation."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.convert.formats import AUTO
from megatron.data.corpus.vocab import AMINO_ACIDS, Vocab
from megatron.data.rows.baselines import frequency_baselines
from megatron.data.rows.fixed_masks import FIXED, FixedMasks
from megatron.errors import ConfigError, DataError, UserError
from megatron.infer.evaluation.run import EACH, evaluated, pseudo_perplexity
from megatron.infer.evaluation.tally import FIRST_OF_BIN, TargetTally, bin_names
from megatron.infer.proteins import ProteinFiles
from megatron.infer.variants.mutants import parse_mutant
from megatron.infer.variants.scores import MASKED, scores_of
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from tests.transformers_models import PROTEINS
from tests.unit.test_pretrained import EVERYTHING, TINY, saved
from tools.evaluate import corpora_of, evaluate, parser

TEXTS = [PROTEINS[0], PROTEINS[1], "ACDEFGHIKLMNPQRSTVWY" * 3]
BAR = Log(is_speaker=False).progress(total=1, done=0, unit="protein", label="")


@pytest.fixture(scope="module")
def pretrained(their_folders):
    return load_pretrained(str(their_folders / "esm2"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "three.fasta"
    path.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(TEXTS)))
    return path


def files(fasta):
    return ProteinFiles([str(fasta)], "text", None, Vocab.from_file("esm"))


def their_log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1).numpy()


def test_the_loss_is_the_mean_over_the_masked_residues_of_all_proteins(pretrained, fasta, their_models):
    report = evaluated(pretrained, files(fasta), None, 70, BAR).report(pretrained.vocab, FIXED)
    masks, losses, right, letters = FixedMasks(pretrained.vocab), [], [], []
    for text in TEXTS:
        ids = pretrained.encode(text, "a")[1:-1]
        masked, is_target = masks.mask(ids)
        found = their_log_probabilities(their_models["esm2"], pretrained.between_ends(masked, "a"))[1:-1]
        losses.append(-found[is_target, ids[is_target]])
        right.append(found[is_target].argmax(1) == ids[is_target])
        letters += [pretrained.vocab.tokens[index] for index in ids[is_target]]
    flat = np.concatenate(losses)
    assert report["targets"] == len(flat) and report["proteins"] == 3
    assert report["loss"] == pytest.approx(flat.mean(), abs=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(flat.mean()), rel=1e-3)
    assert report["accuracy"] == np.concatenate(right).mean()
    for letter in set(letters):
        of_letter = flat[[each == letter for each in letters]]
        assert report["by_letter"][letter]["targets"] == len(of_letter)
        assert report["by_letter"][letter]["loss"] == pytest.approx(of_letter.mean(), abs=1e-3)
    mean = flat.mean()
    spread = math.sqrt(sum((each.sum() - mean * len(each))**2 for each in losses)) / len(flat)
    assert report["standard_error"] == pytest.approx(spread, rel=1e-2)


def test_targets_are_counted_by_their_numbers_in_the_protein(pretrained, fasta):
    masks, expected = FixedMasks(pretrained.vocab), np.zeros(len(FIRST_OF_BIN))
    for protein in files(fasta):
        for number in 1 + np.flatnonzero(masks.mask(protein.residues.astype(np.int64))[1]):
            expected[(number >= FIRST_OF_BIN).sum() - 1] += 1
    found = evaluated(pretrained, files(fasta), None, None, BAR).by_position_3n[0]
    assert found.tolist() == expected.tolist()


def test_pieces_of_a_protein_are_masked_as_parts_of_it(pretrained, fasta):
    whole, pieces = (evaluated(pretrained, files(fasta), size, None, BAR) for size in (None, 25))
    assert np.array_equal(whole.by_letter_3v[0], pieces.by_letter_3v[0])
    assert np.array_equal(whole.by_position_3n[0], pieces.by_position_3n[0])
    assert whole.of_proteins[:2] == pieces.of_proteins[:2] and whole.of_proteins[2] != pieces.of_proteins[2]


@pytest.mark.parametrize(("config", "other"), [(TINY, "megatron-v2"), (EVERYTHING, "whole")])
def test_a_run_and_what_it_is_converted_to_answer_alike(config, other, tmp_path, fasta):
    run = saved(tmp_path / "run", config)
    for saver in ("hf", other):
        convert(run, tmp_path / saver, AUTO, saver, tensor=1 + (other == "megatron-v2" == saver), pipeline=1,
                iteration=None, vocab_size=None, log=Log(is_speaker=False))
    first, *others = (load_pretrained(str(tmp_path / name)) for name in ("run", "hf", other))
    assert first.model.lm_head.num_ids > first.vocab.size  # there are ids that are none
    mutants = [parse_mutant("A1W"), parse_mutant("C2G:D3E")]

    def answered(model):
        corpus = ProteinFiles([str(fasta)], "text", None, model.vocab)
        reports = [evaluated(model, corpus, 50, None, BAR), pseudo_perplexity(model, corpus, 1, 50, None, BAR)]
        scores = scores_of(model, MASKED, TEXTS[2], mutants, 50)
        losses = [report.report(model.vocab, FIXED)["loss"] for report in reports]
        return [*losses, *scores, *model.logits([TEXTS[2][:50]])[0].ravel()]

    for other in others:
        np.testing.assert_allclose(answered(other), answered(first), rtol=1e-5, atol=1e-5)


def test_pseudo_perplexity_masks_each_residue_in_turn_and_no_other(pretrained, fasta, their_models):
    report = pseudo_perplexity(pretrained, files(fasta), 3, None, 100, BAR).report(pretrained.vocab, EACH)
    losses = []
    for text in TEXTS:
        ids = pretrained.encode(text, "a")
        for place in range(1, len(ids) - 1):
            masked = ids.copy()
            masked[place] = pretrained.vocab.mask_id
            losses.append(-their_log_probabilities(their_models["esm2"], masked)[place, ids[place]])
    assert report["targets"] == len(losses) == sum(map(len, TEXTS))
    assert report["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert len(pseudo_perplexity(pretrained, files(fasta), 1, None, None, BAR).of_proteins) == 1


def test_the_baselines_are_of_the_targets_and_of_how_masking_shows_them():
    vocab, tally = Vocab.from_file(), TargetTally(np.zeros((3, Vocab.from_file().size)))
    letters = "AAAC" * 1000
    tally.add(np.array([vocab.ids[letter] for letter in letters]), np.arange(1, 4001), np.ones(4000), np.ones(4000))
    counts = np.zeros(vocab.size)
    counts[[vocab.ids["A"], vocab.ids["C"]]] = 3000, 1000
    alone = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = tally.report(vocab, FIXED)
    assert found["letters_alone"] == pytest.approx(alone)
    assert found["letters_and_visible"] == frequency_baselines(counts, counts, vocab.residue_ids, FIXED).visible < alone
    assert tally.report(vocab, EACH)["letters_and_visible"] == pytest.approx(alone)  # where all are [MASK]


def test_unknown_residues_are_targets_and_what_they_add_is_told(their_folders, tmp_path, capsys):
    protein = "XUX" + TEXTS[2]
    (tmp_path / "odd.fasta").write_text(f">a\n{protein * 4}\n>b\n{TEXTS[2]}\n")
    report = asked(tmp_path / "out", [their_folders / "esm2"], "--on", tmp_path / "odd.fasta")["odd"].popitem()[1]
    known, odd = ([facts for letter, facts in report["by_letter"].items() if (letter in AMINO_ACIDS) == is_known]
                  for is_known in (True, False))
    number, loss = (sum(facts["targets"] * facts.get(name, 1) for facts in known) for name in ("", "loss"))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("odd: "))
    assert f"odd: {sum(facts['targets'] for facts in odd)} of {report['targets']} targets are none of the 20" in said
    assert f"without them the loss is {loss / number:.4f} (" in said and "X" in report["by_letter"]


def test_residues_are_counted_in_the_bin_of_their_number():
    tally = TargetTally(np.zeros((3, 4)))
    numbers = np.array([1, 2, 10, 11, 50, 51, 800, 801, 5000])
    tally.add(np.zeros(9, int), numbers, np.arange(9.0), np.ones(9, bool))
    assert tally.by_position_3n[0].tolist() == [1, 2, 2, 1, 0, 0, 1, 2]
    assert bin_names() == ["1", "2–10", "11–50", "51–100", "101–200", "201–400", "401–800", "801+"]
    assert all(before < after for before, after in pairwise(FIRST_OF_BIN))


def test_the_program_writes_a_table_a_file_and_a_picture_a_corpus(their_folders, fasta, tmp_path, capsys):
    output = tmp_path / "out"
    given = parser().parse_args([str(their_folders / "esm2"), str(their_folders / "protbert"), "--on", str(fasta),
                                 f"again={fasta}", "--output", str(output), "--pseudo-perplexity", "1"])
    evaluate(given, Mesh(), Log())
    said = capsys.readouterr().out
    reports = json.loads((output / "evaluation.json").read_text())
    assert list(reports) == ["three", "again"] and reports["three"] == reports["again"]
    assert [len(of_models) for of_models in reports.values()] == [2, 2]
    for model, report in reports["three"].items():
        assert f"{report['loss']:.4f}" in said and model in said
        assert f"{report['letters_and_visible']:.4f}" in said
        assert report["targets"] == 14 and report["pseudo"]["proteins"] == 1
    assert (output / "three.png").read_bytes()[:4] == (output / "again.png").read_bytes()[:4] == b"\x89PNG"


def asked(output, checkpoints, *words):
    given = parser().parse_args([*map(str, checkpoints), "--output", str(output), *map(str, words)])
    evaluate(given, Mesh(), Log())
    return json.loads((output / "evaluation.json").read_text())


def test_models_evaluated_on_the_same_proteins_before_stand_beside_the_new_ones(their_folders, fasta, tmp_path, capsys):
    first, second = their_folders / "esm2", their_folders / "protbert"
    before = asked(tmp_path / "out", [first], "--on", fasta)
    capsys.readouterr()
    after = asked(tmp_path / "out", [second], "--on", fasta, f"other={fasta}")
    assert list(after) == ["three", "other"] and list(after["three"]) == [f"{first} at 0", f"{second} at 0"]
    assert after["three"][f"{first} at 0"] == before["three"][f"{first} at 0"]
    assert capsys.readouterr().out.count(f"\n{first} at 0") == 1
    again = asked(tmp_path / "out", [second], "--on", f"other={fasta}", "--pseudo-perplexity", 1)
    assert again["three"] == after["three"] and "pseudo" in again["other"][f"{second} at 0"]


@pytest.mark.parametrize(("words", "differing"), [
    (["--piece", 25], "--piece"), (["--precision", "bf16"], "--precision"), (["OTHER"], "proteins")])
def test_figures_that_cannot_stand_beside_the_new_ones_are_kept_and_the_new_ones_refused(
        words, differing, their_folders, fasta, tmp_path, monkeypatch):
    asked(tmp_path / "out", [their_folders / "esm2"], "--on", fasta)
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    monkeypatch.setattr("tools.evaluate.evaluated", None)
    (tmp_path / "three.fasta").write_text(fasta.read_text().replace("ACDE", "AACE"))
    corpus = tmp_path / "three.fasta" if words == ["OTHER"] else fasta
    with pytest.raises(ConfigError, match=f"evaluated on three with other {differing}: its figures"):
        asked(tmp_path / "out", [their_folders / "protbert"], "--on", corpus, *(words if corpus == fasta else ()))
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    (tmp_path / "out" / "evaluation.json").write_text("[1]")
    with pytest.raises(DataError, match="evaluation.json: is not of this program"):
        asked(tmp_path / "out", [their_folders / "esm2"], "--on", fasta)


@pytest.mark.parametrize(("models", "on", "words", "what"), [
    (["esm2"], ["FASTA", "none.fasta"], [], "none.fasta: no such file"),
    (["esm2"], ["FASTA", "bad.fasta"], [], "'1' is not a residue"),
    (["esm2", "none"], ["FASTA"], [], "none holds no checkpoint"),
    (["esm2", "run"], ["FASTA"], ["--piece", 100], "--piece is 100; .* at most 63")])
def test_what_is_wrong_with_the_last_is_said_before_the_first_is_evaluated(models, on, words, what, their_folders,
                                                                           fasta, tmp_path, monkeypatch):
    (tmp_path / "bad.fasta").write_text(">a\nMK1\n")
    saved(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.evaluate.evaluated", None)
    with pytest.raises(UserError, match=what):
        asked(tmp_path / "out", [their_folders / "esm2" if model == "esm2" else model for model in models],
              *words, "--on", *[fasta if word == "FASTA" else word for word in on])


def test_what_is_known_is_written_before_the_next_is_evaluated(their_folders, fasta, tmp_path, monkeypatch):
    known = list[bool]()

    def stopped(*arguments):
        known.append((tmp_path / "out" / "evaluation.json").exists())
        if known[-1]:
            raise KeyboardInterrupt
        return evaluated(*arguments)

    monkeypatch.setattr("tools.evaluate.evaluated", stopped)
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path / "out", [their_folders / "esm2"], "--on", fasta, f"other={fasta}")
    assert known == [False, True]
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())) == ["three"]


def test_one_protein_has_no_standard_error(their_folders, tmp_path, capsys):
    (tmp_path / "one.fasta").write_text(f">a\n{TEXTS[0]}\n")
    reports = asked(tmp_path / "out", [their_folders / "esm2"], "--on", tmp_path / "one.fasta")
    assert reports["one"].popitem()[1]["standard_error"] is None
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(their_folders)))
    assert row.split().count("–") == 2  # neither has it a pseudo-perplexity


def test_proteins_of_which_nothing_is_masked_have_no_loss_and_no_picture(their_folders, tmp_path, capsys):
    (tmp_path / "short.fasta").write_text(">a\nM\n")
    given = parser().parse_args([str(their_folders / "esm2"), "--on", str(tmp_path / "short.fasta"), "--output",
                                 str(tmp_path / "out")])
    evaluate(given, Mesh(), Log())
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["short"].popitem()[1]["loss"] is None
    assert "no picture of short: none of its residues is masked" in capsys.readouterr().out
    assert not (tmp_path / "out" / "short.png").exists()


def test_pieces_of_more_residues_than_the_model_has_positions_for_are_refused(tmp_path, fasta):
    given = parser().parse_args([str(saved(tmp_path / "run")), "--on", str(fasta), "--output", str(tmp_path / "out"),
                                 "--piece", "100"])
    with pytest.raises(ConfigError, match="--piece is 100; it must be 1 or greater, and at most 63, whose positions"):
        evaluate(given, Mesh(), Log(is_speaker=False))


@pytest.mark.parametrize("words", [["a.fasta", "b/a.fa"], ["x=a", "x=b"], ["=a"], ["a/b=c"]])
def test_two_corpora_of_one_name_and_names_that_are_no_files_are_refused(words):
    with pytest.raises(ConfigError, match="give each corpus one of its own"):
        corpora_of(words)


def test_a_pattern_is_called_like_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd[1].fasta").touch()
    assert list(corpora_of(["held-out/*.fasta", "other/**/x?.fa", "*.gz", "mine=a/*", "odd[1].fasta"])) == [
        "held-out", "other", tmp_path.name, "mine", "odd[1]"]
