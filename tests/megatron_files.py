"""Writes small checkpoints in the layout of Megatron v2 and ProteinLM, as an oracle for our converters.

The modules are named and nested as in the original and written with plain torch.save; none of our converters is used.
"""

import argparse
import random
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

LAYERS, HIDDEN, HEADS, FEED_FORWARD, POSITIONS, ROWS, WIDTH = 4, 16, 4, 24, 12, 32, 4
STEP, ITERATION, CONSUMED = 5, 7, 56
KINDS = ("exp_avg", "exp_avg_sq")


def wholes(seed=1):
    """Random values of all parameters and their Adam moments, whole, by our names; moments are named KIND/PARAMETER.

    The rows of attention's query_key_value lie in the order [heads, 3, width].
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding.word_embeddings.weight": (ROWS, HIDDEN),
              "embedding.position_embeddings.weight": (POSITIONS, HIDDEN),
              "transformer.final_layernorm.weight": (HIDDEN,), "transformer.final_layernorm.bias": (HIDDEN,),
              "lm_head.bias": (ROWS,), "lm_head.dense.weight": (HIDDEN, HIDDEN), "lm_head.dense.bias": (HIDDEN,),
              "lm_head.layernorm.weight": (HIDDEN,), "lm_head.layernorm.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
                "input_layernorm.weight": (HIDDEN,), "input_layernorm.bias": (HIDDEN,),
                "attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
                "attention.query_key_value.bias": (3 * HIDDEN,), "attention.dense.weight": (HIDDEN, HIDDEN),
                "attention.dense.bias": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
                "post_attention_layernorm.bias": (HIDDEN,), "mlp.dense_h_to_4h.weight": (FEED_FORWARD, HIDDEN),
                "mlp.dense_h_to_4h.bias": (FEED_FORWARD,), "mlp.dense_4h_to_h.weight": (HIDDEN, FEED_FORWARD),
                "mlp.dense_4h_to_h.bias": (HIDDEN,)}.items():
            shapes[f"transformer.layers.{layer}.{name}"] = shape
    names = [*shapes, *(f"{kind}/{name}" for kind in KINDS for name in shapes)]
    return {name: torch.randn(shapes[name.split("/")[-1]], generator=generator) for name in names}


class Layer(nn.Module):
    """One transformer layer of the original, as one of `tensor` ranks holds it."""

    def __init__(self, tensor, attention="attention"):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        setattr(self, attention, nn.Module())
        getattr(self, attention).query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN // tensor)
        getattr(self, attention).dense = nn.Linear(HIDDEN // tensor, HIDDEN)
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Module()
        self.mlp.dense_h_to_4h = nn.Linear(HIDDEN, FEED_FORWARD // tensor)
        self.mlp.dense_4h_to_h = nn.Linear(FEED_FORWARD // tensor, HIDDEN)


class Bert(nn.Module):
    """One pipeline stage of the original's model, as one of `tensor` ranks holds it.

    Its modules are registered in the original's order. `has_extras`: token types, pooler and binary head.
    """

    def __init__(self, tensor, num_layers, is_first, is_last, *, is_later=False, has_extras=False):
        super().__init__()
        self.language_model = nn.Module()
        if is_first:
            self.language_model.embedding = nn.Module()
            self.language_model.embedding.word_embeddings = nn.Embedding(ROWS // tensor, HIDDEN)
            self.language_model.embedding.position_embeddings = nn.Embedding(POSITIONS, HIDDEN)
            if has_extras:
                self.language_model.embedding.tokentype_embeddings = nn.Embedding(2, HIDDEN)
        transformer = nn.Module()
        transformer.layers = nn.ModuleList([Layer(tensor, "self_attention" if is_later else "attention")
                                            for _ in range(num_layers)])
        if is_last:
            transformer.final_layernorm = nn.LayerNorm(HIDDEN)
        self.body = "encoder" if is_later else "transformer"
        setattr(self.language_model, self.body, transformer)
        if is_last and has_extras:
            self.language_model.pooler = nn.Module()
            self.language_model.pooler.dense = nn.Linear(HIDDEN, HIDDEN)
        if is_last:
            if not is_first:
                self.word_embeddings = nn.Embedding(ROWS // tensor, HIDDEN)
            self.lm_head = nn.Module()
            self.lm_head.bias = nn.Parameter(torch.empty(ROWS // tensor))
            self.lm_head.dense = nn.Linear(HIDDEN, HIDDEN)
            self.lm_head.layernorm = nn.LayerNorm(HIDDEN)
            if has_extras:
                self.binary_head = nn.Linear(HIDDEN, 2)

    def saved(self):
        """The state, nested as by the original's `state_dict_for_save_checkpoint`."""
        parts = dict(self.language_model.named_children())
        language_model = {}
        if "embedding" in parts:
            language_model["embedding"] = {name: part.state_dict()
                                           for name, part in parts["embedding"].named_children()}
        language_model[self.body] = parts[self.body].state_dict()
        if "pooler" in parts:
            language_model["pooler"] = parts["pooler"].state_dict()
        saved = {"language_model": language_model}
        for name in ("lm_head", "binary_head"):
            if hasattr(self, name):
                saved[name] = getattr(self, name).state_dict()
        if hasattr(self, "word_embeddings"):
            saved["word_embeddings_for_head"] = self.word_embeddings.state_dict()
        return saved


