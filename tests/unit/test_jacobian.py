"""The categorical Jacobian; a loop over substitutions with transformers' ESM-2 is the oracle."""

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.data.corpus.vocab import AMINO_ACIDS, Vocab
from megatron.infer.contacts.jacobian import jacobian_contacts
from tests.transformers_models import ids_of

PROTEIN = "MKTAYIAK"


@pytest.fixture(scope="module")
def exact(their_models):
    """From the whole Jacobian [r, 20, r, 20] in fp64: centred, symmetrised, normed, corrected."""
    model, vocab = their_models["esm2"], Vocab.from_file("esm")
    letters, size = [vocab.ids[letter] for letter in AMINO_ACIDS], len(PROTEIN)
    jacobian = np.zeros((size, 20, size, 20))
    ids = torch.tensor([ids_of(PROTEIN, vocab)])
    with torch.no_grad():
        unchanged = model(input_ids=ids).logits[0, 1:-1, letters].double().numpy()
        for place in range(size):
            for number, letter in enumerate(letters):
                changed = ids.clone()
                changed[0, 1 + place] = letter
                jacobian[place, number] = model(input_ids=changed).logits[0, 1:-1, letters].double().numpy() - unchanged
    for dim in range(4):
        jacobian -= jacobian.mean(dim, keepdims=True)
    norms = np.sqrt((((jacobian + jacobian.transpose(2, 3, 0, 1)) / 2)**2).sum((1, 3)))
    np.fill_diagonal(norms, 0)
    return norms - norms.sum(0)[:, None] * norms.sum(1)[None] / norms.sum()


@pytest.mark.parametrize("budget", [None, 25, 500], ids=str)  # a row holds all, 2 substitutions, or 50
def test_scores_are_those_of_a_loop_over_all_substitutions(budget, exact, their_folders):
    pretrained, heard = load_pretrained(str(their_folders / "esm2")), []
    ours = jacobian_contacts(pretrained, pretrained.encode(PROTEIN, "mine"), budget, heard.append)
    assert ours.dtype == np.float32 and sum(heard) == len(PROTEIN)
    np.testing.assert_allclose(ours / abs(exact).max(), exact / abs(exact).max(), rtol=0, atol=2e-5)
