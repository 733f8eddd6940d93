"""The masked language model: embedding, transformer, head and loss; whole, or one pipeline stage of it.

Shapes: t flat tokens of the packed proteins on this context rank, u tokens of the residual stream on this rank (t, or
fewer with sequence parallelism), m targets, h hidden, v ids of the padded vocabulary on this rank.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig, PrecisionConfig
from megatron.kernels.fp8 import recipe_of
from megatron.kernels.packed_sequence import PackedSequence, Targets
from megatron.model.embedding import Embedding, TiedEmbedding
from megatron.model.head import ContactHead, MaskedLMHead
from megatron.model.transformer import Transformer, message_shape
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.parameters import inherit
from megatron.parallel.pipeline.partition import Stage, whole_model
from megatron.parallel.tensor.layers import Matrix
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream

TASK_HEAD = "task_head."  # prefix of the parameters of a task's head, which replaces the masked-LM head


class ProteinModel(nn.Module):
    """A BERT-like model that reads many proteins in one line of tokens.

    Parameters are fp32 and named as in Megatron-LM's checkpoints; activations have the dtype of `precision`.
    `padded_vocab_size`: as one tensor rank alone would pad it. `stream`: how tokens and layers are split over the
    context and tensor axes. `stage`: one that is not the whole model has only the parameters that it needs, under the
    same names. `ends`: the first and the last pipeline rank, which both hold the word embeddings if the head is tied.
    `mask_id`: the id of [MASK], for `--token-dropout`. `task_head`: builds a module that replaces the head; it takes
    the hidden states [u, h] after the last norm, the sequence, and what `forward` gets as targets.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, padded_vocab_size: int,
                 stream: Stream = ONE_RANK_STREAM, stage: Stage | None = None, ends: Axis = ONE_RANK_AXIS,
                 mask_id: int | None = None, task_head: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.stream, self.stage = stream, stage or whole_model(config.num_layers)
        dtype = compute_dtype(precision)
        self.config = config
        self.is_tied = task_head is None and not config.untie_embeddings_and_output_weights
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
        """The `message` for the next stage, of shape `message_shape`; from the last stage the loss.

        The loss is the summed cross entropy of the targets (nats, fp32) and the number of targets that are the most
        likely token; with a task head, whatever that returns.
        """
        if self.stage.is_first:
            message = self.embedding(sequence)
        assert message is not None, "a later stage gets a message"
        hidden_uh = self.transformer(message, sequence)
        if self.task_head is not None:
            return self.task_head(hidden_uh, sequence, targets)
        return self.loss(hidden_uh, targets) if self.stage.is_last else hidden_uh

    def loss(self, hidden_uh: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The loss, as `forward` returns it, from hidden states [u, h] after the last norm."""
        return self.lm_head.loss(self.stream.pick(hidden_uh, targets.positions_m), self._tied(), targets.ids_m)

    def hidden(self, sequence: PackedSequence) -> Tensor:
        """Hidden states [u, h] after the last norm; for a whole model, not a pipeline stage."""
        return self.transformer(self.embedding(sequence), sequence)

    def logits(self, hidden_mh: Tensor) -> Tensor:
        """Logits [m, v] of hidden states after the last norm."""
        return self.lm_head(hidden_mh, self._tied())

    def _tied(self) -> Matrix | None:
        """The word embeddings, where the head has no matrix of its own."""
        return self.embedding.word_embeddings if self.is_tied else None

    def message(self, num_tokens: int, device: torch.device | str, is_output: bool) -> Tensor:
        """An empty tensor like the message that this stage receives, or sends, for `num_tokens` tokens of the stream.
        """
        layers = self.stage.layers
        shape = message_shape(self.config, num_tokens, layers.stop if is_output else layers.start)
        return torch.empty(shape, dtype=self.stream_dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProteinModel":
        """nn.Module's, which `to` and `to_empty` use; parameters that it replaces keep declaration and placement."""
        before = dict(self.named_parameters())
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            inherit(parameter, before[name])
        return self

    def matrices(self) -> Iterator[Matrix]:
        """The layers whose weights take part in matrix products; word embeddings only if a head is tied to them."""
        looked_up = None if self.stage.is_last and self.is_tied else getattr(self, "embedding", None)
        return (layer for child in self.children() if child is not looked_up for layer in child.modules()
                if isinstance(layer, Matrix))

    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's blocks: the units that are compiled, and in which parameters are sharded and gathered."""
        return self.transformer.layers.values()


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of activations and matrix products: fp16, bf16 or fp32."""
    if precision.fp16:
        return torch.float16
    return torch.bfloat16 if precision.bf16 else torch.float32