def our_name(name, first_layer):
    """Our name of the parameter `name` of a Bert whose first layer is `first_layer`; None if our model lacks it."""
    parts = name.removeprefix("language_model.").replace("encoder.", "transformer.").replace(
        "self_attention", "attention").split(".")
    if parts[0] == "word_embeddings":
        return "embedding.word_embeddings.weight"
    if parts[0] in ("pooler", "binary_head") or parts[1] == "tokentype_embeddings":
        return None
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def part(name, whole, rank, tensor, version):
    """The part of the whole tensor `name` that tensor rank `rank` of `tensor` holds.

    `version`: the checkpoint version, which determines the order of query_key_value's rows.
    """
    if "query_key_value" in name:
        heads = whole.unflatten(0, (HEADS, 3, WIDTH)).chunk(tensor)[rank]
        orders = {0: (1, 0, 2), 1: (0, 2, 1), 2: (0, 1, 2), 3: (0, 1, 2)}
        return heads.permute(*orders[int(version)], *range(3, heads.ndim)).flatten(0, 2)
    if "word_embeddings" in name or "dense_h_to_4h" in name or name == "lm_head.bias":
        return whole.chunk(tensor)[rank]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return whole.chunk(tensor, dim=1)[rank]
    return whole


def groups_of(modules):
    """The original's two groups of parameters: with weight decay, and without."""
    decay, free = [], []
    for module in (inner for chunk in modules for inner in chunk.modules()):
        own = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
        if isinstance(module, nn.LayerNorm):
            free += [parameter for _, parameter in own]
        else:
            decay += [parameter for name, parameter in own if name != "bias"]
            free += [parameter for name, parameter in own if name == "bias"]
    return decay, free


def write_original(folder, *, values=None, version=3.0, tensor=1, pipeline=(LAYERS,), virtual=1, precision="fp32",
                   is_old=False, is_later=False, has_extras=False, legacy_file=False, with_optimizer=True):
    """Write one checkpoint into a run's folder, and return the checkpoint's folder (iter_…).

    `pipeline`: the number of layers of each pipeline rank, over its `virtual` chunks. `is_old`: name the optimizer's
    and scheduler's entries as before v2; `is_later`: name modules and scheduler as after v2.2.
    """
    values = wholes() if values is None else values
    place = Path(folder) / f"iter_{ITERATION:07d}"
    first_layers = {}
    for chunk in range(virtual):
        for stage, layers in enumerate(pipeline):
            first_layers[stage, chunk] = sum(layers // virtual for layers in pipeline) * chunk + sum(
                layers // virtual for layers in pipeline[:stage])
    for stage, layers in enumerate(pipeline):
        for rank in range(tensor):
            torch.manual_seed(2)  # seeds the parameters that `values` lacks
            chunks = [Bert(tensor, layers // virtual, stage == chunk == 0,
                           (stage, chunk) == (len(pipeline) - 1, virtual - 1), is_later=is_later,
                           has_extras=has_extras) for chunk in range(virtual)]
            moments = {}
            for chunk, module in enumerate(chunks):
                for name, parameter in module.named_parameters():
                    ours = our_name(name, first_layers[stage, chunk])
                    if ours is not None:
                        parameter.data = part(ours, values[ours], rank, tensor, version).clone()
                        moments[parameter] = {kind: part(ours, values[f"{kind}/{ours}"], rank, tensor, version).clone()
                                              for kind in KINDS}
                    else:
                        moments[parameter] = {kind: torch.randn_like(parameter) for kind in KINDS}
            tree = state_dict(chunks, moments, version, rank, stage, tensor, len(pipeline), precision, is_old, is_later,
                              with_optimizer)
            file = place / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if len(pipeline) > 1 else ""))
            file.mkdir(parents=True)
            with loss_scalers():
                torch.save(tree, file / "model_optim_rng.pt", _use_new_zipfile_serialization=not legacy_file)
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return place


