"""The switches of PyTorch that flags ask for are set, or the flags are refused."""

import os

import pytest
import torch

from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.parallel.mesh import Mesh
from megatron.train.setup import pytorch
from megatron.train.setup.pytorch import configure_pytorch


def test_tf32_is_set_where_it_is_asked_for_and_refused_without_a_gpu_that_has_it(monkeypatch):
    config, _ = parse(["--preset", "esm2-8m", "--micro-batch-size", "1", "--tf32"])
    with pytest.raises(ConfigError, match="--tf32 needs a GPU of compute capability 8.0 .* is on cpu"):
        configure_pytorch(config, Mesh())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    before = torch.get_float32_matmul_precision()
    try:
        configure_pytorch(config, Mesh(device=torch.device("cuda")))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ConfigError, match="on cuda; leave it out"):
        configure_pytorch(config, Mesh(device=torch.device("cuda")))


def test_deterministic_mode_asks_pytorch_for_one_order_on_gpus_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    gpu, flags = Mesh(device=torch.device("cuda")), ["--preset", "esm2-8m", "--micro-batch-size", "1"]
    asked, plain = parse([*flags, "--deterministic-mode"])[0], parse(flags)[0]
    try:
        for config, mesh in ((plain, gpu), (asked, Mesh())):
            configure_pytorch(config, mesh)
            assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        configure_pytorch(asked, gpu)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_flash_attention_is_set_where_it_is_installed_and_refused_elsewhere(monkeypatch):
    def config(asked):
        return parse(["--preset", "esm2-8m", "--micro-batch-size", "1", "--flash-attention", asked])[0]

    gpu, activated = Mesh(device=torch.device("cuda")), []
    configure_pytorch(config("FA2"), Mesh())
    with pytest.raises(ConfigError, match="--flash-attention FA3 is for GPUs, and this run is on cpu; leave it out"):
        configure_pytorch(config("FA3"), Mesh())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match="FA4 needs a GPU of compute capability 9.0 or 10.0, and this one has 8.0"):
        configure_pytorch(config("FA4"), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ConfigError, match="FA3 cannot be loaded .*flash_attn_interface.*package flash_attn_3"):
        configure_pytorch(config("FA3"), gpu)
    monkeypatch.setattr(pytorch, "activate_flash_attention_impl", activated.append)
    configure_pytorch(config("FA4"), gpu)
    assert activated == ["FA4"]
