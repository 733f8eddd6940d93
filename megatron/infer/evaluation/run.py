"""Evaluates a model on a corpus: the loss on fixed masks, and the pseudo-perplexity."""

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
from megatron.parallel.collectives import all_gather_object

PROTEINS_AT_ONCE = 64
EACH = Masking(prob=1.0, mask_token_prob=1.0, random_prob=0.0)  # how `pseudo_perplexity` shows its targets


def evaluated(pretrained: Pretrained, files: ProteinFiles, piece: int | None, budget: int | None,
              bar: ProgressBar) -> TargetTally:
    """The model's results on the masked residues of every protein; all ranks must call this, and each gets the same.

    Masks are the same as in evaluations during training: 15 % of the residues, 80/10/10, chosen by the protein's
    letters alone. A protein of more than `piece` residues is read in pieces of that many, as in training.
    """
    masks, tally = FixedMasks(pretrained.vocab), TargetTally(np.zeros((3, pretrained.vocab.size)))
    for proteins in _of_this_rank(pretrained, files):
        work = list[tuple[Protein, np.ndarray, list[Copy]]]()  # proteins, their targets, their pieces
        for protein in proteins:
            ids, is_target = masks.mask(protein.residues.astype(np.int64))
            parts = [slice(start, start + (piece or len(ids))) for start in range(0, len(ids), piece or len(ids))]
            work.append((protein, np.flatnonzero(is_target), [
                Copy(pretrained.between_ends(ids[part], protein.name), (1 + np.flatnonzero(is_target[part])).tolist())
                for part in parts]))
        found = log_probabilities(pretrained, [copy for *_, copies in work for copy in copies], budget)
        for protein, targets, copies in work:
            _add(tally, protein, targets, np.concatenate([next(found) for _ in copies]))
        bar.update(len(proteins) * pretrained.mesh.data.size)
    return TargetTally.merged(all_gather_object(tally, pretrained.mesh.data))


def read_through(files: ProteinFiles, vocab: Vocab, log: Log) -> tuple[int, str]:
    """The number of proteins and a digest of their residues; logs which records are left out.

    Raises DataError for a file that cannot be evaluated.
    """
    masks, digest, number = FixedMasks(vocab), hashlib.blake2b(digest_size=12), 0
    for protein in files:
        number += 1
        digest.update(masks.letters(protein.residues).tobytes() + b"\n")
    files.tell_skipped(log)
    return number, digest.hexdigest()


def pseudo_perplexity(pretrained: Pretrained, files: ProteinFiles, num_proteins: int, piece: int | None,
                      budget: int | None, bar: ProgressBar) -> TargetTally:
    """The model's results with each residue masked in turn, for `num_proteins` proteins drawn at random.

    The pseudo-perplexity is exp of the mean loss (Salazar et al., 2020, arXiv 1910.14659). Takes one forward pass per
    residue. Of a protein of more than `piece` residues, the model sees that many around the masked one.
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
    return TargetTally.merged(all_gather_object(tally, data))


def _of_this_rank(pretrained: Pretrained, files: ProteinFiles) -> Iterator[list[Protein]]:
    """Batches of the proteins that belong to this data rank."""
    data = pretrained.mesh.data
    mine = islice(files, data.rank, None, data.size)
    while proteins := list(islice(mine, PROTEINS_AT_ONCE)):
        yield proteins


def _add(tally: TargetTally, protein: Protein, residues: np.ndarray, log_probabilities_cv: np.ndarray) -> None:
    true_ids = protein.residues[residues].astype(np.int64)
    losses = -log_probabilities_cv[np.arange(len(true_ids)), true_ids].astype(np.float64)
    tally.add(true_ids, 1 + residues, losses, log_probabilities_cv.argmax(1) == true_ids)
