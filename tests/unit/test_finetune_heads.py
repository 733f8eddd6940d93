"""Heads of tasks agree with their definitions, written out protein by protein."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron.finetune.data.batches import NO_EXAMPLE, BatchSettings, PackedExamples
from megatron.finetune.data.tasks import LABEL_KINDS
from megatron.finetune.heads import TaskHead
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.model.initialisation import initialise
from megatron.parallel.tensor.stream import ONE_RANK_STREAM
from tests.families import PROTEINLM
from tests.tasks import SEQ_LENGTH, SPACES, VOCAB, described, examples_of

WEIGHTS = (0.5, 1.0, 3.0)
HEADS = {"number": {"mean": 3.2, "deviation": 0.5}, "class": {"class_weights": WEIGHTS, "pooling": "cls"},
         "classes": {"class_weights": WEIGHTS}, "residues": {"class_weights": WEIGHTS}, "contacts": {},
         "numbers": {"mean": 5.5, "deviation": 2.0}}


def made(kind, **head):
    """A head with weights, a batch, and random hidden states of its tokens."""
    spec = described(kind, **{**HEADS[kind], **head}).head
    module = TaskHead(PROTEINLM, spec, ONE_RANK_STREAM)
    initialise(dict(module.named_parameters()), 3)
    settings = BatchSettings(SEQ_LENGTH, 1, 2, 2)
    packed = PackedExamples(examples_of(kind, 6, seed=4), SPACES[kind], VOCAB, settings, is_training=False)
    (batch, *_) = next(packed.steps(0))
    torch.manual_seed(0)
    hidden = torch.randn(len(batch.sequence.tokens_t), PROTEINLM.hidden_size, requires_grad=True)
    return module, packed.examples, batch, hidden


def proteins_of(batch, examples, hidden):
    """Of each protein its label and the states of [CLS] and of its residues."""
    ends = batch.sequence.cu_seqlens.tolist()
    for place, number in enumerate(batch.targets.examples_g.tolist()):
        if number != NO_EXAMPLE:
            states = hidden[ends[place]:ends[place + 1]]
            yield examples[number].label, states[0], states[1:]


def expected_loss(kind, head, label, first, states):
    """The loss of one protein, by PyTorch's own."""
    def outputs(of):
        return head.output(F.gelu(head.dense(of)))

    weights = torch.tensor(WEIGHTS)
    if kind == "number":
        return (outputs(states.mean(0))[0] - (label - 3.2) / 0.5) ** 2
    if kind == "class":
        return weights[label] * F.cross_entropy(outputs(first)[None], torch.tensor([label]))
    if kind == "classes":
        return F.binary_cross_entropy_with_logits(outputs(states.mean(0)), torch.tensor(label, dtype=torch.float32),
                                                  pos_weight=weights)
    if kind == "residues":
        targets = torch.from_numpy(label.astype(np.int64))
        return F.cross_entropy(outputs(states), targets, weights, ignore_index=NO_TARGET, reduction="sum")
    if kind == "numbers":
        is_known = ~torch.from_numpy(label).isnan()
        return F.mse_loss(outputs(states)[is_known, 0], (torch.from_numpy(label)[is_known] - 5.5) / 2, reduction="sum")
    features, loss = F.gelu(head.dense(states)), torch.zeros(())
    for i in range(len(label)):
        for j in range(i + 6, len(label)):
            if label[i, 0] and label[j, 0]:
                logit = head.output(features[i] * features[j])[0]
                touches = float(j - i in label[i, 1:])
                loss = loss + F.binary_cross_entropy_with_logits(logit, torch.tensor(touches))
    return loss


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_a_loss_is_the_sum_of_its_definition_over_proteins_with_its_gradient(kind):
    head, examples, batch, hidden = made(kind)
    loss, _ = head(hidden, batch.sequence, batch.targets)
    expected = sum(expected_loss(kind, head, *protein) for protein in proteins_of(batch, examples, hidden))
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(one, [hidden, *head.parameters()]) for one in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_what_comes_without_a_batch_is_the_prediction_of_each_protein(kind):
    head, examples, batch, hidden = made(kind)
    found, ends = head(hidden, batch.sequence, None), batch.sequence.cu_seqlens.tolist()
    for place, (_, first, states) in enumerate(proteins_of(batch, examples, hidden)):
        if kind == "contacts":
            left, right = found[ends[place] + 1:ends[place + 1]].unbind(1)
            features = F.gelu(head.dense(states))
            expected = torch.stack([head.output(one * features)[:, 0] for one in features])
            torch.testing.assert_close(left @ right.T, expected)
            continue
        pooled = {"class": first, "residues": states, "numbers": states}.get(kind, states.mean(0))
        outputs = head.output(F.gelu(head.dense(pooled)))
        expected = {"number": lambda o: 3.2 + 0.5 * o[0], "numbers": lambda o: 5.5 + 2 * o[:, 0],
                    "classes": torch.sigmoid}.get(kind, lambda o: o.softmax(-1))(outputs)
        ours = found[ends[place] + 1:ends[place + 1]] if kind in ("residues", "numbers") else found[place]
        torch.testing.assert_close(ours, expected)


def test_dropout_is_of_training_alone():
    head, _, batch, hidden = made("class", dropout=0.5)
    trained = head(hidden, batch.sequence, batch.targets)[0]
    evaluated = [head.eval()(hidden, batch.sequence, batch.targets)[0] for _ in range(2)]
    assert torch.equal(*evaluated) and not torch.equal(trained, evaluated[0])


@pytest.mark.parametrize("num_ends", [1, 2])
def test_the_tokens_around_a_protein_are_not_in_its_mean(num_ends):
    spec = described("number").head
    head = TaskHead(PROTEINLM, type(spec)(**vars(spec) | {"num_ends": num_ends}), ONE_RANK_STREAM)
    packed = PackedExamples(examples_of("number", 6), SPACES["number"], VOCAB, BatchSettings(50, num_ends, 2, 2), False)
    (batch, *_) = next(packed.steps(0))
    is_end_t = torch.isin(batch.sequence.tokens_t, torch.tensor([VOCAB.cls_id, VOCAB.sep_id]))
    pooled = head._pooled(torch.where(is_end_t, 100.0, 1.0)[:, None].expand(-1, 3), batch.sequence)
    is_protein_g = batch.targets.examples_g != NO_EXAMPLE
    assert (pooled[is_protein_g] == 1).all() and (pooled[~is_protein_g] == 0).all()
