"""Translates between Megatron's arguments, an argparse.Namespace in each of its checkpoints, and our flags."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.megatron_v2.names import num_layers
from megatron.checkpoint.convert.megatron_v2.places import RELEASE
from megatron.checkpoint.convert.vocabulary import WORDS
from megatron.config import Config
from megatron.config.data import VOCABULARIES
from megatron.config.declaration import flag_name
from megatron.config.schedule import LR_DECAY_STYLES
from megatron.errors import CheckpointError
from megatron.optim.schedule import schedule_of as rates_of

# Sections of flags that mean the same there as here. Layout, paths and logging belong to each run.
_SECTIONS = ("model", "data", "optimizer", "schedule", "precision", "training")
# Arguments that change what the weights compute, with the only value that our models support.
_SAME = {  # openai_gelu changes the head there too, where our head has exact GeLU
    "openai_gelu": False, "swiglu": False, "squared_relu": False, "normalization": "LayerNorm",
    "apply_layernorm_1p": False, "untie_embeddings_and_output_weights": False, "num_experts": None,
    "position_embedding_type": "learned_absolute", "group_query_attention": False, "add_bias_linear": True,
    "attention_head_type": "multihead", "glu_activation": None, "multi_query_attention": False}
# Arguments that only Megatron has, with its defaults.
_THEIRS: dict[str, Any] = {
    "onnx_safe": None, "log_interval": 100, "tensorboard_dir": None, "scaled_masked_softmax_fusion": True,
    "scaled_upper_triang_masked_softmax_fusion": False, "bias_dropout_fusion": True, "save": None,
    "save_interval": None, "no_save_optim": None, "no_save_rng": None, "load": None, "no_load_optim": None,
    "no_load_rng": None, "finetune": False, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": False,
    "fp32_allreduce": False, "distributed_backend": "nccl", "DDP_impl": "local", "local_rank": 0,
    "lazy_mpu_init": None, "use_cpu_initialization": None, "merge_file": None, "short_seq_prob": 0.1,
    "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, "adlr_autoresume": False,
    "adlr_autoresume_interval": 1000, "ict_head_size": None, "ict_load": None, "bert_load": None,
    "titles_data_path": None, "query_in_block_prob": 0.1, "use_one_sent_docs": False, "report_topk_accuracies": [],
    "faiss_use_gpu": False, "block_data_path": None, "indexer_batch_size": 128, "indexer_log_interval": 1000,
    "iteration": 0, "do_train": 1, "do_valid": 1, "do_test": 1}
# Our model flags that Megatron has too, or that have no effect as long as all others have their defaults.
_MEANT_THERE = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "max_position_embeddings", "make_vocab_size_divisible_by", "layernorm_epsilon", "rotary_base", "rotary_percent",
    "apply_residual_connection_post_layernorm", "bias_gelu_fusion", "openai_gelu"}
_IUPAC = "iupac_vocab.txt"  # as ProteinLM names the file of the default vocabulary
_ASSUMED = ("layernorm_epsilon", "bias_gelu_fusion")  # what changes the numbers, and no parameter's shape tells
_SCHEDULES = (  # key in the file, our names: the names in each generation of Megatron; the first counts iterations
    ("lr_scheduler", {"lr": "start_lr", "min_lr": "min_lr", "lr_decay_style": "decay_style",
                      "warmup_samples": "warmup_iter", "decay_samples": "end_iter", "num_samples": "num_iters"}),
    ("lr_scheduler", {"lr": "max_lr", "min_lr": "min_lr", "lr_decay_style": "decay_style",
                      "warmup_samples": "warmup_steps", "decay_samples": "decay_steps", "num_samples": "num_steps"}),
    ("opt_param_scheduler", {"lr": "max_lr", "min_lr": "min_lr", "lr_decay_style": "lr_decay_style",
                             "warmup_samples": "lr_warmup_steps", "decay_samples": "lr_decay_steps",
                             "num_samples": "num_steps"}))


def arguments_in(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments in a file's content, a namespace or a dict; {} if there are none."""
    found = tree.get("args")
    if isinstance(found, argparse.Namespace):
        return vars(found)
    return {name: value for name, value in found.items() if isinstance(name, str)} if isinstance(found, dict) else {}


