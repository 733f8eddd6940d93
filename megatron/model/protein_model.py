"""The masked language model: embedding, transformer, head, and its loss; whole, or one pipeline stage of it.

Shapes: t flat tokens of the packed proteins on this context rank, u of them in the residual stream of this rank (all,
but for sequence parallelism), m targets among them, h hidden, v vocabulary (padded) on this rank.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig, PrecisionConfig
from megatron.kernels.fp8 import recipe_of
from megatron.kernels.packed_sequence import PackedSequence, Targets
from megatron.model.embedding import Embedding, TiedEmbedding
from megatron.model.head import ContactHead, MaskedLMHead, has_decoder
from megatron.model.transformer import Transformer, message_shape
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.parameters import inherit
from megatron.parallel.pipeline.partition import Stage, whole_model
from megatron.parallel.tensor.layers import Matrix
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream

TASK_HEAD = "task_head."  # begins the names of what stands in the masked-LM head's place where there is a task


class ProteinModel(nn.Module):
    """A BERT-like model that reads many proteins in one line of tokens.

    Parameters are fp32 and named as in Megatron-LM's checkpoints; activations are in the dtype of `precision`.
    `padded_vocab_size` is that of one rank; `stream` says how layers and tokens are split over the context and tensor
    axes. A `stage` that is not the whole model has those parameters alone that it needs, under the same names; the word
    embedding, tied to the head, stands on the first and on the last, which are the two pipeline `ends`. `mask_id`: of
    [MASK], which `--token-dropout` knows. `task_head` makes what stands in the head's place where there is a task: a
    module that takes the hidden states [u, h] after the last norm, the sequence, and what `forward` has as targets.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, padded_vocab_size: int,
                 stream: Stream = ONE_RANK_STREAM, stage: Stage | None = None, ends: Axis = ONE_RANK_AXIS,
                 mask_id: int | None = None, task_head: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.stream, self.stage = stream, stage or whole_model(config.num_layers)
        dtype = compute_dtype(precision)
        self.config, self.is_tied = config, task_head is None and not has_decoder(config)
        self.stream_dtype = torch.float32 if config.fp32_residual_connection else dtype
        ends = ends if self.is_tied else ONE_RANK_AXIS
        if self.stage.is_first:
            self.embedding: Embedding | TiedEmbedding = Embedding(config, padded_vocab_size, self.stream_dtype, stream,
                                                                  ends, mask_id)
        elif self.stage.is_last and self.is_tied:
            self.embedding = TiedEmbedding(config, padded_vocab_size, stream, ends)
        self.transformer = Transformer(config, padded_vocab_size, dtype, stream, self.stage)
        for layer in self.transformer.modules():
            if isinstance(layer, Matrix):
                layer.recipe = recipe_of(precision)
        self.task_head = task_head() if task_head is not None and self.stage.is_last else None
        if self.stage.is_last and task_head is None:
            self.lm_head = MaskedLMHead(config, padded_vocab_size, stream, not precision.fp16_lm_cross_entropy)
            if config.contact_head:
                self.contact_head = ContactHead(config)

    def forward(self, sequence: PackedSequence, targets: Any,
                message: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """What the next stage takes as `message`, of the shape that `message_shape` tells; of the last stage the loss.

        That is the summed cross entropy of the targets (nats, fp32) and how many of them are the most likely token; of
        a model with a task whatever its head gives.
        """
        if self.stage.is_first:
            message = self.embedding(sequence)
        assert message is not None, "a later stage takes hidden states"
        hidden_uh = self.transformer(message, sequence)
        if self.task_head is not None:
            return self.task_head(hidden_uh, sequence, targets)
        return self.loss(hidden_uh, targets) if self.stage.is_last else hidden_uh

    def loss(self, hidden_uh: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """What the last stage gives for its hidden states after the last norm."""
        return self.lm_head.loss(self.stream.pick(hidden_uh, targets.positions_m), self._tied(), targets.ids_m)

    def hidden(self, sequence: PackedSequence) -> Tensor:
        """Hidden states [u, h] after the last norm of a whole model, whose stream takes tokens as they are."""
        return self.transformer(self.embedding(sequence), sequence)

    def logits(self, hidden_mh: Tensor) -> Tensor:
        """Logits [m, v] of hidden states."""
        return self.lm_head(hidden_mh, self._tied())

    def _tied(self) -> Matrix | None:
        """The word embeddings, where the head has no matrix of its own."""
        return self.embedding.word_embeddings if self.is_tied else None

    def message(self, num_tokens: int, device: torch.device | str, is_output: bool) -> Tensor:
        """A tensor, without values, like what comes to this stage, or goes from it, for `num_tokens` of the stream."""
        layers = self.stage.layers
        shape = message_shape(self.config, num_tokens, layers.stop if is_output else layers.start)
        return torch.empty(shape, dtype=self.stream_dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProteinModel":
        """What `to` and `to_empty` go through: a parameter that is replaced there stays what it is."""
        before = dict(self.named_parameters())
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            inherit(parameter, before[name])
        return self

    def matrices(self) -> Iterator[Matrix]:
        """The layers whose weights are multiplied; where no head is tied to it, an embedding's rows are looked up."""
        looked_up = None if self.stage.is_last and self.is_tied else getattr(self, "embedding", None)
        return (layer for child in self.children() if child is not looked_up for layer in child.modules()
                if isinstance(layer, Matrix))

    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's blocks: the units in which parameters are shared out and gathered."""
        return self.transformer.layers.values()


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of activations."""
    if precision.fp16:
        return torch.float16
    return torch.bfloat16 if precision.bf16 else torch.float32
