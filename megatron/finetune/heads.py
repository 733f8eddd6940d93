"""The task head, which replaces the masked-LM head in fine-tuning: hidden states to the task's loss or predictions.

It computes in fp32, the same on every tensor rank. Shapes: u tokens of the residual stream on this rank, t tokens of
this context rank, h hidden, w features, g proteins as in `PackedSequence`, c classes; contacts: b blocks of l tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.finetune.data.batches import NO_EXAMPLE, TaskTargets
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS, RESIDUES
from megatron.infer.contacts.chains import LEAST_SEPARATION
from megatron.kernels.dropout import Dropout, Use, dropped
from megatron.kernels.packed_sequence import NO_TARGET, PackedSequence, proteins_of_tokens
from megatron.model.initialisation import normal
from megatron.parallel.collectives import all_gather, gather_slices, sum_gradients, sum_outputs
from megatron.parallel.parameters import Constant, Declaration, Initial, Normal, whole_parameter
from megatron.parallel.tensor.stream import Stream

POOLINGS = ("mean", "cls")
_CONTACT_FEATURES = 128  # per residue, at most
_CONTACT_BIAS = -3.0  # initially some 5 % probability of a contact, about the true rate


@dataclass(frozen=True)
class HeadSpec:
    """What defines a task head, besides the model's shape.

    kind: of labels, one of `finetune.data.tasks`. num_outputs: the number of classes, or 1. num_ends: end tokens of a
    protein. pooling: "mean" or "cls", how residues' hidden states become a protein's. mean, deviation: of the numbers
    to learn; the head's output is in standard deviations from the mean. class_weights: of the classes in the loss (with
    several classes per protein: of the positive ones); (): all 1.
    """

    kind: str
    num_outputs: int
    num_ends: int
    pooling: str = "mean"
    dropout: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    class_weights: tuple[float, ...] = ()


class TaskHead(nn.Module):
    """A dense layer, GeLU, dropout and an output layer, per protein (pooled), per residue, or per pair of residues."""

    def __init__(self, config: ModelConfig, spec: HeadSpec, stream: Stream) -> None:
        super().__init__()
        width = config.hidden_size if spec.kind != CONTACTS else min(config.hidden_size, _CONTACT_FEATURES)
        self.spec, self.stream, self.dropout = spec, stream, spec.dropout
        self.dense = _Dense(config.hidden_size, width, Normal(config.hidden_size**-0.5), Constant(0.0))
        self.output = _Dense(width, spec.num_outputs, normal(config),
                             Constant(_CONTACT_BIAS if spec.kind == CONTACTS else 0.0))

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence,
                targets: TaskTargets | None) -> tuple[Tensor, Tensor] | Tensor:
        """The fp32 loss, summed over what the batch's `num_targets` counts, and a 0; without targets, predictions.

        The loss of the micro-batch is the sum of those of the context ranks. Predictions are the same on all ranks, by
        kind: number [g]; class and classes, probabilities [g, c]; numbers [t] and residues, probabilities [t, c], with
        t over all context ranks; contacts [t, 2, w + 1], where the dot product of one token's first vector and
        another's second is the logit of their contact.
        """
        outputs = self._outputs(hidden_uh, sequence)
        if targets is None:
            return self._predictions(outputs)
        loss = getattr(self, f"_loss_of_{self.spec.kind}")(outputs, sequence, targets)
        if self.spec.kind not in (RESIDUES, NUMBERS) and self.stream.context.rank:
            loss = loss * 0  # all context ranks have the same outputs: only the first's loss counts
        return loss, torch.zeros_like(loss)

    def _pair_factors(self, features_tw: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors per token, [t, w + 1] each: the first of i times the second of j is the logit of contact i, j.

        The logit is a weighted product of the features plus a bias, so it is symmetric. TAPE's head also takes the
        features' differences, which cancel when it makes its logits symmetric.
        """
        bias_t1 = self.output.bias.float().expand(len(features_tw), 1)
        weighted_tw = features_tw * self.output.weight.float()
        return torch.cat([weighted_tw, bias_t1], 1), torch.cat([features_tw, torch.ones_like(bias_t1)], 1)

    def _outputs(self, hidden_uh: Tensor, sequence: PackedSequence) -> Tensor:
        kind, context = self.spec.kind, self.stream.context
        hidden_th = self._all_tokens(hidden_uh).float()
        first_row = context.rank * len(hidden_th)
        if kind in (NUMBER, CLASS, CLASSES):
            hidden_th, first_row = self._pooled(hidden_th, sequence), 0
        features_tw = F.gelu(self.dense(hidden_th))
        if self.training and self.dropout:
            assert sequence.seed is not None, "who trains with dropout gives it a seed"
            features_tw = dropped(features_tw, Dropout(self.dropout, sequence.seed, Use.TASK_HEAD, first_row))
        return gather_slices(features_tw, context) if kind == CONTACTS else self.output(features_tw)

    def _all_tokens(self, hidden_uh: Tensor) -> Tensor:
        """The hidden states [t, h] of all of this context rank's tokens, gathered if tensor ranks split the stream."""
        if not self.stream.is_split:
            return hidden_uh
        places_t = torch.arange(len(hidden_uh) * self.stream.axis.size, device=hidden_uh.device)
        return self.stream.pick(hidden_uh, places_t)

    def _pooled(self, hidden_th: Tensor, sequence: PackedSequence) -> Tensor:
        """The mean over each protein's residues, or its first token, [g, h]; 0 for empty proteins."""
        context, start = self.stream.context, self.stream.context.rank * len(hidden_th)
        if self.spec.pooling == "cls":
            is_taken_t = sequence.positions_t == 0
        else:
            places_t = torch.arange(start, start + len(hidden_th), device=hidden_th.device)
            proteins_t = proteins_of_tokens(sequence.cu_seqlens, start, start + len(hidden_th))
            is_last_t = places_t == sequence.cu_seqlens[1:][proteins_t] - 1
            is_taken_t = (sequence.positions_t > 0) & ~(is_last_t & (self.spec.num_ends == 2))
        values_tx = torch.cat([hidden_th, torch.ones_like(hidden_th[:, :1])], 1) * is_taken_t[:, None]
        ends = (sequence.cu_seqlens.long() - start).clamp(0, len(hidden_th))
        sums_gx = torch.segment_reduce(values_tx, "sum", offsets=ends[:len(ends) - sequence.num_filler], axis=0,
                                       unsafe=True)
        # The sum over ranks is in place, and autograd keeps the result of segment_reduce: hence the clone. The backward
        # pass sums the context ranks' gradients of the sums, of which only the first rank's is not 0.
        sums_gx = sum_gradients(sum_outputs(sums_gx.clone(), context), context)
        return sums_gx[:, :-1] / sums_gx[:, -1:].clamp(min=1)

    def _predictions(self, outputs: Tensor) -> Tensor:
        kind = self.spec.kind
        if kind == NUMBER:
            return self.spec.mean + self.spec.deviation * outputs[:, 0]
        if kind == NUMBERS:
            return self.spec.mean + self.spec.deviation * all_gather(outputs, self.stream.context)[:, 0]
        if kind == RESIDUES:
            return all_gather(outputs.softmax(1), self.stream.context)
        if kind == CONTACTS:
            return torch.stack(self._pair_factors(outputs), 1)
        return outputs.softmax(1) if kind == CLASS else outputs.sigmoid()

    def _loss_of_number(self, outputs_g1: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        errors_g = outputs_g1[:, 0] - (targets.labels - self.spec.mean) / self.spec.deviation
        return (errors_g.square() * (targets.examples_g != NO_EXAMPLE)).sum()

    def _loss_of_class(self, logits_gc: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        return F.cross_entropy(logits_gc, targets.labels, self._weights, ignore_index=NO_TARGET, reduction="sum")

    def _loss_of_classes(self, logits_gc: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        losses_gc = F.binary_cross_entropy_with_logits(logits_gc, targets.labels, pos_weight=self._weights,
                                                       reduction="none")
        return (losses_gc.mean(1) * (targets.examples_g != NO_EXAMPLE)).sum()

    def _loss_of_residues(self, logits_tc: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        residues = targets.residues
        return F.cross_entropy(logits_tc[residues.positions_m], residues.ids_m, self._weights, ignore_index=NO_TARGET,
                               reduction="sum")

    def _loss_of_numbers(self, outputs_t1: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        labels_t = targets.labels[:len(outputs_t1)]
        errors_t = outputs_t1[:, 0] - (labels_t.nan_to_num() - self.spec.mean) / self.spec.deviation
        return (errors_t.square() * ~labels_t.isnan()).sum()

    def _loss_of_contacts(self, features_tw: Tensor, sequence: PackedSequence, targets: TaskTargets) -> Tensor:
        """The loss, summed over pairs.

        Each token is paired with those of its block and the next, which hold all later tokens of its protein.
        """
        table_tx = all_gather(targets.labels[:len(sequence.tokens_t)], self.stream.context)
        proteins_t = proteins_of_tokens(sequence.cu_seqlens, 0, len(features_tw))
        proteins_t = proteins_t.masked_fill(table_tx[:, 0] == 0, -1)  # unresolved residues belong to none
        size = min(sequence.max_length, len(features_tw))
        first_tw, second_tw = self._pair_factors(features_tw)
        logits_bll = _blocks(first_tw, size, 0.0)[0] @ _blocks(second_tw, size, 0.0)[1].mT
        first_b1l, second_b1l = (numbers.mT for numbers in _blocks(proteins_t[:, None], size, -2))
        order = torch.arange(2 * size, device=features_tw.device)
        is_pair_bll = (first_b1l.mT == second_b1l) & (first_b1l.mT >= 0)
        is_pair_bll = is_pair_bll & (order - order[:size, None] >= LEAST_SEPARATION)
        offsets_blk = _blocks(table_tx[:, 1:], size, 0)[0]
        # Unused entries, and contacts with residues cropped away, go into an extra last column, which is then removed.
        places_blk = (order[:size, None] + offsets_blk).masked_fill(offsets_blk == 0, 2 * size).clamp(max=2 * size)
        touches_bll = logits_bll.new_zeros(*logits_bll.shape[:2], 2 * size + 1).scatter_(2, places_blk, 1.0)[:, :, :-1]
        losses_bll = F.binary_cross_entropy_with_logits(logits_bll, touches_bll, reduction="none")
        return (losses_bll * is_pair_bll).sum()

    @cached_property
    def _weights(self) -> Tensor | None:
        """The class weights on the device; made at first use, because the head is built without values."""
        weights = self.spec.class_weights
        return torch.tensor(weights, device=self.dense.weight.device) if weights else None


class _Dense(nn.Module):
    """A linear layer x Wᵀ + b in fp32, unsharded on every rank; its parameters are in the group "head"."""

    def __init__(self, in_features: int, out_features: int, initial: Initial, initial_bias: Initial) -> None:
        super().__init__()
        self.weight = whole_parameter((out_features, in_features), Declaration(initial, "head", decays=True))
        self.bias = whole_parameter((out_features,), Declaration(initial_bias, "head", decays=False))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [..., out_features] in fp32."""
        return F.linear(x, self.weight.float(), self.bias.float())


def _blocks(values_tx: Tensor, size: int, filler: float) -> tuple[Tensor, Tensor]:
    """The tokens in blocks of `size` [b, l, x], and each block joined to the next [b, 2 l, x]; the end is padded.

    `filler`: the value of the padding behind the last token.
    """
    num_blocks = -(-len(values_tx) // size)
    padded = F.pad(values_tx, (0, 0, 0, (num_blocks + 1) * size - len(values_tx)), value=filler)
    blocks = padded.view(num_blocks + 1, size, -1)
    return blocks[:-1], torch.cat([blocks[:-1], blocks[1:]], 1)
