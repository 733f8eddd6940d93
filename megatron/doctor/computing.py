"""Checks the GPUs, the speed of memory and of matrix products, and which presets fit. Needs PyTorch."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from statistics import median

import torch

from megatron.config import Config
from megatron.config.command_line import parse
from megatron.config.reading.presets import PRESETS
from megatron.doctor.finding import NOTE, OK, WRONG, Finding
from megatron.doctor.machine import available_memory
from megatron.log import number_of
from megatron.plan.gpus import MATRIX_SHARE
from megatron.plan.memory import peak_memory
from megatron.plan.rank import Rank
from megatron.train.setup.peak import measured_peak_flops
from megatron.train.setup.precision import precision_here

_GIB = 2**30
_COPIED_BYTES, _NUM_COPIES = 1 << 27, 5
SWISS_PROT_RESIDUES, A_DAY_S = 2e8, 86_400
_ROOM = 0.9  # the share of a device's memory that a run may use


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def gpus() -> Iterator[Finding]:
    """Reports each GPU that PyTorch sees or, if it sees none but the system has some, why."""
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    driver = _driver_says("--query-gpu=driver_version")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    yield Finding(OK, f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}, NCCL {nccl}")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        name = (f"GPU {number}: {facts.name}, {total / _GIB:.0f} GiB, compute capability {facts.major}.{facts.minor}, "
                f"{facts.multi_processor_count} multiprocessors")
        if (facts.major, facts.minor) < (8, 0):
            yield Finding(NOTE, f"{name}: older than Ampere, so no fused attention, no bf16 and no Triton kernels")
        elif free < _ROOM * total:
            yield Finding(NOTE, f"{name}: {(total - free) / _GIB:.1f} GiB are taken by others", "nvidia-smi")
        else:
            yield Finding(OK, name)


def _no_gpu() -> Finding:
    """The finding if PyTorch sees no GPU."""
    seen = _driver_says("--query-gpu=name")
    if not seen:
        return Finding(OK, "no GPU: presets for a CPU are small ones")
    if torch.version.cuda is None:
        return Finding(WRONG, f"nvidia-smi shows {seen}, and PyTorch {torch.__version__} is built for CPUs",
                       "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128")
    return Finding(WRONG, f"nvidia-smi shows {seen}, and PyTorch for CUDA {torch.version.cuda} cannot use it: the "
                   "driver is older than that, or CUDA_VISIBLE_DEVICES hides it",
                   "nvidia-smi; echo $CUDA_VISIBLE_DEVICES")


def _driver_says(query: str) -> str:
    """The first line of nvidia-smi's answer to a query; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return ""
    said = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False,
                          timeout=20)
    return next(iter(said.stdout.splitlines()), "") if said.returncode == 0 else ""


def speed() -> Iterator[Finding]:
    """Reports the memory bandwidth, the speed of matrix products in fp32 and bf16, and what --precision auto takes."""
    where = device()
    yield Finding(OK, f"memory of {where.type}: {copied_gb_per_s(where):.0f} GB/s read and written, copying")
    fp32, bf16 = (_flops(peak(dtype)) for dtype in (torch.float32, torch.bfloat16))
    chosen, why = precision_here(parse(["--preset", "demo"])[0])
    yield Finding(OK, f"matrix products on {_threads()}: {fp32} in fp32, {bf16} in bf16; --precision auto takes "
                  f"{chosen}: {why}")


def copied_gb_per_s(where: torch.device) -> float:
    """The memory bandwidth of copying a tensor, read and written bytes together, in GB/s."""
    source = torch.ones(_COPIED_BYTES // 4, device=where)
    target, times = torch.empty_like(source), []
    for _ in range(_NUM_COPIES + 1):  # the first touches new memory
        began_s = time.perf_counter()
        target.copy_(source)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        times.append(time.perf_counter() - began_s)
    return 2 * _COPIED_BYTES / median(times[1:]) / 1e9


@cache
def peak(dtype: torch.dtype) -> float:
    """The FLOP/s of matrix products in a dtype, measured as at the start of a run."""
    config = parse(["--preset", "demo"])[0]
    return measured_peak_flops(dtype, device(), 4096, config.model)


def presets() -> Iterator[Finding]:
    """Reports which presets fit on one device, and their estimated speed: FLOPs at a share of the measured peak."""
    where = device()
    room = _ROOM * (torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else available_memory())
    best_flops = max(peak(dtype) for dtype in (torch.float32, torch.bfloat16))
    fitting, large = [], []
    for name in PRESETS:
        config = one_row(name)
        rank = Rank(config, 1)
        needed = peak_memory(rank).peak
        per_s = (config.data.seq_length or 0) * best_flops * MATRIX_SHARE / sum(stage.flops for stage in rank.stages)
        if needed > room:
            large.append((name, needed))
        else:
            fitting.append((per_s, name, needed))
    fitting.sort(reverse=True)
    within_a_day = [item for item in fitting if item[0] * A_DAY_S >= SWISS_PROT_RESIDUES]
    if within_a_day:
        per_s, name, needed = within_a_day[-1]
        yield Finding(OK, f"{name} is the largest preset that goes over Swiss-Prot (200 M residues) in a day here: "
                      f"some {per_s:,.0f} tokens/s, {needed / _GIB:.1f} GiB",
                      f"PRESET={name} bash examples/pretrain_tape.sh --micro-batch-size 1")
    else:
        yield Finding(NOTE, f"no preset goes over Swiss-Prot (200 M residues) in a day here, demo with some "
                      f"{fitting[0][0] if fitting else 0:,.0f} tokens/s", "PRESET=demo bash examples/pretrain_tape.sh")
    if fitting:
        yield Finding(OK, f"fit into {room / _GIB:.1f} GiB, a row at a time, with tokens/s of one device: " + ", ".join(
            f"{name} {per_s:,.0f}" for per_s, name, _ in fitting))
    if large:
        yield Finding(OK, "are too large for one device: " + ", ".join(
            f"{name} {needed / _GIB:.0f} GiB" for name, needed in large),
            f"python tools/plan_layout.py --preset {large[0][0]} --gpus 8 --gpu h100-80gb --global-batch-size 2048")


def one_row(preset: str) -> Config:
    """The configuration of a preset on a single device with one row at a time."""
    return parse(["--preset", preset, "--micro-batch-size", "1", "--global-batch-size", "1"])[0]


def _threads() -> str:
    return "the GPU" if torch.cuda.is_available() else number_of(torch.get_num_threads(), "thread")


def _flops(value: float) -> str:
    return re.sub(r"\.0$", "", f"{value / 1e9:.1f} GFLOP/s" if value < 1e12 else f"{value / 1e12:.1f} TFLOP/s")
