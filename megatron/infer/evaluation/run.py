"""A model on a corpus: the loss on masks that are fixed, and the pseudo-perplexity."""

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np

from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.fixed_masks import FixedMasks
from megatron.data.rows.masking import Masking
from megatron.infer.evaluation.tally import TargetTally
from megatron.infer.predictions import Copy, copy_of, log_probabilities
from megatron.infer.pretrained import Pretrained
from megatron.infer.proteins import Protein, ProteinFiles
from megatron.log import Log, ProgressBar
from megatron.parallel.collectives import everyones

PROTEINS_AT_ONCE = 64
EACH = Masking(prob=1.0, mask_token_prob=1.0, random_prob=0.0)  # how `pseudo_perplexity` shows its targets


def evaluated(pretrained: Pretrained, files: ProteinFiles, piece: int | None, budget: int | None,
              bar: ProgressBar) -> TargetTally:
    """What the model makes of the masked residues of every protein; all ranks call this and get the same.

    The masks are those of an evaluation in training: 15 % of the residues, 80/10/10, by the letters of the protein
    alone. A protein of more than `piece` residues is read in pieces of so many, as there.
    """
    masks, tally = FixedMasks(pretrained.vocab), TargetTally(np.zeros((3, pretrained.vocab.size)))
    for proteins in _of_this_rank(pretrained, files):
        masked = [masks.mask(protein.residues.astype(np.int64)) for protein in proteins]
        copies, owners = list[Copy](), list[int]()
        for number, (ids, is_target) in enumerate(masked):
            size = piece or len(ids)
            for start in range(0, len(ids), size):
                copies.append(Copy(pretrained.between_ends(ids[start:start + size], proteins[number].name),
                                   (1 + np.flatnonzero(is_target[start:start + size])).tolist()))
                owners.append(number)
        found = list(log_probabilities(pretrained, copies, budget))
        for number, (protein, (_, is_target)) in enumerate(zip(proteins, masked, strict=True)):
            _add(tally, protein, np.flatnonzero(is_target),
                 np.concatenate([part for part, owner in zip(found, owners, strict=True) if owner == number]))
        bar.update(len(proteins) * pretrained.mesh.data.size)
    return TargetTally.merged(everyones(tally, pretrained.mesh.data))


def read_through(files: ProteinFiles, vocab: Vocab, log: Log) -> tuple[int, str]:
    """How many proteins there are, and a digest of their residues, once `log` was told what is left out.

    Raises DataError for what cannot be evaluated.
    """
    masks, digest, number = FixedMasks(vocab), hashlib.blake2b(digest_size=12), 0
    for protein in files:
        number += 1
        digest.update(masks.letters(protein.residues).tobytes() + b"\n")
    files.tell_skipped(log)
    return number, digest.hexdigest()


def pseudo_perplexity(pretrained: Pretrained, files: ProteinFiles, num_proteins: int, piece: int | None,
                      budget: int | None, bar: ProgressBar) -> TargetTally:
    """The same where each residue is masked in turn, and nothing else, of `num_proteins` drawn at random.

    Salazar et al., 2020, arXiv 1910.14659: exp of the mean loss. As many passes as there are residues. Of a protein of
    more than `piece` residues so many are seen, the masked one in their middle where it can be.
    """
    total = sum(1 for _ in files)
    drawn = set(np.random.default_rng(0).permutation(total)[:num_proteins].tolist())
    tally = TargetTally(np.zeros((3, pretrained.vocab.size)))
    data = pretrained.mesh.data
    some = (protein for number, protein in enumerate(files) if number in drawn)
    for protein in islice(some, data.rank, None, data.size):
        residues = protein.residues.astype(np.int64)
        copies = (copy_of(pretrained, residues, [site], piece, is_masked=True) for site in range(len(residues)))
        found = log_probabilities(pretrained, copies, budget)
        _add(tally, protein, np.arange(len(protein)), np.concatenate(list(found)))
        bar.update(data.size)
    return TargetTally.merged(everyones(tally, data))


def _of_this_rank(pretrained: Pretrained, files: ProteinFiles) -> Iterator[list[Protein]]:
    """Some proteins at a time, of those that fall to this data rank."""
    data = pretrained.mesh.data
    mine = islice(files, data.rank, None, data.size)
    while proteins := list(islice(mine, PROTEINS_AT_ONCE)):
        yield proteins


def _add(tally: TargetTally, protein: Protein, residues: np.ndarray, log_probabilities_cv: np.ndarray) -> None:
    true_ids = protein.residues[residues].astype(np.int64)
    losses = -log_probabilities_cv[np.arange(len(true_ids)), true_ids].astype(np.float64)
    tally.add(true_ids, 1 + residues, losses, log_probabilities_cv.argmax(1) == true_ids)
