"""Contacts from how a change of one residue changes what is said of the others: the categorical Jacobian.

Zhang et al., 2024, bioRxiv 2024.01.30.577970. It needs no structures to be fitted on and no attention maps, but as many
proteins through the model as there are substitutions. Other than in the published program, which holds all r·20·r·20
changes at once, they are centred within each pair of residues and symmetrised as norms: memory is r² and a row's
logits. Shapes: r residues, s residues of them that are changed together, a letters put in, b letters told.
"""

from collections.abc import Callable

import numpy as np
import torch

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.infer.answers import Asked
from megatron.infer.contacts.regression import corrected
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import token_budget
from megatron.parallel.collectives import everyones


def jacobian_contacts(pretrained: Pretrained, ids: np.ndarray, budget: int | None = None,
                      progress: Callable[[int], object] = lambda residues: None) -> np.ndarray:
    """How much two residues depend on each other, fp32 [r, r]: no probability, but the higher, the likelier a contact.

    Of each residue all 20 letters are put in; the logits of the 20 letters of every residue, centred over both sets of
    letters, have a Frobenius norm for each pair; the diagonal is 0, the norms are symmetrised and corrected for their
    average product. `ids`: a protein as `Pretrained.encode` gives it. `budget`: the tokens of a row, by default as
    memory allows. `progress` hears of residues that are done. Tensor ranks call this together and get the same.
    """
    size, letters = len(ids) - pretrained.num_ends, [pretrained.vocab.ids[letter] for letter in AMINO_ACIDS]
    mesh = pretrained.mesh
    budget = budget or min(everyones(token_budget(pretrained.config.model, 0, mesh.device), mesh.tensor))
    at_once = max(1, budget // (len(letters) * len(ids)))
    norms_rr = np.zeros((size, size), np.float32)
    for start in range(0, size, at_once):
        changed = range(start, min(start + at_once, size))
        variants = [_with_letter(ids, place, letter) for place in changed for letter in letters]
        answers = pretrained.ask_ids(variants, Asked(("logits",), ()), budget)
        logits_sarb = np.stack([answer["logits"][:, letters] for answer in answers])
        logits_sarb = logits_sarb.reshape(len(changed), len(letters), size, len(letters))
        logits_sarb -= logits_sarb.mean(1, keepdims=True)  # and with it what the unchanged protein has
        logits_sarb -= logits_sarb.mean(3, keepdims=True)
        norms_rr[changed] = np.sqrt(np.square(logits_sarb).sum((1, 3)))
        progress(len(changed))
    np.fill_diagonal(norms_rr, 0)
    return corrected(torch.from_numpy(norms_rr)[None])[0].numpy() / 2


def _with_letter(ids: np.ndarray, place: int, letter: int) -> np.ndarray:
    """A protein between its ends with another letter as residue number `place`, from 0."""
    changed = ids.copy()
    changed[1 + place] = letter
    return changed
