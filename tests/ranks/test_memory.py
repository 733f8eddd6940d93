"""While a model is built, filled and saved, a rank holds no more than its own part and one tensor."""

import ctypes
import gc
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron.checkpoint.loading import load_model
from megatron.checkpoint.saving import Saver, parts_of
from megatron.checkpoint.store import find
from megatron.config import CheckpointConfig, Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron.log import Log
from megatron.parallel.mesh import build_mesh, with_writers
from megatron.train.step.engine import build_engine
from tests.ranks.launch import TIMEOUT, end_processes, run_ranks

PR_SET_THP_DISABLE, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 41, -1, -3
RANKS, VOCABULARY, MIB, LARGEST = 4, 128, 2**20, 4
MODEL = ModelConfig(num_layers=4, hidden_size=512, num_attention_heads=8, ffn_hidden_size=2048, kv_channels=64,
                    max_position_embeddings=64)
LAYOUTS = {"shares": ParallelConfig(data_parallel_sharding="parameters"),
           "tensor": ParallelConfig(tensor_model_parallel_size=4),
           "pipeline": ParallelConfig(pipeline_model_parallel_size=4)}


def peak_mib() -> float:
    """The most memory that this process has had since the last call."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


@mock.patch("megatron.train.step.engine.keep_freed_memory", lambda: None)  # what it keeps would count
def measured(axis, parallel, folder):
    """MiB of a rank's own part, and what building by the seed, saving, and building by the checkpoint take at most."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # with huge pages a touched byte counts as 2 MiB
    for threshold in M_TRIM_THRESHOLD, M_MMAP_THRESHOLD:
        libc.mallopt(threshold, 2**20)  # what is freed goes back to the system
    mesh = with_writers(build_mesh(parallel, torch.device("cpu"), TIMEOUT), TIMEOUT)
    log = Log(is_speaker=False)

    def build(model, fill=None):
        config = Config(model=model, data=DataConfig(seq_length=64), parallel=parallel,
                        training=TrainingConfig(micro_batch_size=1))
        return build_engine(config, mesh, VOCABULARY, fill)

    def save(engine, place):
        saver = Saver(CheckpointConfig(save=place), mesh, None, log, 0)
        saver.save(1, parts_of(engine.model.parameters, {}), {"iteration": 1})
        saver.close()

    def load(model, place):
        checkpoint = find(place, mesh.world, log)
        return build(model, lambda parameters: load_model(parameters, checkpoint, checkpoint.model.keys()))

    small = replace(MODEL, hidden_size=64, kv_channels=8, ffn_hidden_size=256)
    save(build(small), f"{folder}/small")  # what torch loads at its first use
    load(small, f"{folder}/small")
    gc.collect()
    libc.malloc_trim(0)  # what was freed counts, until it is given back
    peak_mib()
    before = peak_mib()
    engine = build(MODEL)
    found = [peak_mib() - before]
    own = sum(parameter.numel() * 4 for parameter in engine.model.parameters.values()) / MIB
    save(engine, f"{folder}/run")
    found.append(peak_mib() - before)
    del engine
    gc.collect()  # FSDP2's modules refer to each other
    libc.malloc_trim(0)
    load(MODEL, f"{folder}/run")
    return [own, *found, peak_mib() - before]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of memory")
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_holds_more_than_its_part_and_a_tensor_while_it_builds_saves_and_loads(name, tmp_path):
    end_processes()  # tensors would lie in holes of the heap that earlier tests have left
    for own, *grown in run_ranks(measured, RANKS, LAYOUTS[name], str(tmp_path)):
        assert max(grown) < own + LARGEST + 3, grown  # of 48 MiB; small objects and files' headers take up to 1
