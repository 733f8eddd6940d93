"""One transformer block on flat packed tokens, and the stack of them.

Shapes: u tokens of the residual stream on this rank, h hidden, k tensors [u, h] that are passed between stages: the
hidden states, with `--x0-skips` the embeddings, with `--unet-skips` the outputs of blocks that later blocks add.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.kernels.attention.flex import with_masks
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence
from megatron.kernels.pointwise.product import Product, whole
from megatron.kernels.pointwise.residual_norm import normalised
from megatron.kernels.rotary import Rotation, rotation_of
from megatron.model.attention import Attention
from megatron.model.feed_forward import feed_forward
from megatron.model.normalisation import Norm, scaling_of
from megatron.parallel.mesh import ONE_RANK_AXIS
from megatron.parallel.parameters import BIAS, SCALE
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.randomness import dropout_of
from megatron.parallel.recomputation import recomputed
from megatron.parallel.tensor.stream import Stream


class Block(nn.Module):
    """Attention and feed-forward, two branches f whose normalised outputs are added to the residual stream x.

    `--norm-placement` pre: x + f(norm(x)), as in Megatron-LM; post: norm(x + f(x)), as in BERT (arXiv 1810.04805);
    both: x + norm(f(norm(x))) (Ding et al., 2021, arXiv 2105.13290). Before the branches, `--x0-skips` replaces x by
    a·x + b·e with the embeddings e and learned a and b, initially 1 and 0; `--unet-skips` replaces it by x + c·y with
    an earlier block's output y and learned c, initially 1 (both as in modded-nanogpt, the speed runs of GPT-2, 2024).
    The residual stream keeps the dtype of its input; the branches compute in `dtype`.
    """

    def __init__(self, config: ModelConfig, number: int, num_ids: int, dtype: torch.dtype, stream: Stream) -> None:
        super().__init__()
        self.placement = config.norm_placement
        before = partial(Norm, config, stream) if self.placement != "post" else lambda: None
        after = partial(Norm, config, stream) if self.placement != "pre" else lambda: None
        self.input_layernorm, self.attention_output_layernorm = before(), after()
        self.attention = Attention(config, number, num_ids, stream)
        self.post_attention_layernorm, self.mlp_output_layernorm = before(), after()
        self.mlp = feed_forward(config, stream)
        self.stream, self.dropout, self.dtype = stream, config.hidden_dropout, dtype
        self.residual_after_layernorm = config.apply_residual_connection_post_layernorm
        self.gives_skip, self.takes_skip = skips_of(config, number)
        if config.x0_skips:
            self.hidden_scale = stream.parameter((1,), SCALE)
            self.x0_scale = stream.parameter((1,), BIAS)
        if self.takes_skip:
            self.skip_scale = stream.parameter((1,), SCALE)

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence, rotation: Rotation | None = None,
                x0_uh: Tensor | None = None, skip_uh: Tensor | None = None) -> Tensor:
        """The residual stream [u, h] after the block.

        `x0_uh`: the embeddings, with `--x0-skips`. `skip_uh`: an earlier block's output, if this block adds one.
        """
        dtype = hidden_uh.dtype
        if x0_uh is not None:
            hidden_uh = self.hidden_scale.to(dtype) * hidden_uh + self.x0_scale.to(dtype) * x0_uh
        if skip_uh is not None:
            hidden_uh = hidden_uh + self.skip_scale.to(dtype) * skip_uh
        hidden_uh, normed_uh = normalised(hidden_uh, scaling_of(self.input_layernorm), self._normed_dtype(dtype))
        branch = self.attention(normed_uh.to(self.dtype), sequence, rotation)
        hidden_uh, normed_uh = self._add_branch(hidden_uh, normed_uh, branch, self.attention_output_layernorm,
                                                self.post_attention_layernorm,
                                                dropout_of(self, sequence, Use.ATTENTION_OUTPUT))
        branch = self.mlp(normed_uh.to(self.dtype))
        dropout = dropout_of(self, sequence, Use.FEED_FORWARD_OUTPUT)
        return self._add_branch(hidden_uh, normed_uh, branch, self.mlp_output_layernorm, None, dropout)[0]

    def _add_branch(self, hidden_uh: Tensor, normed_uh: Tensor, branch: Product, output_norm: Norm | None,
                    next_norm: Norm | None, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
        """The residual stream with a branch added, and the normalised input of the next branch."""
        residual_uh = normed_uh if self.residual_after_layernorm else hidden_uh
        if self.placement == "both" and output_norm is not None:
            branch = output_norm(whole(branch)), None
        normalises = output_norm if self.placement == "post" else next_norm
        sum_uh, normed_uh = self.stream.add_branch(residual_uh, branch, dropout, scaling_of(normalises),
                                                   self._normed_dtype(residual_uh.dtype))
        return (normed_uh if self.placement == "post" else sum_uh), normed_uh

    def _normed_dtype(self, stream_dtype: torch.dtype) -> torch.dtype:
        """The dtype of normalised values: the stream's if they become the stream, else that of the branches."""
        goes_on = self.placement == "post" or self.residual_after_layernorm
        return stream_dtype if goes_on else self.dtype


