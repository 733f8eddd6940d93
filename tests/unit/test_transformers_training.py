"""A training step on packed proteins agrees with transformers' on the same proteins, padded."""

import copy
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from megatron.checkpoint.convert.families import hf
from megatron.config import ModelConfig, OptimizerConfig, PrecisionConfig
from megatron.data.corpus.vocab import Vocab
from megatron.kernels.packed_sequence import PackedSequence, Targets
from megatron.model.protein_model import ProteinModel
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from tests.transformers_models import KINDS, PROTEINS, ids_of, made

CPU, RATE = torch.device("cpu"), 1e-3
TYPES = "bert.embeddings.token_type_embeddings.weight"  # of which ours has one, in the positions


def targets_of(row):
    """Every third residue of a protein, and what stands there."""
    places = list(range(1, len(row) - 1, 3))
    return places, [5 + place % 20 for place in places]


def their_step(model, vocab):
    """The mean loss, and the gradients in a model like theirs."""
    rows = [ids_of(protein, vocab) for protein in PROTEINS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [vocab.pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        places, targets = targets_of(row)
        labels[number, places] = torch.tensor(targets)
    loss = F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item()


def our_step(model, vocab):
    """The same on one line of tokens."""
    rows = [ids_of(protein, vocab) for protein in PROTEINS]
    lengths = torch.tensor(list(map(len, rows)))
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    sequence = PackedSequence(torch.tensor(sum(rows, [])), torch.cat([torch.arange(len(row)) for row in rows]), ends,
                              int(lengths.max()), num_filler=0)
    chosen = [targets_of(row) for row in rows]
    places = torch.cat([start + torch.tensor(places) for start, (places, _) in zip(ends, chosen, strict=False)])
    ids = torch.tensor([target for _, targets in chosen for target in targets])
    loss = model(sequence, Targets(places.long(), ids))[0] / len(ids)
    loss.backward()
    return loss.item()


def as_ours(model, folder, vocab):
    """The parameters of a model of theirs by our names, with as many tokens as there are."""
    model.save_pretrained(folder)
    checkpoint = hf.read(folder)
    return checkpoint, {name: tensor.read() for name, tensor in checkpoint.model.items()}


def without_key_biases(tensors, heads):
    """Keys' biases add the same to all scores of a query: their gradient is 0 but for rounding, which Adam blows up."""
    for name, tensor in tensors.items():
        if name.endswith("query_key_value.bias"):
            tensor.view(heads, 3, -1)[:, 1] = 0
    return tensors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_a_step_of_adamw_are_those_of_transformers(kind, attention, tmp_path):
    vocab = Vocab.from_file("protbert" if "bert" in kind else "esm")
    theirs = made(kind)
    theirs.set_attn_implementation(attention)
    frozen = [parameter for name, parameter in theirs.named_parameters() if "contact_head" in name or name == TYPES]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.3)
    for parameter in frozen:
        parameter.requires_grad_(False).zero_()
    checkpoint, weights = as_ours(theirs, tmp_path / "before", vocab)
    config = ModelConfig(**{item.name: value for item in fields(ModelConfig)
                            if (value := checkpoint.state["config"].get(item.name)) is not None})
    ours = ProteinModel(config, PrecisionConfig(), 128, mask_id=vocab.mask_id).eval()  # without dropout, as theirs
    ours.load_state_dict(weights)
    assert our_step(ours, vocab) == pytest.approx(their_step(theirs, vocab), rel=1e-5)

    of_theirs = copy.deepcopy(theirs)
    with torch.no_grad():
        for copied, parameter in zip(of_theirs.parameters(), theirs.parameters(), strict=True):
            copied.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients = without_key_biases(as_ours(of_theirs, tmp_path / "gradients", vocab)[1], config.num_attention_heads)
    named = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    found = without_key_biases({name: parameter.grad.clone() for name, parameter in named.items()},
                               config.num_attention_heads)
    gradients["lm_head.bias"][vocab.size:] = 0  # where a checkpoint says that a token never is
    for name, gradient in found.items():
        assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-8, name

    Optimizer(named, OptimizerConfig(weight_decay=0.1, clip_grad=0.0)).step(RATE, LossScale(PrecisionConfig(), CPU))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    groups = [{"params": [each for each in trained if (each.ndim > 1) == decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]
    torch.optim.AdamW(groups, lr=RATE).step()
    stepped = without_key_biases(as_ours(theirs, tmp_path / "after", vocab)[1], config.num_attention_heads)
    moved = without_key_biases({name: parameter.detach() for name, parameter in named.items()},
                               config.num_attention_heads)
    for name, parameter in moved.items():
        is_moved = found[name].abs() > 1e-7  # of smaller gradients Adam's first step follows the sign of rounding
        is_moved |= found[name] == 0
        assert (parameter - stepped[name]).abs()[is_moved].max() <= 1e-5, name
