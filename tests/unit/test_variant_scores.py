"""Scores of variants, in whole proteins and in windows, agree with a direct computation by transformers."""

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.errors import ConfigError
from megatron.infer.predictions import Copy, log_probabilities
from megatron.infer.variants.mutants import mutated, parse_mutant
from megatron.infer.variants.scores import MARGINALS, MASKED, PSEUDO, SCORINGS, WILD_TYPE, num_copies, scores_of
from megatron.infer.variants.substitutions import all_substitutions, write_substitutions
from megatron.infer.windows import longest_window, window_around
from tests.transformers_models import ids_of

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
LONG = WILD + "LEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"  # 60 residues
MUTANTS = ["M1A", "K2W:A7C", "Q22E", "A7G", "S13T:S17T:R21K"]
KINDS = ["esm2", "esm1b", "esm1v", "protbert"]


@torch.no_grad()
def their_log_p(model, vocab, protein, site, is_masked=True):
    """The log-probabilities of all tokens at a site, from 0."""
    ids = ids_of(protein[:site] + "#" + protein[site + 1:] if is_masked else protein, vocab)
    return model(input_ids=torch.tensor([ids])).logits[0, 1 + site, :vocab.size].double().log_softmax(-1).numpy()


def difference(model, vocab, protein, site, mutant, is_masked):
    log_p = their_log_p(model, vocab, protein, site, is_masked)
    return log_p[vocab.ids[mutant]] - log_p[vocab.ids[protein[site]]]


