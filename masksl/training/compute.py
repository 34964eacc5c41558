"""How networks compute: devices, precision, threads, seeded forks."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PRECISIONS = ("float32", "tf32", "bfloat16")


class ComputeConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """How networks compute; weights, activations and gradients stay float32.

    Parameters
    ----------
    precision : str
        Precision of products: ``float32``; ``tf32``, 10 bits of mantissa, on CUDA
        alone; ``bfloat16``, PyTorch's autocast.
    channels_last : bool
        Whether images are stored with their channels last.
    compile : bool
        Whether the server's network is compiled.
    """

    precision: Literal[PRECISIONS] = Field(  # type: ignore[valid-type]
        "float32", description=f"one of {', '.join(PRECISIONS)}"
    )
    channels_last: bool = Field(False, description="true or false")
    compile: bool = Field(False, description="true or false")

    @field_validator("compile")
    @classmethod
    def _suits_precision(cls, compile_: bool, info: ValidationInfo) -> bool:
        if compile_ and info.data.get("precision") == "tf32":  # unknown to the compiler
            raise PydanticCustomError("allowed", "false with precision tf32")
        return compile_

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """Return a batch in the memory format of the network."""
        if self.channels_last and images.dim() == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a forward pass."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


FLOAT32 = ComputeConfig()
"""Full precision in PyTorch's own memory format."""


@contextmanager
def compute(
    threads: int,
    device: torch.device,
    seed: int,
    config: ComputeConfig = FLOAT32,
) -> Iterator[None]:
    """Set what a result depends on: threads, and a seeded fork of the generators.

    Parameters
    ----------
    threads : int
        Threads of the CPU kernels; some gradients depend on their number.
    device : torch.device
        Device of the network.
    seed : int
        Seed of what layers draw from PyTorch's global generator (dropout).
    config : ComputeConfig
        Its ``precision`` says whether CUDA may round to TF32.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cuda = [device] if device.type == "cuda" else []
    kernels: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    roundings = [kernel.fp32_precision for kernel in kernels]
    for kernel in kernels:
        kernel.fp32_precision = "tf32" if config.precision == "tf32" else "ieee"
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.random.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
        for kernel, rounding in zip(kernels, roundings, strict=True):
            kernel.fp32_precision = rounding


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA if available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Return the hardware behind a device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