def config_of(given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], path: Path) -> dict[str, Any]:
    """Our flags by field name, as far as Megatron's arguments and the parameters' shapes (by our names) tell them.

    Raises CheckpointError if they describe a model that computes something that ours cannot.
    """
    for name, ours in _SAME.items():
        if given.get(name, ours) != ours:
            raise CheckpointError(f"{path}: was trained with {name} {given[name]!r}, models here compute as with "
                                  f"{ours!r}; its weights would mean something else")
    config = {item.name: _in_list(item, given[item.name]) for name, section in Config().sections() if name in _SECTIONS
              for item in fields(section) if item.name in given and fits(item, given[item.name])}
    config.pop("num_query_groups", None)  # Megatron ignores it without group_query_attention
    if given:
        config.setdefault("bias_gelu_fusion", False)  # before Megatron had that flag, its GeLU was exact
    if isinstance(given.get("batch_size"), int):
        config.setdefault("micro_batch_size", given["batch_size"])
    hidden, positions = shapes[WORDS][1], shapes["embedding.position_embeddings.weight"][0]
    of_shapes = {"num_layers": num_layers(shapes), "hidden_size": hidden, "max_position_embeddings": positions,
                 "ffn_hidden_size": shapes["transformer.layers.0.mlp.dense_h_to_4h.bias"][0]}
    for name, value in of_shapes.items():
        if config.get(name) not in (None, value):
            raise CheckpointError(f"{path}: its arguments say {name} {config[name]}, its parameters {value}; copy it "
                                  "again, all from one run")
    if "num_attention_heads" in config:
        width = shapes["transformer.layers.0.attention.dense.weight"][1]
        of_shapes["kv_channels"] = width // config["num_attention_heads"]
    return config | of_shapes


