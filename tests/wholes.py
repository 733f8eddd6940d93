"""What the ranks hold together: the whole values of tensors of which each has its part."""

import io
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.placement import Part, placement_of


def wholes(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wholes of tensors that are each named `PARAMETER` or `KIND/PARAMETER`, on every rank.

    All ranks of the process group, where there is one, call this together.
    """
    return assembled({name: placement_of(parameters[name.split("/")[-1]]).part(tensor)
                      for name, tensor in tensors.items()})


def assembled(mine: Mapping[str, Part]) -> dict[str, Tensor]:
    """The tensors that the ranks' parts make up; every element has to be on one of them, and alike where on several."""
    of_all_ranks = [dict(mine)]
    if dist.is_initialized():
        file, files = io.BytesIO(), [b""] * dist.get_world_size()
        torch.save(dict(mine), file)  # as one: each by itself takes several times as long
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
    assert not any(tensor.isnan().any() for tensor in whole.values()), "some rank holds each element"
    return whole
