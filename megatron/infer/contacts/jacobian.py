"""Contact scores from the categorical Jacobian: how substituting one residue changes the logits of all the others.

Zhang et al., 2024, bioRxiv 2024.01.30.577970. The method needs neither structures to fit nor attention maps, but one
forward pass of the protein for each possible substitution. As in the published program, the whole Jacobian is in memory
at once: r·20·r·20 numbers in fp32. Shapes: r residues, a amino acids substituted, b amino acids predicted.
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
    """How strongly residues depend on each other, fp32 [r, r]: not probabilities, but higher means a likelier contact.

    Each residue is replaced by each of the 20 amino acids. The logits of the 20 amino acids at every residue are
    centred along each of the four dimensions and symmetrised. A pair's score is the Frobenius norm of its 20 x 20
    block, with 0 on the diagonal, after average product correction. `ids`: a protein as `Pretrained.encode` returns it.
    `budget`: the tokens of a row, by default as many as memory allows. `progress` is called with the number of residues
    just finished. All tensor ranks call this together and get the same result. Raises ConfigError if the Jacobian does
    not fit into the host's free memory.
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
    """Raise ConfigError on all ranks of an axis if on any of them the host has too little memory for the Jacobian."""
    needed = 4 * (num_residues * len(AMINO_ACIDS))**2
    if any(all_gather_object(needed > free_bytes(torch.device("cpu")), axis)):
        raise ConfigError(f"the Jacobian of {num_residues} residues takes {needed / 2**30:.1f} GiB, more than is free; "
                          "take a part of the protein, or attention maps")


def _logits(pretrained: Pretrained, ids: np.ndarray, budget: int | None, progress: Callable[[int], object]
            ) -> np.ndarray:
    """The logits of the 20 amino acids at each residue, for each substitution at each residue, fp32 [r, a, r, b].

    The logits of the unchanged protein need not be subtracted: they are the same for all substitutions, and centring
    removes them.
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
    """A copy of the ids with `letter`, a token id, at residue `place`, counted from 0 after the first end token."""
    changed = ids.copy()
    changed[1 + place] = letter
    return changed
