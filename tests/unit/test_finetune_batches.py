"""Labelled proteins in rows: each label at its residues, one shape, and the same rows for every number of ranks.

Labels are computed from the residues' ids, so that a batch can be checked by its tokens alone.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.finetune.data.batches import NO_EXAMPLE, BatchSettings, PackedExamples
from megatron.finetune.data.contacts import table_of_atoms
from megatron.finetune.data.examples import Example
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import LABEL_KINDS
from megatron.kernels.packed_sequence import NO_TARGET
from tests.unit.labelled_files import VOCAB

SEQ_LENGTH = 32
SPACES = {kind: LabelSpace(kind, tuple("abc") if kind in ("class", "classes", "residues") else ())
          for kind in LABEL_KINDS}
UNLABELLED = int(VOCAB.ids["G"])  # of residues, and unresolved


def label_of(kind, ids):
    """What a protein of these residues has as its label."""
    ids = ids.astype(np.int64)
    if kind == "residues":
        return np.where(ids == UNLABELLED, NO_TARGET, ids % 3).astype(np.int16)
    if kind == "contacts":
        places = np.stack([ids, ids * 2, ids * 3], axis=1).astype(np.float32)
        places[ids == UNLABELLED] = np.nan
        return table_of_atoms(places)
    if kind == "numbers":
        return np.where(ids == UNLABELLED, np.nan, ids / 2).astype(np.float32)
    total = int(ids.sum())
    return {"number": total / 4, "class": total % 3, "classes": np.array([total % 2, total % 3, total % 5]) == 1}[kind]


def examples_of(kind, lengths, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.array([VOCAB.ids[letter] for letter in "ACDEFGHIKL"], dtype=np.uint8)
    proteins = [rng.choice(letters, size=length) for length in lengths]
    return [Example(str(number), ids, label_of(kind, ids)) for number, ids in enumerate(proteins)]


def lengths(count=70, longest=SEQ_LENGTH - 2):
    return np.random.default_rng(1).integers(1, longest + 1, size=count).tolist()


def packed(kind, sizes, is_training=True, seed=3, **settings):
    defaults = {"micro_batch_size": 2, "global_batch_size": 8, "num_ends": 2}
    return PackedExamples(examples_of(kind, sizes), SPACES[kind], VOCAB,
                          BatchSettings(SEQ_LENGTH, **{**defaults, **settings}, seed=seed), is_training)


def proteins_in(labelled):
    """The example and residues of each protein of a whole micro-batch."""
    sequence = labelled.sequence
    ends = sequence.cu_seqlens.tolist()
    found = []
    for g, number in enumerate(labelled.targets.examples_g.tolist()):
        tokens = sequence.tokens_t[ends[g]:ends[g + 1]]
        if number == NO_EXAMPLE:
            assert len(tokens) == 0
            continue
        assert (tokens[0], tokens[-1]) == (VOCAB.cls_id, VOCAB.sep_id)
        found.append((number, tokens[1:-1].numpy()))
    return found


def tensors_in(targets):
    return [*targets.residues.tensors(), targets.labels, targets.examples_g]


def numbers_in(steps):
    """The examples of each step's micro-batches."""
    return [[[number for number, _ in proteins_in(batch)] for batch in step] for step in steps]


@pytest.mark.parametrize("num_ends", [1, 2])
@pytest.mark.parametrize("is_training", [True, False])
def test_the_class_of_each_residue_is_at_its_token(num_ends, is_training):
    rows = packed("residues", [*lengths(), 60, 45], is_training, num_ends=num_ends)
    num_labels = 0
    for step in rows.steps(epoch=2):
        for labelled in step:
            targets, tokens_t = labelled.targets.residues, labelled.sequence.tokens_t
            is_target_m = targets.ids_m != NO_TARGET
            at_targets = tokens_t[targets.positions_m[is_target_m]]
            assert torch.equal(targets.ids_m[is_target_m], at_targets % 3)
            special = torch.tensor([VOCAB.cls_id, VOCAB.sep_id, VOCAB.pad_id, UNLABELLED])
            assert len(at_targets) == int((~torch.isin(tokens_t, special)).sum())
            num_labels += len(at_targets)
    assert num_labels == sum(labelled.num_targets for step in rows.steps(epoch=2) for labelled in step)
    assert len(labelled.targets.labels) == 0