def schedule_of(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The learning rate schedule in a file, counted in samples, with its position as "num_samples"; None if unknown.

    `tree`: the file's content. Raises ValueError for negative numbers.
    """
    for key, names in _SCHEDULES:
        facts = tree.get(key)
        if isinstance(facts, dict) and set(names.values()) <= facts.keys():
            numbers = [facts[theirs] for ours, theirs in names.items() if ours != "lr_decay_style"]
            if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
                raise ValueError(f"{key} has {numbers}")
            schedule = {ours: facts[theirs] for ours, theirs in names.items()}
            schedule["lr_decay_style"] = str(schedule["lr_decay_style"])
            if "num_iters" in facts:
                rows = _rows_a_step(arguments_in(tree))
                schedule |= {name: schedule[name] * rows for name in ("warmup_samples", "decay_samples", "num_samples")}
            return _with_later_styles(schedule, facts, arguments_in(tree))
    return None


def _with_later_styles(schedule: dict[str, Any], facts: Mapping[str, Any],
                        given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schedule with what later schedulers of Megatron-LM added: WSD's decay, and a growing weight decay.

    None if the length of WSD's decay, which only the arguments have, is unknown.
    """
    if schedule["lr_decay_style"] == "WSD":
        samples = given.get("lr_wsd_decay_samples") or (given.get("lr_wsd_decay_iters") or 0) * _rows_a_step(given)
        if not samples:
            return None
        schedule |= {"wsd_decay_samples": samples, "lr_wsd_decay_style": str(given.get("lr_wsd_decay_style"))}
    if facts.get("wd_incr_style", "constant") != "constant":
        schedule |= {"start_weight_decay": facts["start_wd"], "end_weight_decay": facts["end_wd"],
                     "weight_decay_incr_style": facts["wd_incr_style"],
                     "weight_decay_incr_samples": facts["wd_incr_steps"]}
    return schedule


def iteration_of(place: Path, number: Any) -> int:
    """The iteration that a file says, 0 for weights without a run; raises CheckpointError if it is no count."""
    if place.name == RELEASE:
        return 0
    if type(number) is not int or number < 0:
        raise CheckpointError(f"{place}: its iteration is {str(number)[:40]!r}; copy it again")
    return number


def state_of(tree: Mapping[str, Any], iteration: int, config: dict[str, Any], layout: tuple[int, int],
             notes: list[str], loss_scale: list[float] | None = None) -> dict[str, Any]:
    """A checkpoint's state: "config", "notes", "layout", "progress", "loss_scale" and, if it is known, "schedule".

    `tree`: a file's content; `layout`: the tensor- and pipeline-parallel sizes. The number of rows is estimated if it
    was not stored.
    """
    schedule, given, defaults = schedule_of(tree), arguments_in(tree), Config().as_dict()
    if absent := [name for name in _ASSUMED if name not in config]:
        notes.append(f"it does not say its {' and '.join(absent)}: unless flags say otherwise, taken to be "
                     f"{' and '.join(str(defaults[name]) for name in absent)}, the default")
    file = config.get("vocab_file")
    if file not in (None, *VOCABULARIES) and not Path(file).exists() and Path(file).name != _IUPAC:
        notes.append(f"its vocabulary {file} is not here: its tokens are taken to be those of iupac, unless "
                     "--vocab-file names others; put that file there if they are not")
    consumed = given.get("consumed_train_samples")
    if type(consumed) is not int or consumed < 0:
        consumed = int(schedule["num_samples"]) if schedule is not None else iteration * _rows_a_step(given)
    state: dict[str, Any] = {
        "config": config, "notes": notes,
        "layout": {"tensor_model_parallel_size": layout[0], "pipeline_model_parallel_size": layout[1]},
        "progress": {"iteration": iteration, "consumed_samples": consumed if iteration else 0},
        "loss_scale": loss_scale or [1.0, float(config.get("hysteresis") or 1), 0.0]}
    if schedule is not None:
        state["schedule"] = {name: value for name, value in schedule.items() if name != "num_samples"}
    return state


def scheduler_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron's entry `lr_scheduler` for a checkpoint's state; None if the schedule is unknown."""
    schedule = state.get("schedule")
    if schedule is None:
        return None
    names = _SCHEDULES[1][1]
    return {theirs: schedule[ours] if ours != "num_samples" else state["progress"]["consumed_samples"]
            for ours, theirs in names.items()}


def learning_rate(state: Mapping[str, Any]) -> float:
    """The learning rate of the next step; 0 if the schedule is unknown."""
    schedule = state.get("schedule")
    if schedule is None or schedule["lr_decay_style"] not in LR_DECAY_STYLES:
        return 0.0
    return rates_of(schedule).learning_rate(state["progress"]["consumed_samples"])


def refuse_others(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError with the first flag with which Megatron's model cannot compute what this one does."""
    flags, defaults = _flags(checkpoint), Config().as_dict()
    for item in fields(Config().model):
        if item.metadata["changes"] == "arithmetic" and item.name not in _MEANT_THERE and (
                flags[item.name] != defaults[item.name]):
            raise CheckpointError(f"{checkpoint.path}: was trained with {flag_name(item)} {flags[item.name]}, which "
                                  "Megatron-LM's BERT does not have; --to hf writes any model of ours")


def arguments_of(checkpoint: Checkpoint, num_tensor: int, num_pipeline: int, dtype: torch.dtype) -> dict[str, Any]:
    """Megatron's arguments, without the rank, for the files of a checkpoint whose vocabulary is padded already.

    `dtype`: of the parameters.
    """
    flags = _flags(checkpoint)
    ours = {item.name: flags[item.name] for name, section in Config().sections() if name in _SECTIONS
            for item in fields(section)}
    if ours["openai_gelu"]:  # Megatron would use it in the head too; bias_gelu_fusion gives the same GeLU in the blocks
        ours |= {"openai_gelu": False, "bias_gelu_fusion": True}
    ours["mask_prob"] = ours["mask_prob"][:2][-1]  # a constant, or the end of a schedule
    positions, hidden = checkpoint.model["embedding.position_embeddings.weight"].shape
    shape = {"num_layers": num_layers(checkpoint.model), "hidden_size": hidden,
             "max_position_embeddings": positions, "padded_vocab_size": checkpoint.model[WORDS].shape[0],
             "params_dtype": dtype}
    progress = checkpoint.state.get("progress", {})
    layout = {"tensor_model_parallel_size": num_tensor, "pipeline_model_parallel_size": num_pipeline,
              "world_size": num_tensor * num_pipeline, "data_parallel_size": 1,
              "consumed_train_samples": progress.get("consumed_samples", 0), "consumed_valid_samples": 0}
    return {**_THEIRS, **ours, **shape, **layout}


def _in_list(item: Field, value: Any) -> Any:
    """The value of a flag, in a list where the flag takes several here but Megatron has one, as for --mask-prob."""
    return [value] if item.metadata["nargs"] and not isinstance(value, list | tuple | None) else value


def _flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's flags, completed by defaults; as many key-value groups as heads are none."""
    flags = Config().as_dict() | checkpoint.state.get("config", {})
    if flags["num_query_groups"] == flags["num_attention_heads"]:
        flags["num_query_groups"] = None
    return flags


def _rows_a_step(given: Mapping[str, Any]) -> int:
    """The global batch size; 1 if it is unknown."""
    if isinstance(given.get("global_batch_size"), int):
        return given["global_batch_size"]
    ranks = given.get("world_size", 1) // given.get("model_parallel_size", 1)
    return given.get("batch_size", 1) * ranks


def fits(item: Field, value: Any) -> bool:
    """Whether `value` has the type of the flag `item`, and is one of its choices."""
    if value is None:
        return item.default is None
    choices, nargs, kind = item.metadata["choices"], item.metadata["nargs"], item.metadata["type"]
    if isinstance(item.default, bool) or kind is bool:
        return isinstance(value, bool)
    values = value if nargs and isinstance(value, list | tuple) else [value]
    allowed = (int, float) if kind is float else (kind,)
    return all(isinstance(one, allowed) and not isinstance(one, bool) and (choices is None or one in choices)
               for one in values)
