"""What GPUs can do, from their vendors' data sheets, and what share of it a training step is assumed to get.

Sources: NVIDIA's data sheets of A100 (SXM4), H100 and H200 (SXM5), HGX B200, L40S, V100 (SXM2) and, for the RTX 4090,
the Ada architecture white paper. Peaks are of dense matrices with fp32 accumulation. The network is that of the systems
that they are sold in (DGX: a 200 Gbit/s adapter for each A100, 400 for each H100, H200 and B200, 100 for two V100); for
L40S and RTX 4090, whose hosts differ, 100 and 25 Gbit/s a GPU are assumed.
"""

from dataclasses import dataclass

from megatron.config import PrecisionConfig
from megatron.errors import ConfigError

# Assumptions: they have not been compared with the times of an H200 in benchmarks/RESULTS.md.
MATRIX_SHARE = 0.6  # of the peak, that large matrix products reach
BANDWIDTH_SHARE = 0.8  # of memory's and links' bandwidth


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in GiB, peaks in TFLOP/s, bandwidths in GB/s, those of links for one direction.

    `half_tflops` is bf16's and fp16's; `has_fused`: whether bf16 and fused attention are there, as from compute
    capability 8.0 on. `link` connects the GPUs of a node (NVLink, or PCIe where there is none), `network` is each one's
    share of the node's adapters.
    """

    memory_gib: int
    half_tflops: float
    fp32_tflops: float
    memory_bandwidth: float
    link: float
    network: float
    has_fused: bool = True


GPUS = {
    "a100-40gb": Gpu(40, 312, 19.5, 1555, 300, 25),
    "a100-80gb": Gpu(80, 312, 19.5, 2039, 300, 25),
    "h100-80gb": Gpu(80, 989, 67, 3350, 450, 50),
    "h200-141gb": Gpu(141, 989, 67, 4800, 450, 50),
    "b200-180gb": Gpu(180, 2250, 80, 8000, 900, 50),
    "l40s-48gb": Gpu(48, 362, 91.6, 864, 32, 12.5),
    "v100-32gb": Gpu(32, 125, 15.7, 900, 150, 6.25, has_fused=False),
    "rtx4090-24gb": Gpu(24, 165, 82.6, 1008, 32, 3.125),
}


def gpu_named(name: str) -> Gpu:
    """The GPU; raises ConfigError for one that is not known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; give one of {', '.join(GPUS)}")
    return GPUS[name]


def peak_flops(name: str, precision: PrecisionConfig) -> float:
    """FLOP/s at most in the dtype of activations; raises ConfigError where the GPU does not have it."""
    gpu, is_half = gpu_named(name), precision.fp16 or precision.bf16
    if not gpu.has_fused:
        raise ConfigError(f"--gpu {name} is from before compute capability 8.0: no fused attention runs on it, and "
                          "what attention by protein keeps is not counted; give another --gpu")
    return (gpu.half_tflops if is_half else gpu.fp32_tflops) * 1e12