def state_dict(chunks, moments, version, rank, stage, tensor, pipeline, precision, is_old, is_later, with_optimizer):
    """The content of one rank's model_optim_rng.pt."""
    groups, kind = groups_of(chunks), {"fp16": torch.half, "bf16": torch.bfloat16}.get(precision, torch.float32)
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=0.0)
    for parameter in moments:
        optimizer.state[parameter] = moments[parameter]
    inner = optimizer.state_dict()
    for group in inner["param_groups"]:
        keep = {name: group[name] for name in ("weight_decay", "betas", "eps", "params")}
        group.clear()
        group.update({"lr": learning_rate(), "bias_correction": True, **keep, "step": STEP})
    masters = [[parameter.detach().clone() for parameter in group] for group in groups]
    for module in chunks:
        module.to(kind)
    tree = {"args": arguments(rank, stage, tensor, pipeline, kind, is_old), "checkpoint_version": version,
            "iteration": ITERATION}
    if version == 0:
        del tree["checkpoint_version"]
    saved = [module.saved() for module in chunks]
    tree |= {"model": saved[0]} if len(saved) == 1 else {f"model{n}": one for n, one in enumerate(saved)}
    if with_optimizer:
        tree["optimizer"] = inner if kind == torch.float32 else {
            "optimizer": inner, "grad_scaler": {"scale": torch.tensor([65536.0]), "growth_tracker": 3,
                                                "hysteresis_tracker": 1}, "fp32_from_fp16_params": masters}
        if is_old and kind != torch.float32:
            scaler = sys.modules.get("megatron.fp16.loss_scaler", _SCALERS).DynamicLossScaler()
            tree["optimizer"] = {"loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": False,
                                 "optimizer_state_dict": inner, "fp32_from_fp16": masters}
        if kind == torch.bfloat16:
            del tree["optimizer"]["grad_scaler"]
        tree |= scheduler(is_old, is_later)
    state = torch.Generator().get_state()
    return tree | {"random_rng_state": random.Random(1).getstate(),
                   "np_rng_state": np.random.RandomState(1).get_state(), "torch_rng_state": state,
                   "cuda_rng_state": state, "rng_tracker_states": {"model-parallel-rng": state}}


def learning_rate():
    """The learning rate after CONSUMED samples: linear from 1e-3 after 16 samples to 1e-4 after 160."""
    return 1e-4 + (1 - (CONSUMED - 16) / (160 - 16)) * (1e-3 - 1e-4)


def scheduler(is_old, is_later):
    """The learning-rate scheduler's state: 2 steps of warm-up, decay until step 20, 8 samples per step."""
    if is_old:
        return {"lr_scheduler": {"start_lr": 1e-3, "warmup_iter": 2.0, "num_iters": ITERATION, "decay_style": "linear",
                                 "end_iter": 20, "min_lr": 1e-4}}
    if is_later:
        return {"opt_param_scheduler": {
            "max_lr": 1e-3, "lr_warmup_steps": 16.0, "num_steps": CONSUMED, "lr_decay_style": "linear",
            "lr_decay_steps": 160, "min_lr": 1e-4}}
    return {"lr_scheduler": {"max_lr": 1e-3, "min_lr": 1e-4, "decay_style": "linear", "warmup_steps": 16.0,
                             "decay_steps": 160, "num_steps": CONSUMED}}


def arguments(rank, stage, tensor, pipeline, kind, is_old):
    """The `args` that the original saves."""
    given = argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=POSITIONS,
        make_vocab_size_divisible_by=4, layernorm_epsilon=1e-12, bias_gelu_fusion=True, openai_gelu=False,
        padded_vocab_size=ROWS, fp16=kind == torch.half, bf16=kind == torch.bfloat16, hysteresis=2, params_dtype=kind,
        seq_length=POSITIONS, rank=stage * tensor + rank, world_size=tensor * pipeline, lr=1e-3, min_lr=1e-4,
        weight_decay=0.01, seed=1234, mask_prob=0.15)
    if is_old:
        vars(given).update(model_parallel_size=tensor, batch_size=8, world_size=tensor)
    else:
        vars(given).update(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
                           micro_batch_size=8, global_batch_size=8, consumed_train_samples=CONSUMED,
                           consumed_valid_samples=0)
    return given


class DynamicLossScaler:
    """The loss scaler that Megatron before v2 pickled, after 12 steps, the eighth of which was the last to overflow."""

    def __init__(self):
        self.cur_scale, self.cur_iter, self.last_overflow_iter = 4096.0, 12, 8
        self.scale_factor, self.scale_window, self.min_scale = 2.0, 1000, 1
        self.delayed_shift, self.cur_hysteresis, self.consecutive_hysteresis = 2, 1, False


DynamicLossScaler.__module__ = "megatron.fp16.loss_scaler"
_SCALERS = types.ModuleType("megatron.fp16.loss_scaler")
_SCALERS.DynamicLossScaler = DynamicLossScaler  # type: ignore[attr-defined]


@contextmanager
def loss_scalers():
    """Within this context the original's module megatron.fp16.loss_scaler can be imported, also by pickle."""
    sys.modules["megatron.fp16.loss_scaler"] = _SCALERS
    try:
        yield
    finally:
        del sys.modules["megatron.fp16.loss_scaler"]


def loaded(file):
    """The content of a trusted file, by torch.load."""
    with loss_scalers():
        return torch.load(file, weights_only=False)