class Transformer(nn.Module):
    """The blocks of one pipeline stage, named by their numbers in the whole model; on the last stage, the final norm.

    With `--norm-placement post` there is no final norm. The last stage's output is in `dtype`.
    """

    def __init__(self, config: ModelConfig, num_ids: int, dtype: torch.dtype, stream: Stream, stage: Stage) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block(config, number, num_ids, dtype, stream)
                                     for number in stage.layers})
        self.stage, self.dtype, self.has_x0 = stage, dtype, config.x0_skips
        if stage.is_last and config.norm_placement != "post":
            self.final_layernorm: nn.Module = Norm(config, stream)
        elif stage.is_last:
            self.final_layernorm = nn.Identity()
        is_rotary = config.position_embedding_type == "rope"
        self.rotary_width = int(config.kv_channels * config.rotary_percent) // 2 * 2 if is_rotary else 0
        self.rotary_base, self.rotary_precision = config.rotary_base, config.rotary_frequency_precision
        self.layers_a_checkpoint = config.checkpoint_num_layers if config.checkpoint_activations else None
        self.kept_over = stream.axis if config.distribute_checkpointed_activations else ONE_RANK_AXIS
        windows = (config.window(number) for number in stage.layers)
        self.mask_windows = dict.fromkeys(windows) if config.attention_backend == "flex" else None

    def forward(self, message: Tensor, sequence: PackedSequence) -> Tensor:
        """The message for the next stage: hidden states [u, h], or with skips [k, u, h]; from the last stage [u, h].

        `message`: the previous stage's, or on the first stage the embeddings [u, h].
        """
        if self.mask_windows:
            sequence = with_masks(sequence, self.mask_windows)
        hidden_uh, *others = message.unbind() if message.ndim == 3 else [message]
        x0_uh = None
        if self.has_x0:
            x0_uh = hidden_uh if self.stage.is_first else others.pop(0)
        hidden_uh, *skips = self.through_blocks(hidden_uh, sequence, self.rotation(sequence), x0_uh, others)
        if self.stage.is_last:
            return self.normed(hidden_uh)
        passed = [hidden_uh, *([] if x0_uh is None else [x0_uh]), *skips]
        return torch.stack(passed) if len(passed) > 1 else hidden_uh

    def rotation(self, sequence: PackedSequence) -> Rotation | None:
        """The rotary rotation of queries and keys, the same for all blocks; None without rotary positions."""
        if not self.rotary_width:
            return None
        return rotation_of(sequence.positions_t, self.rotary_width, self.rotary_base, self.rotary_precision)

    def normed(self, hidden_uh: Tensor) -> Tensor:
        """The output of the last stage, from the hidden states after its blocks: the final norm's, in `dtype`."""
        return self.final_layernorm(hidden_uh).to(self.dtype)

    def through_blocks(self, hidden_uh: Tensor, sequence: PackedSequence, rotation: Rotation | None,
                       x0_uh: Tensor | None, skips: Sequence[Tensor]) -> Sequence[Tensor]:
        """The hidden states after the stage's blocks, and then the open skips: outputs that later blocks will add."""
        step, blocks = self.layers_a_checkpoint, list(zip(self.layers.values(), self._sequences(sequence), strict=True))
        if step is None or not torch.is_grad_enabled():
            return _run(blocks, rotation, x0_uh, skips, hidden_uh)
        for start in range(0, len(blocks), step):
            together = blocks[start:start + step]
            # Only the skips that these blocks take go in: inputs of a recomputed function are kept until its backward.
            first = len(skips) - num_taken((bool(block.gives_skip), bool(block.takes_skip)) for block, _ in together)
            run = partial(_run, together, rotation, x0_uh, skips[first:])
            hidden_uh, *given = recomputed(run, hidden_uh, kept_over=self.kept_over)
            skips = [*skips[:first], *given]
        return hidden_uh, *skips

    def _sequences(self, sequence: PackedSequence) -> Sequence[PackedSequence]:
        """For each block the sequence with a dropout seed of its own."""
        if sequence.seed is None:
            return [sequence] * len(self.layers)
        first = self.stage.layers.start + 1  # the embeddings use the micro-batch's own seed
        seeds = sequence.seed + torch.arange(first, first + len(self.layers), device=sequence.seed.device)
        return [replace(sequence, seed=seed) for seed in seeds.unbind()]