def direct(model, vocab, mutant, scoring):
    if scoring == PSEUDO:
        protein = mutated(WILD, mutant)
        return sum(their_log_p(model, vocab, protein, site)[vocab.ids[letter]] for site, letter in enumerate(protein))
    return sum(difference(model, vocab, WILD, one.site, one.mutant, scoring == MASKED) for one in mutant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_are_those_of_transformers_a_copy_at_a_time(kind, scoring, their_models, their_folders):
    pretrained, model = load_pretrained(str(their_folders / kind)), their_models[kind]
    mutants = [parse_mutant(text) for text in (MUTANTS if scoring in MARGINALS else MUTANTS[1:3])]
    found = scores_of(pretrained, scoring, WILD, mutants, longest_window(pretrained, None), budget=60)
    expected = [direct(model, pretrained.vocab, mutant, scoring) for mutant in mutants]
    scale = max(map(abs, expected))
    np.testing.assert_allclose(found / scale, np.array(expected) / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scoring", MARGINALS)
def test_each_site_of_a_long_protein_is_seen_in_its_own_window(scoring, their_models, their_folders):
    pretrained, model = load_pretrained(str(their_folders / "esm1b")), their_models["esm1b"]
    window, vocab = 20, pretrained.vocab
    mutant = parse_mutant("M1A:L23K:K60E")

    def optimal(site):  # ProteinGym's get_optimal_window
        if site < window // 2:
            return 0
        return len(LONG) - window if site >= len(LONG) - window // 2 else site - window // 2

    expected = sum(difference(model, vocab, LONG[optimal(one.site):][:window], one.site - optimal(one.site), one.mutant,
                              scoring == MASKED) for one in mutant)
    assert scores_of(pretrained, scoring, LONG, [mutant], window)[0] == pytest.approx(expected, abs=2e-4)


def test_pseudo_likelihoods_of_long_proteins_are_of_windows(their_models, their_folders):
    pretrained, model = load_pretrained(str(their_folders / "esm1b")), their_models["esm1b"]
    protein, starts = "KKTAY", [0, 0, 1, 2, 2]  # of the windows of 3 residues
    expected = sum(their_log_p(model, pretrained.vocab, protein[start:start + 3], site - start)[
        pretrained.vocab.ids[protein[site]]] for site, start in enumerate(starts))
    assert scores_of(pretrained, PSEUDO, "MKTAY", [parse_mutant("M1K")], 3)[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("longest", [1, 2, 7, 10, 29, 30, None])
def test_a_window_is_the_one_of_its_length_whose_middle_is_nearest_to_the_site(longest):
    length = longest or 30
    for site in range(30):
        found = window_around(site, 30, longest)
        assert site in found and len(found) == length and found.start >= 0 and found.stop <= 30
        nearest = min(abs(start + length // 2 - site) for start in range(31 - length))
        assert abs(found.start + length // 2 - site) == nearest


def test_windows_are_as_long_as_the_models_positions_allow(their_folders):
    rotary, learned = (load_pretrained(str(their_folders / kind)) for kind in ("esm2", "esm1b"))
    assert (longest_window(rotary, None), longest_window(rotary, 9)) == (None, 9)
    assert (longest_window(learned, None), longest_window(learned, 9)) == (38, 9)
    for pretrained, asked in ((rotary, 0), (learned, 39)):
        with pytest.raises(ConfigError, match=f"--window is {asked}"):
            longest_window(pretrained, asked)


def test_a_site_is_computed_once_and_a_window_that_is_not_masked_too(their_folders):
    pretrained = load_pretrained(str(their_folders / "esm2"))
    mutants = [parse_mutant(text) for text in ("M1A", "M1C", "K2A:M1D", "A4C", "M1A")]
    for scoring, longest, expected in ((MASKED, None, 3), (WILD_TYPE, None, 1), (WILD_TYPE, 4, 2), (PSEUDO, None, 88)):
        seen = []
        scores_of(pretrained, scoring, WILD, mutants, longest, progress=seen.append)
        assert sum(seen) == num_copies(scoring, WILD, mutants, longest) == expected


def test_what_is_said_of_a_copy_does_not_depend_on_the_rows(their_folders):
    pretrained = load_pretrained(str(their_folders / "esm2"))
    copies = [Copy(pretrained.encode(protein, ""), places)
              for protein, places in (("MKV", [1, 3]), (WILD, [22]), ("ACDEF", [5, 1, 2]))]
    together, alone = (list(log_probabilities(pretrained, copies, budget)) for budget in (1000, 1))
    assert [part.shape for part in together] == [(2, 33), (1, 33), (3, 33)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.exp(one).sum(1), 1, rtol=0, atol=1e-5)  # over the whole vocabulary


@pytest.mark.parametrize("scoring", MARGINALS)
def test_a_heat_map_has_the_score_of_every_single_substitution(scoring, their_folders, tmp_path):
    pretrained, protein = load_pretrained(str(their_folders / "esm2")), WILD[:9] + "XS"
    found = all_substitutions(pretrained, scoring, protein, None)
    mutants = [parse_mutant(f"{wild}{site + 1}{letter}") for site, wild in enumerate(protein) for letter in AMINO_ACIDS]
    np.testing.assert_allclose(found.ravel(), scores_of(pretrained, scoring, protein, mutants, None), atol=1e-5)
    write_substitutions(tmp_path / "map.csv", protein, found, offset=7)
    head, first, *_, unknown, last = (tmp_path / "map.csv").read_text().splitlines()
    assert head == "position,wild_type,A,C,D,E,F,G,H,I,K,L,M,N,P,Q,R,S,T,V,W,Y"
    assert first.startswith("7,M,") and float(first.split(",")[2 + AMINO_ACIDS.index("M")]) == 0
    assert unknown == "16,X" + 20 * ","
    assert last.split(",")[:2] == ["17", "S"] and float(last.split(",")[2]) == pytest.approx(found[10, 0], abs=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_letters_that_are_no_amino_acids_are_seen_and_not_scored(scoring, their_models, their_folders):
    pretrained, protein, model = load_pretrained(str(their_folders / "esm2")), "MKXAYUA", their_models["esm2"]
    mutants = [parse_mutant(text) for text in ("X3A", "M1X", "M1A:K2B", "M1A", "U6C:M1A", "M1A")]
    found = scores_of(pretrained, scoring, protein, mutants, None)
    assert np.isnan(found).tolist() == [True, True, True, False, True, False]
    if scoring == PSEUDO:
        expected = sum(their_log_p(model, pretrained.vocab, "AKXAYUA", site)[pretrained.vocab.ids[letter]]
                       for site, letter in enumerate("AKXAYUA") if letter in AMINO_ACIDS)
        assert num_copies(scoring, protein, mutants, None) == 5
    else:
        expected = difference(model, pretrained.vocab, protein, 0, "A", scoring == MASKED)
    np.testing.assert_allclose(found[[3, 5]], expected, rtol=1e-4)
