"""Runs megatron-core's BERT, as an oracle: writes checkpoints, and loads ours strictly. Uses a CPU and gloo.

    python program.py record ARCHIVE           writes every form of checkpoint that megatron-core writes, and the logits
                                               of three proteins
    python program.py check CHECKPOINT FORM TENSOR PIPELINE WEIGHTS
                                               loads CHECKPOINT (an iter_ folder) into the model of `record`, split over
                                               TENSOR and PIPELINE ranks; fails unless every weight equals that of
                                               WEIGHTS (a state dict); writes the logits of one rank to
                                               CHECKPOINT/logits.npy

Needs megatron-core and psutil (recorded.tar.xz next to it was made with 0.16.1) and none of this project's files:
megatron-core's package has the same name as ours, so no test imports this file.
"""

import argparse
import contextlib
import re
import socket
import sys
import tarfile
import tempfile
import types
import warnings
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing

warnings.simplefilter("ignore")
# Another package of the name may come first on the path: take megatron-core's by the place of its files.
_package = types.ModuleType("megatron")
_package.__path__ = [str(distribution("megatron-core").locate_file("megatron"))]
sys.modules["megatron"] = _package

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

NUM_LAYERS, HIDDEN, FEED_FORWARD, HEADS, POSITIONS, VOCABULARY = 2, 16, 24, 2, 24, 64
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 2))  # over tensor and pipeline ranks
LENGTHS, NUM_IDS, ITERATION = (24, 9, 13), 30, 7


def arguments(tensor, pipeline):
    """The fields of Megatron-LM's arguments that tell a reader of the checkpoint the model, and some of odd types."""
    return argparse.Namespace(
        num_layers=NUM_LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FEED_FORWARD, num_attention_heads=HEADS,
        kv_channels=HIDDEN // HEADS, max_position_embeddings=POSITIONS, seq_length=POSITIONS, norm_epsilon=1e-5,
        bias_gelu_fusion=True, openai_gelu=False, swiglu=False, normalization="LayerNorm", num_query_groups=1,
        group_query_attention=False, add_bias_linear=True, position_embedding_type="learned_absolute",
        untie_embeddings_and_output_weights=False, apply_residual_connection_post_layernorm=False,
        attention_dropout=0.1, hidden_dropout=0.1, init_method_std=0.02, make_vocab_size_divisible_by=VOCABULARY // 2,
        padded_vocab_size=VOCABULARY, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=None, consumed_train_samples=7 * 64, bert_binary_head=False,
        params_dtype=torch.float32, attention_backend=AttnBackend.auto, transformer_impl="local", iteration=ITERATION)


def model(tensor=1, pipeline=1, tanh=True, **options):
    """This rank's part of the BERT, in evaluation mode."""
    config = TransformerConfig(
        num_layers=NUM_LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FEED_FORWARD, num_attention_heads=HEADS,
        hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=tanh, masked_softmax_fusion=False,
        use_cpu_initialization=True, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32)
    settings = {"num_tokentypes": 0, "add_binary_head": False, "share_embeddings_and_output_weights": True, **options}
    return BertModel(config, transformer_layer_spec=bert_layer_local_spec, vocab_size=VOCABULARY,
                     max_sequence_length=POSITIONS, pre_process=parallel_state.is_pipeline_first_stage(),
                     post_process=parallel_state.is_pipeline_last_stage(), **settings).eval()


def proteins():
    """Their token ids, one tensor a protein."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, NUM_IDS, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def logits(bert):
    """[tokens, vocabulary], one protein at a time; checks that padding a batch of them gives the same."""
    alone = [bert(ids[None], torch.ones_like(ids[None]))[0][0] for ids in proteins()]
    mask = torch.tensor([[position < length for position in range(max(LENGTHS))] for length in LENGTHS]).long()
    padded = torch.zeros_like(mask)
    padded[mask.bool()] = torch.cat(proteins())
    assert (bert(padded, mask)[0][mask.bool()] - torch.cat(alone)).abs().max() < 1e-5
    return torch.cat(alone).numpy()


def sharded(bert, by_layer=False):
    """What dist_checkpointing takes: layers stacked in one tensor, as Megatron-LM saved until 2025, or each its own."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
                **({"singleton_local_shards": True} if by_layer else {})}
    return bert.sharded_state_dict(metadata=metadata)


