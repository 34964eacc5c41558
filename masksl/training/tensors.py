"""Tensors by name."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import xxhash
from torch import nn

Tensors = dict[str, torch.Tensor]


def tensors_of(module: nn.Module) -> Tensors:
    """Return the parameters and buffers of a module by name, detached, not copied."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


def copies(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return detached copies of tensors by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element of a tensor is infinite or NaN.

    A finite sum has finite terms alone, and takes the least time. If it is not, finite
    terms may have added up to infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if math.isfinite(tensor.sum()):
        return True
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))


def digest(tensors: Iterable[torch.Tensor]) -> int:
    """Return 64 bits by which copies of tensors are compared (XXH3)."""
    state = xxhash.xxh3_64()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().numpy())
    return state.intdigest()


def group(tensors: Mapping[str, torch.Tensor], name: str) -> Tensors:
    """Return the tensors named ``name/...``, without that prefix."""
    start = name + "/"
    return {
        key.removeprefix(start): tensor
        for key, tensor in tensors.items()
        if key.startswith(start)
    }


def grouped(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> Tensors:
    """Return the tensors of several groups, named ``group/name``."""
    return {
        f"{name}/{key}": tensor
        for name, members in groups.items()
        for key, tensor in members.items()
    }


def average(
    models: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensors:
    """Average tensors by name over clients.

    Parameters
    ----------
    models : Sequence[Mapping[str, torch.Tensor]]
        For each client its tensors (weights, gradients, buffers), all of one shape.
    weights : Sequence[int]
        Samples of each client.
    dtype : torch.dtype | None
        Type of the sums; by default that of each tensor. Sums of float32 in float64 are
        rounded once, so that equal tensors average to themselves, and are the same on
        every processor.

    Returns
    -------
    dict[str, torch.Tensor]
        The weighted mean of floating tensors. The maximum of integer ones (BatchNorm's
        ``num_batches_tracked``). The average of one client is that client's tensors
        themselves, untouched.
    """
    if len(models) == 1:
        return dict(models[0])
    total = sum(weights)
    averaged: Tensors = {}
    for name, first in models[0].items():
        tensors = [model[name] for model in models]
        if first.is_floating_point():
            mean = torch.zeros_like(first, dtype=dtype)
            for tensor, weight in zip(tensors, weights, strict=True):
                if dtype is None:
                    mean.add_(tensor, alpha=weight / total)
                else:  # a product, then a sum: processors may fuse the two above
                    mean.add_(tensor.to(dtype) * (weight / total))
            averaged[name] = mean.to(first.dtype)
        else:
            averaged[name] = torch.stack(tensors).amax(dim=0)
    return averaged