@pytest.mark.parametrize("kind", ["number", "class", "classes", "numbers", "contacts"])
def test_the_label_of_each_protein_is_in_its_place(kind):
    rows = packed(kind, lengths())
    for step in rows.steps(epoch=1):
        for labelled in step:
            is_protein_g = labelled.targets.examples_g != NO_EXAMPLE
            ids = [ids for _, ids in proteins_in(labelled)]
            if kind in ("numbers", "contacts"):
                starts = labelled.sequence.cu_seqlens[:-1][:len(is_protein_g)][is_protein_g].tolist()
                expected = torch.full_like(labelled.targets.labels, torch.nan if kind == "numbers" else 0)
                for start, each in zip(starts, ids, strict=True):
                    label = torch.from_numpy(label_of(kind, each))
                    place = slice(start + 1, start + 1 + len(each))
                    if kind == "numbers":
                        expected[place] = label
                    else:
                        expected[place, :label.shape[1]] = label
                assert torch.equal(labelled.targets.labels.nan_to_num(-1), expected.nan_to_num(-1))
                continue
            expected = [np.asarray(label_of(kind, each)).tolist() for each in ids]
            assert labelled.targets.labels[is_protein_g].tolist() == expected
            assert (labelled.targets.labels[~is_protein_g] == (NO_TARGET if kind == "class" else 0)).all()
    assert len(labelled.targets.residues.ids_m) == 0


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_all_batches_of_a_run_have_one_shape(kind):
    rows = packed(kind, lengths(), token_multiple=48)
    batches = [labelled for epoch in range(4) for step in rows.steps(epoch) for labelled in step]
    shapes = {tuple((tensor.shape, tensor.dtype) for tensor in (
        *labelled.sequence.tensors(), *tensors_in(labelled.targets))) for labelled in batches}
    assert len(shapes) == 1
    assert batches[0].sequence.tokens_t.shape == (96,)
    assert {labelled.sequence.max_length for labelled in batches} == {max(lengths()) + 2}


def test_each_epoch_has_every_example_once_in_an_order_of_its_own():
    rows = packed("number", lengths())
    first, second = (numbers_in(rows.steps(epoch)) for epoch in (0, 1))
    for epoch in (first, second):
        assert sorted(number for step in epoch for batch in step for number in batch) == list(range(70))
    assert first != second
    assert numbers_in(packed("number", lengths()).steps(1)) == second
    assert numbers_in(rows.steps(1, first_step=2)) == second[2:]
    assert numbers_in(packed("number", lengths(), seed=4).steps(1)) != second
    assert len(first) == rows.num_steps(0)
    evaluated = packed("number", lengths(), is_training=False)
    assert numbers_in(evaluated.steps(0)) == numbers_in(evaluated.steps(5))


def test_each_micro_batch_of_each_epoch_has_dropout_of_its_own():
    rows = packed("number", lengths())
    seeds = [int(batch.sequence.seed) for epoch in range(3) for step in rows.steps(epoch) for batch in step]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("data_size", [2, 4])
def test_ranks_share_out_the_global_batches_of_one(data_size):
    alone = packed("residues", lengths())
    shared = [packed("residues", lengths(), data_size=data_size, data_rank=rank) for rank in range(data_size)]
    for step, *parts in zip(alone.steps(1), *(rows.steps(1) for rows in shared), strict=True):
        together = [batch for micro in zip(*parts, strict=True) for batch in micro]
        for ours, theirs in zip(step, together, strict=True):
            assert ours.num_targets == theirs.num_targets
            for one, other in zip(ours.sequence.tensors(), theirs.sequence.tensors(), strict=True):
                assert torch.equal(one, other)
            assert torch.equal(ours.targets.residues.ids_m, theirs.targets.residues.ids_m)


