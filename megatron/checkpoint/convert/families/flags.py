"""Translates between config.json of `transformers` and our flags.

ESM-2 (rotary positions) and ESM-1b (absolute) are EsmForMaskedLM, ProtBERT is BertForMaskedLM. A model that neither
class can compute is a ProteinForMaskedLM, whose code we write into the folder (`remote`) and whose config.json has our
flags under our names.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.megatron_v2.arguments import fits
from megatron.config import DataConfig, ModelConfig
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError

ESM, BERT, OWN = "esm", "bert", "protein_lm"
CLASSES = {ESM: "EsmForMaskedLM", BERT: "BertForMaskedLM", OWN: "ProteinForMaskedLM"}
_BOTH_HEADS = "BertForPreTraining"  # BertForMaskedLM plus a head for sentence pairs, which is left out
_WITHOUT_HEAD = {f"{family}{end}" for family in ("Esm", "Bert")
                 for end in ("Model", "ForTokenClassification", "ForSequenceClassification")}
_CODE = {"AutoConfig": "configuration_protein.ProteinConfig",
         "AutoModelForMaskedLM": f"modeling_protein.{CLASSES[OWN]}"}
_COURSE = ("attention_dropout", "hidden_dropout", "init_method_std")  # in config.json besides the arithmetic
# The defaults of transformers, for what a config.json leaves out.
_THEIRS: Mapping[str, Mapping[str, Any]] = {
    ESM: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
          "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 1026,
          "initializer_range": 0.02, "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
          "emb_layer_norm_before": None, "token_dropout": False, "rope_theta": 10000.0, "tie_word_embeddings": True,
          "vocab_size": 33, "pad_token_id": 1},
    BERT: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
           "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512,
           "initializer_range": 0.02, "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
           "tie_word_embeddings": True, "vocab_size": 30522, "pad_token_id": 0}}
# Settings that change what the weights compute, with the only value that our models support.
_SAME: Mapping[str, Any] = {
    "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "is_folding_model": False,
    "pruned_heads": {}, "quantization_config": None, "rope_scaling": None, "rope_parameters": None, "head_dim": None}
_POSITIONS = {ESM: {"rotary": "rope", "absolute": "learned_absolute"}, BERT: {"absolute": "learned_absolute"}}
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
           "vocab_size")
_NUMBERS = {"layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "rope_theta",
            "pad_token_id"}
_MOST = {"num_hidden_layers": 10_000, "num_layers": 10_000, "layers": 10_000}
_IMPLIED = ("ffn_hidden_size", "kv_channels", "num_query_groups", "max_position_embeddings")
# Flags that may have any value: the family's class has a field for them, or they do not change what is computed.
_FREE = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
         "max_position_embeddings", "make_vocab_size_divisible_by", "layernorm_epsilon",
         "untie_embeddings_and_output_weights", "num_query_groups"}
OF_ESM = {"norm_placement": "pre", "bias_gelu_fusion": False}
_FREE_IN_ESM = {"position_embedding_type", "rotary_base", "rotary_frequency_precision", "embedding_layernorm",
                "token_dropout", "contact_head"}
_OF_BERT = {"norm_placement": "post", "embedding_layernorm": True, "bias_gelu_fusion": False,
            "position_embedding_type": "learned_absolute"}


def arithmetic() -> dict[str, Any]:
    """The model flags that change what the weights compute, with their defaults, except those derived from others."""
    return {item.name: item.default for item in fields(ModelConfig) if item.metadata["changes"] == "arithmetic"
            and item.name not in _IMPLIED}


def flags_of(theirs: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Our flags for the content of a config.json; raises CheckpointError if our models cannot compute that model."""
    kind = kind_of(theirs, place)
    if kind == OWN:
        return _flags_as_they_are(theirs, place)
    said = {**_THEIRS[kind], **{name: value for name, value in theirs.items() if value is not None}}
    for name, ours in _SAME.items():
        if (said.get(name) or ours) != ours:
            raise CheckpointError(f"{place}: was made with {name} {str(said[name])[:60]}, models here compute as "
                                  f"with {ours}; its weights would mean something else, give a model that has that")
    positions = _POSITIONS[kind].get(str(said["position_embedding_type"]))
    if positions is None:
        raise CheckpointError(f"{place}: was made with position_embedding_type {str(said['position_embedding_type'])!r}"
                              f", which models here have not; give one with {' or '.join(_POSITIONS[kind])}")
    check_counts({name: theirs.get(name, said[name]) for name in _COUNTS}, place)  # null is refused
    for name in _NUMBERS & said.keys():
        if type(said[name]) not in (int, float) or not 0 <= said[name] < math.inf:
            raise CheckpointError(f"{place}: its configuration has {name} {str(said[name])[:40]!r}, which is no number "
                                  "of that; copy it again")
    if said["hidden_size"] % said["num_attention_heads"]:
        raise CheckpointError(f"{place}: its configuration has {said['num_attention_heads']} heads in a width of "
                              f"{said['hidden_size']}, which they do not divide; copy it again")
    config = arithmetic() | {
        "num_layers": said["num_hidden_layers"], "hidden_size": said["hidden_size"],
        "ffn_hidden_size": said["intermediate_size"], "num_attention_heads": said["num_attention_heads"],
        "kv_channels": said["hidden_size"] // said["num_attention_heads"],
        "num_query_groups": said["num_attention_heads"],
        "layernorm_epsilon": said["layer_norm_eps"], "hidden_dropout": said["hidden_dropout_prob"],
        "attention_dropout": said["attention_probs_dropout_prob"], "init_method_std": said["initializer_range"],
        "position_embedding_type": positions, "rotary_base": float(said.get("rope_theta", 10000.0)),
        "untie_embeddings_and_output_weights": not said["tie_word_embeddings"],
        "token_dropout": bool(said.get("token_dropout")), "protein_ends": "both", "contact_head": False,
        "embedding_layernorm": bool(said.get("emb_layer_norm_before")), **(OF_ESM if kind == ESM else _OF_BERT)}
    if positions == "learned_absolute":
        config["max_position_embeddings"] = said["max_position_embeddings"] - tokens_of(said, kind)[1]
    return config


