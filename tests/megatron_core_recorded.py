"""Checkpoints and logits recorded from megatron-core, as an oracle, and how to run megatron-core itself again.

tests/megatron_core/program.py recorded them. Where megatron-core is installed, for this Python or for the one that the
variable MEGATRON_CORE_PYTHON names, `run` calls that program again.
"""

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
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 2))  # numbers of tensor and pipeline ranks
# The recorded forms of a checkpoint, and the module that reads each.
FORMS = {**{f"split_{tensor}_{pipeline}": ranks for tensor, pipeline in SPLITS}, "stacked": distributed,
         "stacked_2_2": distributed, "layers_2_2": distributed}
ITERATION = "iter_0000007"
FILE = Path(ITERATION) / "mp_rank_00" / "model_optim_rng.pt"


def unpack(place):
    """Unpack the recording into the folder `place`, and return it.

    It holds one folder for each of FORMS, whole.pt (the state dict of one rank) and logits.npz.
    """
    with tarfile.open(PROGRAM.parent / "recorded.tar.xz") as files:
        files.extractall(place)  # no filter: Python before 3.11.4 has none, and the file is our own
    return place


def is_installed():
    """Whether megatron-core and psutil are installed for the Python ORACLE."""
    asked = "from importlib.metadata import distribution as d; d('megatron-core'); d('psutil')"
    return subprocess.run([ORACLE, "-c", asked], capture_output=True).returncode == 0


def run(*arguments):
    """Run tests/megatron_core/program.py with these arguments by the Python ORACLE; asserts that it succeeds."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ORACLE, PROGRAM, *map(str, arguments)], env=environment, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def our_model(checkpoint, **changes):
    """Our model with the weights of a checkpoint, for evaluation; `changes` override its flags."""
    flags = checkpoint.state["config"] | changes
    config = ModelConfig(**{name: value for name, value in flags.items() if name in ModelConfig.__dataclass_fields__})
    words = checkpoint.model["embedding.word_embeddings.weight"]
    model = ProteinModel(config, PrecisionConfig(), padded_vocab_size=words.shape[0]).eval()
    model.load_state_dict({name: tensor.read() for name, tensor in checkpoint.model.items()}, strict=True)
    return model


@torch.no_grad()
def our_logits(model, place):
    """Our logits of the recorded proteins, packed into one row; megatron-core computed them one protein at a time."""
    numbers = np.load(place / "logits.npz")
    lengths = torch.from_numpy(numbers["lengths"])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequence = PackedSequence(torch.from_numpy(numbers["ids"]), positions, cu_seqlens, int(lengths.max()), num_filler=0)
    return model.logits(model.hidden(sequence)).numpy()


def let_torch_load(monkeypatch):
    """Let torch.load read megatron-core's files without it, by a stand-in for the one class in its arguments."""
    for name in ("megatron.core", "megatron.core.transformer", "megatron.core.transformer.enums"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    enums = sys.modules["megatron.core.transformer.enums"]
    enums.AttnBackend = enum.Enum("AttnBackend", "flash fused unfused local auto", module=enums.__name__)


def edited(path, edit):
    """Apply `edit` to the content of the file at `path` and save it; needs `let_torch_load` first."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)
