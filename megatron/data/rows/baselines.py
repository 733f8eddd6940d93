"""The baselines that a model must beat: what knowing the frequencies of letters costs, and nothing else."""

from dataclasses import dataclass

import numpy as np

from megatron.data.rows.masking import Masking


@dataclass(frozen=True)
class Baselines:
    """What knowing no more than the frequencies of letters costs, in nats a masked residue.

    `letters`: predict each residue from the frequencies alone. `visible`: the same, but where masking left a letter
    standing (10 % of the targets keep theirs, 10 % show a random one), weigh that it may be the true one. A model has
    learnt something of proteins when it is below the second.
    """

    letters: float
    visible: float


def frequency_baselines(train_counts: np.ndarray, valid_counts: np.ndarray, residue_ids: np.ndarray,
                        masking: Masking) -> Baselines | None:
    """The baselines on proteins with `valid_counts` of someone who knows `train_counts`; both are by token id.

    None where there is no residue to predict. A letter unseen in training counts as seen once.
    """
    num_residues = valid_counts[residue_ids].sum()
    if num_residues == 0:
        return None
    seen = np.maximum(train_counts, valid_counts > 0)[residue_ids].astype(np.float64)
    train = np.maximum(seen, 1e-9) / seen.sum()
    valid = valid_counts[residue_ids] / num_residues
    letters = float(-(valid * np.log(train)).sum())
    kept, drawn = 1 - masking.mask_token_prob - masking.random_prob, masking.random_prob / len(residue_ids)
    # joint[true, shown]: how often the two letters meet at a target that is not [MASK]
    model = np.diag(kept * train) + drawn * train[:, None]
    actual = np.diag(kept * valid) + drawn * valid[:, None]
    shown = np.maximum(model.sum(0), 1e-300)
    return Baselines(letters, masking.mask_token_prob * letters - float((actual * np.log(
        np.maximum(model, 1e-300) / shown)).sum()))