def complete(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's flags, completed by defaults; raises CheckpointError if one without a default is missing."""
    config = arithmetic() | checkpoint.state.get("config", {})
    said = checkpoint.state.get("config", {})
    if missing := [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in said]:
        raise CheckpointError(f"{checkpoint.path}: does not say its {missing[0].replace('_', ' ')}, which others need; "
                              "save it with its configuration")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    implied = {"ffn_hidden_size": 4 * width, "kv_channels": width // heads}
    return config | {name: value for name, value in implied.items() if config.get(name) is None}


def _flags_as_they_are(theirs: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Our flags in the config.json of a ProteinForMaskedLM; raises CheckpointError for impossible values."""
    config = arithmetic()
    for item in _stated():
        value = theirs.get(item.name)
        if value is None:
            continue
        check = item.metadata["check"]
        values = value if isinstance(value, list) else [value]
        if not fits(item, value) or (check is not None and not all(map(check[0], values))):
            raise CheckpointError(f"{place}: its configuration has {item.name} {str(value)[:40]!r}, which is none that "
                                  "models here have; copy it again")
        config[item.name] = value
    check_counts({name: config.get(name) for name in ("num_layers", "hidden_size", "num_attention_heads",
                                                      "ffn_hidden_size", "kv_channels")}, place)
    check_counts({"vocab_size": theirs.get("vocab_size")}, place)
    config.setdefault("num_query_groups", config["num_attention_heads"])
    if config["position_embedding_type"] != "learned_absolute":
        config.pop("max_position_embeddings", None)
    return config


def _stated() -> list[Field]:
    """The flags that are stored in the config.json of a ProteinForMaskedLM."""
    return [item for section in (ModelConfig, DataConfig) for item in fields(section)
            if item.metadata["changes"] == "arithmetic" or item.name in _COURSE]


def kind_of(theirs: Mapping[str, Any], place: Path) -> str:
    """The family (ESM, BERT or OWN) of a config.json; raises CheckpointError for any other."""
    kind, classes = theirs.get("model_type"), theirs.get("architectures") or []
    if kind not in CLASSES or not isinstance(classes, list) or {*map(str, classes)} - {CLASSES[kind], _BOTH_HEADS}:
        if kind in (ESM, BERT) and isinstance(classes, list) and {*map(str, classes)} <= _WITHOUT_HEAD:
            refuse_headless(place, f"is of {', '.join(classes)}", kind)
        found = f"model_type {kind!r}" if kind not in CLASSES or not classes else ", ".join(map(str, classes))
        raise CheckpointError(f"{place}: is of {found[:80]}; of transformers' models {', '.join(CLASSES.values())} can "
                              "be read (ESM-2, ESM-1b, ESM-1v, ProtBERT, and what was written here)")
    return kind


def refuse_headless(place: Path, found: str, kind: str) -> NoReturn:
    """Raises CheckpointError for a model of transformers without a masked-LM head, saying how to give it one."""
    raise CheckpointError(f"{place}: {found}, so it has no masked-LM head; save what transformers' "
                          f"{CLASSES[kind]}.from_pretrained makes of it, and its tokenizer, to a new folder: the head "
                          "there is random, so use it for embeddings and fine-tuning alone")


def tokens_of(theirs: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """The number of tokens, and the row of the position table that a protein's first token uses.

    In ESM the positions begin after the row of the padding token.
    """
    said = {**_THEIRS.get(kind, {}), **{name: value for name, value in theirs.items() if value is not None}}
    return said["vocab_size"], said["pad_token_id"] + 1 if kind == ESM else 0


def check_counts(counts: Mapping[str, Any], place: Path) -> None:
    """Raises CheckpointError unless all values are positive integers of a sensible size."""
    for name, value in counts.items():
        if type(value) is not int or not 0 < value <= _MOST.get(name, 2**31):
            raise CheckpointError(f"{place}: its configuration has {name} {str(value)[:40]!r}, which is no number of "
                                  "that; copy it again")


def family_of(config: Mapping[str, Any]) -> str:
    """The family whose transformers class computes the same as a model of these flags; OWN if there is none."""
    return next((kind for kind in (ESM, BERT) if differing(config, kind) is None), OWN)


def differing(config: Mapping[str, Any], kind: str) -> str | None:
    """The name of the first of these flags with which the transformers class of ESM or BERT, `kind`, cannot compute."""
    if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
        return "kv_channels"
    if config.get("num_query_groups") not in (None, config["num_attention_heads"]):
        return "num_query_groups"
    if config["position_embedding_type"] not in _POSITIONS[kind].values():
        return "position_embedding_type"
    fixed, free = (OF_ESM, _FREE | _FREE_IN_ESM) if kind == ESM else (_OF_BERT, _FREE)
    return next((name for name, value in (arithmetic() | fixed).items()
                 if name not in free and config.get(name, value) != value), None)


def configuration(config: Mapping[str, Any], kind: str, vocab: Vocab) -> dict[str, Any]:
    """The content of config.json for a model of these flags, of the family `kind`, without the dtype."""
    if kind == OWN:
        said = {item.name: config[item.name] for item in _stated() if config.get(item.name) is not None}
        return {"architectures": [CLASSES[OWN]], "model_type": OWN, "auto_map": _CODE, "vocab_size": vocab.size,
                "pad_token_id": vocab.pad_id, "mask_token_id": vocab.mask_id, **said}
    theirs = {
        "architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": vocab.size,
        "hidden_size": config["hidden_size"], "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"], "intermediate_size": config["ffn_hidden_size"],
        "layer_norm_eps": config["layernorm_epsilon"], "initializer_range": config.get("init_method_std", 0.02),
        "hidden_dropout_prob": config.get("hidden_dropout", 0.0),
        "attention_probs_dropout_prob": config.get("attention_dropout", 0.0),
        "tie_word_embeddings": not config["untie_embeddings_and_output_weights"], "pad_token_id": vocab.pad_id}
    is_rotary = config["position_embedding_type"] == "rope"
    if kind == BERT:
        named = {} if vocab.mask_token is None else {"mask_token_id": vocab.mask_id}  # [MASK] is known
        return theirs | {**named, "max_position_embeddings": config["max_position_embeddings"], "hidden_act": "gelu",
                         "type_vocab_size": 2, "position_embedding_type": "absolute"}
    return theirs | {
        "position_embedding_type": "rotary" if is_rotary else "absolute", "rope_theta": config["rotary_base"],
        "max_position_embeddings": (config.get("max_position_embeddings") or 1024) + vocab.pad_id + 1,
        "emb_layer_norm_before": config["embedding_layernorm"], "token_dropout": config["token_dropout"],
        "mask_token_id": vocab.mask_id, "bos_token_id": vocab.cls_id, "eos_token_id": vocab.sep_id}
