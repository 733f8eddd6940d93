"""What a model sees of a protein for some of its residues: all, or a window around them."""

from collections.abc import Sequence

import numpy as np

from megatron.errors import ConfigError
from megatron.infer.predictions import Copy
from megatron.infer.pretrained import Pretrained


def longest_window(pretrained: Pretrained, asked: int | None, flag: str = "--window") -> int | None:
    """The residues of a window: what is asked for, else what the model's positions allow; None: any number.

    Raises ConfigError where the model has not got so many positions.
    """
    limit = pretrained.max_residues
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        raise ConfigError(f"{flag} is {asked}; it must be 1 or greater" +
                          ("" if limit is None else f", and at most {limit}, whose positions the model knows"))
    return limit if asked is None else asked


def window_around(site: int, num_residues: int, longest: int | None) -> range:
    """The residues that a model sees of a protein for one of them: ProteinGym's optimal window.

    The whole protein where it fits; else `longest` residues, the site in their middle, or as near to it as the
    protein's ends allow.
    """
    if longest is None or num_residues <= longest:
        return range(num_residues)
    start = min(max(site - longest // 2, 0), num_residues - longest)
    return range(start, start + longest)


def copy_of(pretrained: Pretrained, residues: np.ndarray, sites: Sequence[int], longest: int | None, is_masked: bool
            ) -> Copy:
    """A protein, given as its residues' ids, in the window around some sites, all of which have the same one."""
    window = window_around(sites[0], len(residues), longest)
    ids = pretrained.between_ends(residues[window.start:window.stop], "protein")
    places = [1 + site - window.start for site in sites]
    if is_masked:
        ids[places] = pretrained.vocab.mask_id
    return Copy(ids, places)
