"""The baselines that a model must beat: the loss of a predictor that knows only how frequent each letter is."""

from dataclasses import dataclass

import numpy as np

from megatron.data.rows.masking import Masking


@dataclass(frozen=True)
class Baselines:
    """The loss of a predictor that knows nothing but the training letters' frequencies, in nats per masked residue.

    `letters`: it predicts every target from the frequencies alone. `visible`: where a target shows a letter instead of
    [MASK] (10 % keep their own, 10 % get a random one), it also uses that letter. A model below the second has learnt
    something about proteins.
    """

    letters: float
    visible: float


def frequency_baselines(train_counts: np.ndarray, valid_counts: np.ndarray, residue_ids: np.ndarray,
                        masking: Masking) -> Baselines | None:
    """The baselines of proteins with `valid_counts`, for a predictor that knows `train_counts`, both per token id.

    None if there is no residue to predict. A letter that is not in the training data counts as seen once there.
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