def _run(blocks: Iterable[tuple[nn.Module, PackedSequence]], rotation: Rotation | None, x0_uh: Tensor | None,
         skips: Sequence[Tensor], hidden_uh: Tensor) -> Sequence[Tensor]:
    open_skips = list(skips)
    for block, sequence in blocks:
        skip_uh = open_skips.pop() if block.takes_skip else None
        hidden_uh = block(hidden_uh, sequence, rotation, x0_uh, skip_uh)
        if block.gives_skip:
            open_skips.append(hidden_uh)
    return hidden_uh, *open_skips


def skips_of(config: ModelConfig, number: int) -> tuple[bool, bool]:
    """Whether a later block adds the output of block `number`, and whether this block adds an earlier one's.

    As in a U-Net (Ronneberger et al., 2015, arXiv 1505.04597): the n-th block from the end adds the output of the n-th
    block from the start.
    """
    half = config.num_layers // 2
    return config.unet_skips and number < half, config.unet_skips and number >= config.num_layers - half


def num_taken(blocks: Iterable[tuple[bool, bool]]) -> int:
    """How many of the skips that are open before some consecutive blocks these take; `blocks`: `skips_of` each."""
    more = (gives - takes for gives, takes in blocks)
    return -min(accumulate(more, initial=0))


def message_shape(config: ModelConfig, num_tokens: int, next_block: int) -> tuple[int, ...]:
    """The shape of the message to the stage that begins with block `next_block`, for `num_tokens` of the stream."""
    num_tensors, shape = num_passing(config, next_block), (num_tokens, config.hidden_size)
    return (num_tensors, *shape) if num_tensors > 1 else shape


def num_passing(config: ModelConfig, next_block: int) -> int:
    """The number k of tensors in the message to a stage that begins with block `next_block`."""
    return 1 + config.x0_skips + open_skips(config, next_block)


def open_skips(config: ModelConfig, next_block: int) -> int:
    """How many outputs of blocks before `next_block` are added by that or a later block; the latest is added first."""
    return min(next_block, config.num_layers // 2, config.num_layers - next_block) if config.unet_skips else 0


def kind_of(config: ModelConfig, number: int) -> tuple[object, ...]:
    """Everything in which blocks of one model differ; blocks of equal kinds have the same parameters and operations."""
    return config.window(number), *skips_of(config, number)
