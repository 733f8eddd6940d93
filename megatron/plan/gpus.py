"""Peak performance of GPUs from their data sheets, and the share of it that a training step is assumed to reach.

Sources: NVIDIA's data sheets of A100 (SXM4), H100 and H200 (SXM5), HGX B200, L40S, V100 (SXM2) and, for the RTX 4090,
the Ada architecture white paper. Peaks are for dense matrices with fp32 accumulation (for FP8 and TF32 the sheets give
twice as much, with sparsity). The network is that of NVIDIA's DGX systems (a 200 Gbit/s adapter for each A100, 400 for
each H100, H200 and B200, 100 for two V100); for L40S and RTX 4090, whose hosts differ, 100 and 25 Gbit/s for each GPU
are assumed.
"""

from dataclasses import dataclass

from megatron.config import PrecisionConfig
from megatron.errors import ConfigError
from megatron.kernels.fp8 import least_capability, recipe_of

# Assumptions, not compared with the times of an H200 in benchmarks/RESULTS.md.
MATRIX_SHARE = 0.6  # the share of the peak that large matrix products reach
BANDWIDTH_SHARE = 0.8  # the share of the bandwidth of memory and links that is reached


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in GiB, peaks in TFLOP/s, bandwidths in GB/s (of links, in one direction).

    `half_tflops`: for bf16 and fp16. A peak of 0 means that the GPU does not support it. `link`: between the GPUs of a
    node, by NVLink, or PCIe without NVLink. `network`: each GPU's share of the node's network adapters.
    """

    name: str
    capability: tuple[int, int]
    memory_gib: int
    fp8_tflops: float
    half_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_bandwidth: float
    link: float
    network: float


GPUS = {gpu.name: gpu for gpu in (
    Gpu("a100-40gb", (8, 0), 40, 0, 312, 156, 19.5, 1555, 300, 25),
    Gpu("a100-80gb", (8, 0), 80, 0, 312, 156, 19.5, 2039, 300, 25),
    Gpu("h100-80gb", (9, 0), 80, 1979, 989, 494, 67, 3350, 450, 50),
    Gpu("h200-141gb", (9, 0), 141, 1979, 989, 494, 67, 4800, 450, 50),
    Gpu("b200-180gb", (10, 0), 180, 4500, 2250, 1125, 80, 8000, 900, 50),
    Gpu("l40s-48gb", (8, 9), 48, 733, 362, 183, 91.6, 864, 32, 12.5),
    Gpu("v100-32gb", (7, 0), 32, 0, 125, 0, 15.7, 900, 150, 6.25),
    Gpu("rtx4090-24gb", (8, 9), 24, 330, 165, 82.6, 82.6, 1008, 32, 3.125),
)}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`; raises ConfigError if it is unknown."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; give one of {', '.join(GPUS)}")
    return GPUS[name]


def peak_tflops(gpu: Gpu, precision: PrecisionConfig) -> float:
    """The peak of products in the dtype of activations; raises ConfigError if the GPU does not support the precision.
    """
    recipe = recipe_of(precision)
    if gpu.capability < (8, 0):
        raise ConfigError(f"--gpu {gpu.name} is from before compute capability 8.0: no fused attention runs on it, and "
                          "what attention by protein keeps is not counted; give another --gpu")
    if recipe is not None and gpu.capability < (needed := least_capability(recipe)):
        raise ConfigError(f"--fp8 {precision.fp8} with --fp8-recipe {precision.fp8_recipe} needs compute capability "
                          f"{needed[0]}.{needed[1]}, and --gpu {gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}; "
                          "leave it out, or give another --gpu")
    of_fp32 = gpu.tf32_tflops if precision.tf32 else gpu.fp32_tflops
    return gpu.half_tflops if precision.fp16 or precision.bf16 else of_fp32