def save_split(rank, folder, tensor, pipeline):
    """A file a rank, and of one split both distributed forms, from ranks that load their parts of one rank's."""
    bert, place = model(tensor, pipeline), Path(folder)
    common = {"args": arguments(tensor, pipeline), "checkpoint_version": 3.0, "iteration": ITERATION}
    loaded = dist_checkpointing.load({"model": sharded(bert)}, str(place / "stacked" / "iter_0000007"))
    bert.load_state_dict(loaded["model"], strict=True)
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if pipeline > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    target = place / f"split_{tensor}_{pipeline}" / "iter_0000007" / name
    target.mkdir(parents=True)
    torch.save({**common, "model": bert.state_dict_for_save_checkpoint()}, target / "model_optim_rng.pt")
    for by_layer in (False, True) if (tensor, pipeline) == (2, 2) else ():
        save_distributed(bert, place / f"{'layers' if by_layer else 'stacked'}_2_2", common, by_layer)


def save_distributed(bert, folder, common, by_layer=False):
    target = folder / "iter_0000007"
    if distributed.get_rank() == 0:
        target.mkdir(parents=True)
    distributed.barrier()
    dist_checkpointing.save({**common, "model": sharded(bert, by_layer)}, str(target))


def record(rank, folder):
    """The weights, the logits, and the distributed form of one rank."""
    torch.manual_seed(1)
    place, bert = Path(folder), model()
    for name, parameter in bert.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
    torch.save(bert.state_dict(), place / "whole.pt")
    exact = model(tanh=False)
    exact.load_state_dict(bert.state_dict())
    np.savez(place / "logits.npz", ids=torch.cat(proteins()), lengths=np.array(LENGTHS), tanh=logits(bert),
             exact=logits(exact))
    save_distributed(bert, place / "stacked", {"args": arguments(1, 1), "checkpoint_version": 3.0,
                                               "iteration": ITERATION})


def check(rank, folder, form, tensor, pipeline, weights):
    """Load what another program wrote, strictly, in the form `mp_rank` or `torch_dist`; compare with `weights`."""
    bert, place = model(tensor, pipeline), Path(folder)
    if form == "mp_rank":
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if pipeline > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        state = torch.load(place / name / "model_optim_rng.pt", weights_only=False)
    else:
        state = dist_checkpointing.load({"model": sharded(bert)}, str(place), strict="raise_all")
    assert state["checkpoint_version"] == 3.0 and state["args"].num_layers == NUM_LAYERS
    assert state["args"].padded_vocab_size == VOCABULARY
    bert.load_state_dict(state["model"], strict=True)
    expected = {"model": sharded(model(tensor, pipeline))}
    for name, value in expected_parts(expected["model"], torch.load(weights)).items():
        assert torch.equal(value, bert.state_dict()[name]), name
    if tensor == pipeline == 1:
        np.save(place / "logits.npy", logits(bert))


def expected_parts(parts, whole):
    """This rank's parts of the whole weights: by megatron-core's own offsets, the layers counted from the first."""
    layers = parallel_state.get_pipeline_model_parallel_rank() * NUM_LAYERS
    layers //= parallel_state.get_pipeline_model_parallel_world_size()
    found = {}
    for name, part in parts.items():
        if not hasattr(part, "global_offset") or not isinstance(part.data, torch.Tensor):
            continue
        there = re.sub("layers.([0-9]+)", lambda number: f"layers.{int(number[1]) + layers}", name)
        value = whole[there if there in whole else "embedding.word_embeddings.weight"]
        start = part.global_offset[part.prepend_axis_num:]
        found[name] = value[tuple(slice(o, o + size) for o, size in zip(start, part.local_shape, strict=True))]
    return found


def rank_main(rank, world, port, tensor, pipeline, work, arguments):
    """One rank: joins the others, makes megatron-core believe that the CPU is its device, and does the work."""
    torch.set_num_threads(1)
    for place, name, stand_in in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")), (torch.cuda, "synchronize", lambda: None),
            (torch.Tensor, "cuda", lambda tensor: tensor),
            (tensor_parallel, "get_cuda_rng_tracker", lambda: types.SimpleNamespace(fork=contextlib.nullcontext))):
        setattr(place, name, stand_in)
    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    globals()[work](rank, *arguments)
    distributed.barrier()
    distributed.destroy_process_group()


def run(tensor, pipeline, work, *arguments):
    """`work` on tensor x pipeline ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = tensor * pipeline
    multiprocessing.spawn(rank_main, (world, port, tensor, pipeline, work, arguments), nprocs=world)


def main():
    command, path, *rest = sys.argv[1:]
    if command == "record":
        with tempfile.TemporaryDirectory() as folder:
            run(1, 1, "record", folder)
            for tensor, pipeline in SPLITS:
                run(tensor, pipeline, "save_split", folder, tensor, pipeline)
            with tarfile.open(path, "w:xz") as archive:
                archive.add(folder, ".")
    elif command == "check":
        form, tensor, pipeline, weights = rest
        run(int(tensor), int(pipeline), "check", path, form, int(tensor), int(pipeline), weights)


if __name__ == "__main__":
    main()