def test_a_batch_counts_the_pairs_of_contacts_and_one_label_a_protein_otherwise():
    for step in packed("contacts", [*lengths(), 3, 6, 7, 50]).steps(0):
        for labelled in step:
            num_pairs, ends = 0, labelled.sequence.cu_seqlens
            for start, stop in zip(ends[:-1], ends[1:], strict=True):
                is_resolved = labelled.targets.labels[start:stop, 0] > 0
                num_pairs += sum(bool(is_resolved[i] and is_resolved[j]) for i in range(len(is_resolved))
                                 for j in range(i + 6, len(is_resolved)))
            assert labelled.num_targets == num_pairs
    for labelled in next(packed("numbers", lengths()).steps(0)):
        assert labelled.num_targets == int((~labelled.targets.labels.isnan()).sum()) > 0
    for labelled in next(packed("classes", lengths()).steps(0)):
        assert labelled.num_targets == int((labelled.targets.examples_g != NO_EXAMPLE).sum())


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_proteins_without_labels_have_the_same_rows(kind):
    sizes = lengths()
    labelled = packed(kind, sizes, is_training=False)
    examples = [replace(example, label=None) for example in examples_of(kind, sizes)]
    bare = PackedExamples(examples, SPACES[kind], VOCAB, BatchSettings(SEQ_LENGTH, 2, 2, 8, seed=3), is_training=False)
    for with_labels, without in zip(labelled.steps(0), bare.steps(0), strict=True):
        for ours, theirs in zip(with_labels, without, strict=True):
            assert torch.equal(ours.sequence.tokens_t, theirs.sequence.tokens_t)
            assert torch.equal(ours.targets.examples_g, theirs.targets.examples_g)
            assert theirs.num_targets == 0


def test_the_last_step_of_an_epoch_has_as_many_batches_some_of_them_empty():
    steps = list(packed("number", [SEQ_LENGTH - 2] * 9).steps(0))
    assert [len(step) for step in steps] == [4, 4]
    assert [[len(batch) for batch in step] for step in numbers_in(steps)] == [[2, 2, 2, 2], [1, 0, 0, 0]]
    assert [sum(batch.num_targets for batch in step) for step in steps] == [8, 1]


def test_a_long_protein_is_cropped_with_its_labels():
    size = SEQ_LENGTH - 2
    windows = set()
    for is_training in (True, False):
        rows = packed("contacts", [100, 5], is_training)
        whole = rows.examples[0].ids
        for epoch in range(6):
            (step,) = rows.steps(epoch)
            (ids,) = [ids for batch in step for number, ids in proteins_in(batch) if number == 0]
            offset = whole.tobytes().find(ids.astype(whole.dtype).tobytes())
            assert len(ids) == size and offset >= 0
            tables = torch.cat([batch.targets.labels for batch in step])
            place = int(torch.cat([batch.sequence.tokens_t for batch in step]).eq(VOCAB.cls_id).nonzero()[
                [number for batch in step for number, _ in proteins_in(batch)].index(0)]) + 1
            np.testing.assert_array_equal(tables[place:place + size], rows.examples[0].label[offset:offset + size])
            windows.add((is_training, offset))
    assert {offset for is_training, offset in windows if not is_training} == {0}
    assert len({offset for is_training, offset in windows if is_training}) > 3
    said = packed("number", [100, 5]).describe("train")
    assert said.startswith("train: 2 proteins (1 longer than a row of 32, of which a random window is taken with its "
                           "labels), 2 rows an epoch, ")
    assert "longer" not in packed("number", [5, 6]).describe("train")


@pytest.mark.parametrize("kind", ["residues", "numbers", "contacts"])
def test_context_ranks_have_the_labels_of_their_tokens(kind):
    whole = packed(kind, lengths(), token_multiple=4)
    shares = [packed(kind, lengths(), token_multiple=4, share=share, num_shares=4) for share in range(4)]
    for step, *parts in zip(whole.steps(0), *(rows.steps(0) for rows in shares), strict=True):
        for ours, *theirs in zip(step, *parts, strict=True):
            joined = torch.cat([batch.sequence.tokens_t for batch in theirs])
            assert torch.equal(joined, ours.sequence.tokens_t)
            if kind != "residues":
                places = torch.cat([batch.targets.labels for batch in theirs])
                assert torch.equal(places.nan_to_num(-1), ours.targets.labels.nan_to_num(-1))
                continue
            ids = torch.cat([batch.targets.residues.ids_m for batch in theirs])
            assert ids[ids != NO_TARGET].tolist() == [
                label for label in ours.targets.residues.ids_m.tolist() if label != NO_TARGET]


def test_a_batch_goes_to_a_device_whole():
    (step, *_) = packed("class", lengths()).steps(0)
    moved = step[0].to("meta")
    assert {tensor.device.type for tensor in (*moved.sequence.tensors(), *tensors_in(moved.targets))} == {"meta"}
