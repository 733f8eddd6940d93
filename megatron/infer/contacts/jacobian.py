"""Contacts from how a change of one residue changes what is said of the others: the categorical Jacobian.

Zhang et al., 2024, bioRxiv 2024.01.30.577970. It needs no structures to be fitted on and no attention maps, but as many
proteins through the model as there are substitutions. Computed as in the published program, which takes all changes
together, r·20·r·20 numbers in fp32. Shapes: r residues, a letters put in, b letters told.
"""

from collections.abc import Callable

import numpy as np
import torch

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.errors import ConfigError
from megatron.infer.answers import Asked
from megatron.infer.contacts.regression import corrected
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import free_bytes, token_budget
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis


def jacobian_contacts(pretrained: Pretrained, ids: np.ndarray, budget: int | None = None,
                      progress: Callable[[int], object] = lambda residues: None) -> np.ndarray:
    """How much two residues depend on each other, fp32 [r, r]: no probability, but the higher, the likelier a contact.

    Of each residue all 20 letters are put in; the logits of the 20 letters of every residue are centred along each of
    the four dimensions and made symmetric; a pair's score is the Frobenius norm of its 20 x 20, the diagonal 0, less
    the average product. `ids`: a protein as `Pretrained.encode` gives it. `budget`: the tokens of a row, by default as
    memory allows. `progress` hears of residues that are done. Tensor ranks call this together and get the same. Raises
    ConfigError where memory does not hold that many numbers.
    """
    jacobian_rarb = _logits(pretrained, ids, budget, progress)
    for dim in range(4):
        jacobian_rarb -= jacobian_rarb.mean(dim, keepdims=True)
    norms_rr = np.empty((len(jacobian_rarb),) * 2, np.float32)
    for place, changes_arb in enumerate(jacobian_rarb):
        other_way_arb = jacobian_rarb[:, :, place].transpose(2, 0, 1)
        norms_rr[place] = np.sqrt(np.square((changes_arb + other_way_arb) / 2).sum((0, 2)))
    np.fill_diagonal(norms_rr, 0)
    return corrected(torch.from_numpy(norms_rr)[None])[0].numpy() / 2


def check_memory(num_residues: int, axis: Axis) -> None:
    """Raises ConfigError on all ranks of an axis where the host of one has no memory for the Jacobian."""
    needed = 4 * (num_residues * len(AMINO_ACIDS))**2
    if any(all_gather_object(needed > free_bytes(torch.device("cpu")), axis)):
        raise ConfigError(f"the Jacobian of {num_residues} residues takes {needed / 2**30:.1f} GiB, more than is free; "
                          "take a part of the protein, or attention maps")


def _logits(pretrained: Pretrained, ids: np.ndarray, budget: int | None, progress: Callable[[int], object]
            ) -> np.ndarray:
    """Those of the 20 letters at each residue, for each letter at each residue, fp32 [r, a, r, b].

    What the unchanged protein has need not be taken off: it is the same for all letters put in.
    """
    size, letters = len(ids) - pretrained.num_ends, [pretrained.vocab.ids[letter] for letter in AMINO_ACIDS]
    check_memory(size, pretrained.mesh.tensor)
    budget = token_budget(budget, pretrained.config.model, 0, pretrained.mesh)
    at_once = max(1, budget // (len(letters) * len(ids)))
    logits_rarb = np.empty((size, len(letters), size, len(letters)), np.float32)
    for start in range(0, size, at_once):
        changed = range(start, min(start + at_once, size))
        variants = [_with_letter(ids, place, letter) for place in changed for letter in letters]
        answers = pretrained.ask_ids(variants, Asked(("logits",), ()), budget)
        logits_rarb[changed] = np.stack([answer["logits"][:, letters] for answer in answers]).reshape(
            len(changed), *logits_rarb.shape[1:])
        progress(len(changed))
    return logits_rarb


def _with_letter(ids: np.ndarray, place: int, letter: int) -> np.ndarray:
    """A protein between its ends with another letter as residue number `place`, from 0."""
    changed = ids.copy()
    changed[1 + place] = letter
    return changed
