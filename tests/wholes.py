"""Assembles whole tensors from the parts that the ranks hold."""

import io
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.placement import Part, placement_of


def wholes(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on every rank; each is named `PARAMETER` or `KIND/PARAMETER` and split as that parameter.

    A collective: all ranks of the process group, if there is one, call it together.
    """
    return assembled({name: placement_of(parameters[name.split("/")[-1]]).part(tensor)
                      for name, tensor in tensors.items()})


def assembled(mine: Mapping[str, Part]) -> dict[str, Tensor]:
    """The whole tensors, on every rank, from the parts of all ranks (an all-gather).

    Asserts that each element is on at least one rank, and the same on all ranks that hold it.
    """
    of_all_ranks = [dict(mine)]
    if dist.is_initialized():
        file, files = io.BytesIO(), [b""] * dist.get_world_size()
        torch.save(dict(mine), file)  # in one file: one per tensor takes several times as long
        dist.all_gather_object(files, file.getvalue())
        of_all_ranks = [torch.load(io.BytesIO(content), weights_only=False) for content in files]
    whole: dict[str, Tensor] = {}
    for parts in of_all_ranks:
        for name, part in parts.items():
            if name not in whole:
                whole[name] = torch.full(part.whole_shape, torch.nan, dtype=part.tensor.dtype)
            there = whole[name][part.box]
            assert there.isnan().all() or torch.equal(there, part.tensor), f"{name} is not the same on all ranks"
            whole[name][part.box] = part.tensor
    assert not any(tensor.isnan().any() for tensor in whole.values()), "no rank holds some elements"
    return whole
