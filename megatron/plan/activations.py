"""What a rank keeps of a forward pass until its backward pass, and what a backward pass takes on top: bytes.

The letters are those of `megatron.plan.rank`; e bytes an activation, r bytes an element of the residual stream. Counted
is what autograd and the layers' own functions save, tensor by tensor.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron.kernels.attention import share_of
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline.partition import Stage
from megatron.plan.rank import Rank

_STATISTICS = 8  # bytes a token: mean and inverse deviation of a LayerNorm


@dataclass(frozen=True)
class Activations:
    """Bytes that the passes of one micro-batch through the stages of `rank` keep and take."""

    rank: Rank

    @cached_property
    def of_stream(self) -> int:
        """A tensor of the residual stream [u, h]."""
        return self.rank.u * self.rank.h * self.rank.r

    @cached_property
    def mask(self) -> int:
        """A dropout mask [u, h], a byte an element."""
        return self.rank.u * self.rank.h if self.rank.config.model.hidden_dropout else 0

    @cached_property
    def attention_core(self) -> int:
        """What attention's core keeps besides the queries, keys and values of this rank's tokens, and its result.

        The fused operator: the logarithm of each softmax' denominator (fp32), and keys and values of all tokens where
        context ranks share them out. Protein by protein: all probabilities, and dropout's factors.
        """
        rank, size = self.rank, self.rank.sizes["context"]
        if rank.takes_flash:
            gathered = size * rank.t * 2 * rank.nd * rank.e if size > 1 else 0
            return 4 * rank.n * rank.t + gathered
        share = share_of(rank.lengths, Axis(rank.place["context"], size))
        scores = sum(q * k for q, k in zip(share.query_lengths, share.key_lengths, strict=True))
        return rank.n * scores * rank.e * (2 if rank.config.model.attention_dropout else 1)

    @cached_property
    def attention(self) -> int:
        """Attention's half of a block: LayerNorm's input, its output, queries to values, the context, the mask."""
        rank = self.rank
        kept = self.of_stream + _STATISTICS * rank.u + rank.u * rank.h * rank.e + 4 * rank.t * rank.nd * rank.e
        is_selective = rank.config.model.recompute_granularity == "selective"
        return kept + self.mask + (0 if is_selective else self.attention_core)

    @cached_property
    def feed_forward(self) -> int:
        """The other half: LayerNorm's input, its output, what goes into the GeLU and comes out of it, the mask."""
        rank = self.rank
        return (self.of_stream + _STATISTICS * rank.u + rank.u * rank.h * rank.e + 2 * rank.t * rank.f * rank.e
                + self.mask)

    @property
    def block(self) -> int:
        """A whole block."""
        return self.attention + self.feed_forward

    def kept(self, stage: Stage) -> int:
        """What a forward pass of `stage` keeps."""
        return sum(self.groups(stage)) + self.around(stage)

    def groups(self, stage: Stage) -> list[int]:
        """What is kept of each block; where blocks are recomputed, of each group of them that is, its input."""
        model, rank = self.rank.config.model, self.rank
        num_blocks = len(stage.layers)
        if not model.checkpoint_activations:
            return [self.block] * num_blocks
        kept = self.of_stream
        if model.distribute_checkpointed_activations:
            kept = -(-rank.t * rank.h // rank.sizes["tensor"]) * rank.r
        return [kept] * -(-num_blocks // model.checkpoint_num_layers)

    def around(self, stage: Stage) -> int:
        """What is kept before and behind the blocks: the embedding's mask, the head, or the output that was sent."""
        kept = self.mask if stage.is_first else 0
        return kept + (self.head if stage.is_last else self.of_stream)

    @cached_property
    def head(self) -> int:
        """The last LayerNorm's input; and of the targets what the head's layers take, with weights that they cast."""
        rank = self.rank
        cast = (rank.h * rank.h + rank.v * rank.h) * rank.e if rank.is_half else 0
        is_fp32 = not rank.config.precision.fp16_lm_cross_entropy or not rank.is_half
        # Into the dense layer, the GeLU, the LayerNorm and the logits.
        targets = 4 * rank.m * rank.h * rank.e + rank.m * rank.v * (4 if is_fp32 else rank.e)
        return self.of_stream + _STATISTICS * rank.u + cast + targets

    @cached_property
    def of_head_backward(self) -> int:
        """What going back through the head takes besides what it kept: gradients of logits and of the dense layer."""
        rank = self.rank
        return rank.m * (rank.v * (4 + rank.e) + 2 * rank.h * rank.e) + rank.h * rank.h * (4 + rank.e)

    @cached_property
    def of_backward(self) -> int:
        """What going back through a block takes besides what it kept, where that is most: at its last layer.

        There all that the block kept is still held but for the last mask. Held are the gradients of the block's output,
        of the layer's output and of its input; not counted here is that of the weight.
        """
        rank = self.rank
        is_same = not self.mask and not rank.is_sequence_parallel and rank.r == rank.e
        before_dropout = 0 if is_same else rank.t * rank.h * rank.e
        return self.of_stream + before_dropout + rank.t * rank.f * rank.e - self.mask

    @cached_property
    def of_block_end(self) -> int:
        """What is held when a block is nearly done: at its first layer, the gradients of its input and of its output.

        And LayerNorm's input, and the gradient of the residual stream that passes by.
        """
        rank = self.rank
        return 2 * self.of_stream + rank.t * (rank.h + 3 * rank.nd) * rank.e

    @cached_property
    def weight_gradient(self) -> int:
        """The largest weight's gradient, in the dtype of activations and in fp32."""
        rank = self.rank
        return rank.h * rank.f * (rank.e + 4 if rank.is_half else 4)

    @cached_property
    def put_off(self) -> int:
        """What the put-off weight gradients of a block wait with: inputs and outputs' gradients of its four layers."""
        rank = self.rank
        return rank.t * rank.e * (4 * rank.h + 4 * rank.nd + 2 * rank.f)
