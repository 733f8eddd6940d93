"""What megatron-core's own program (tests/megatron_core/program.py) wrote and computed, and how it runs again."""

import enum
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import torch

from megatron.checkpoint.convert.megatron_core import distributed, ranks
from megatron.config import ModelConfig, PrecisionConfig
from megatron.kernels.packed_sequence import PackedSequence
from megatron.model.protein_model import ProteinModel

PROGRAM = Path(__file__).resolve().parent / "megatron_core" / "program.py"
ORACLE = os.environ.get("MEGATRON_CORE_PYTHON", sys.executable)
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 2))  # over tensor and pipeline ranks
FORMS = {**{f"split_{tensor}_{pipeline}": ranks for tensor, pipeline in SPLITS}, "stacked": distributed,
         "stacked_2_2": distributed, "layers_2_2": distributed}
ITERATION = "iter_0000007"
FILE = Path(ITERATION) / "mp_rank_00" / "model_optim_rng.pt"


def unpack(place):
    """A folder a form, `whole.pt` (the state dict of one rank) and `logits.npz`."""
    with tarfile.open(PROGRAM.parent / "recorded.tar.xz") as files:
        files.extractall(place)  # without a filter, which Python before 3.11.4 has not: the file is our own
    return place


def is_installed():
    asked = "from importlib.metadata import distribution as d; d('megatron-core'); d('psutil')"
    return subprocess.run([ORACLE, "-c", asked], capture_output=True).returncode == 0


def run(*arguments):
    """Run megatron-core's program."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ORACLE, PROGRAM, *map(str, arguments)], env=environment, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def our_model(checkpoint, **changes):
    flags = checkpoint.state["config"] | changes
    config = ModelConfig(**{name: value for name, value in flags.items() if name in ModelConfig.__dataclass_fields__})
    words = checkpoint.model["embedding.word_embeddings.weight"]
    model = ProteinModel(config, PrecisionConfig(), padded_vocab_size=words.shape[0]).eval()
    model.load_state_dict({name: tensor.read() for name, tensor in checkpoint.model.items()}, strict=True)
    return model


@torch.no_grad()
def our_logits(model, place):
    """Of the recorded proteins, packed in one line; megatron-core saw one at a time."""
    numbers = np.load(place / "logits.npz")
    lengths = torch.from_numpy(numbers["lengths"])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequence = PackedSequence(torch.from_numpy(numbers["ids"]), positions, cu_seqlens, int(lengths.max()), num_filler=0)
    return model.logits(model.hidden(sequence)).numpy()


def let_torch_load(monkeypatch):
    """Stand in for the one class of megatron-core in its arguments, so that torch.load can be the oracle."""
    for name in ("megatron.core", "megatron.core.transformer", "megatron.core.transformer.enums"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    enums = sys.modules["megatron.core.transformer.enums"]
    enums.AttnBackend = enum.Enum("AttnBackend", "flash fused unfused local auto", module=enums.__name__)


def edited(path, edit):
    """Change what the file at `path` holds; after `let_torch_load`."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)
