"""Encoding on a GPU waits for it twice a frame, decoding not at all.

So it is without a lossless stage, which works on the host. Where there is no GPU,
PyTorch's fake tensors stand for it: they know every operation and no values, so that
what would have to wait for a value raises, and every copy between devices is seen.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from masksl.codec import topk
from masksl.compress import COMPRESSORS, decode, make

SHAPE = (8, 16, 6, 6)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("none", {"values": "bfloat16"}),
    ("qu", {}),
    ("qu", {"bits": 12}),
    ("qq", {}),
    ("fp", {}),
    ("sp", {}),
    ("sp", {"sparsity": 0.99, "scope": "sample", "values": "float16"}),
    ("ms", {}),
    ("ms", {"rounding": "floor", "values": "bfloat16"}),
]
# These wait once in decoding, or count symbols on the host in a way that fakes cannot.
ENCODED: list[tuple[str, dict[str, Any]]] = [
    ("ms", {"scope": "sample"}),
    ("ms", {"bits": 3}),
]


BOUNDS = [0.0, 1.0]  # what the fake tensors say theirs are


class Crossings(TorchDispatchMode):
    """Takes down every copy between devices that the host waits for.

    Copies to a device from pinned memory that need not wait are none.
    """

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            before, after = args[0].device.type, result.device.type
            free = after == "cuda" and kwargs.get("non_blocking") and args[0] in PINNED
            if before != after and not free:
                self._waits.append(f"{before} to {after}")
        return result


class _Pinned(list):
    """Tensors that are in pinned memory, by identity."""

    def __contains__(self, tensor: object) -> bool:
        return any(each is tensor for each in self)


PINNED = _Pinned()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let fake tensors tell bounds and bytes; return what the host waited for."""
    waited: list[str] = []
    empty = torch.empty

    def make_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Any:
        made = empty(*size, **options)  # there is nothing to pin without a GPU
        return pin(made) if pin_memory else made

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        PINNED.append(tensor)
        return tensor

    def bounds(_: torch.Tensor) -> list[float]:
        waited.append("bounds")
        return list(BOUNDS)

    def content(tensor: torch.Tensor) -> np.ndarray:
        assert not tensor.is_cuda
        return np.zeros(tensor.nbytes, np.uint8)

    PINNED.clear()
    monkeypatch.setattr(torch, "empty", make_empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(FakeTensor, "tolist", bounds)
    monkeypatch.setattr(FakeTensor, "numpy", content, raising=False)
    return waited


def test_fake_tensors_refuse_to_wait() -> None:
    with FakeTensorMode():
        values = torch.empty(10, device="cuda")
        with pytest.raises(DataDependentOutputException):
            values.amin().item()
        with pytest.raises(DynamicOutputShapeException):
            topk.positions(values > 0)


@pytest.mark.parametrize("case", CASES + ENCODED, ids=str)
@pytest.mark.parametrize("lowest", (0.0, -1.0))
def test_encoding_waits_twice(
    case: tuple[str, dict[str, Any]], lowest: float, waits: list[str]
) -> None:
    """For the bounds and for the payload, whatever there is in it."""
    name, options = case
    compressor = make(name, **options)
    real = torch.rand(SHAPE).add_(lowest)
    frame = compressor.encode(real)
    BOUNDS[:] = lowest, 1.0
    with FakeTensorMode(), Crossings(waits):
        encoded = compressor.encode(torch.empty(SHAPE, device="cuda"))
    assert waits == ["bounds", "cuda to cpu"]
    assert len(encoded) == len(frame)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("lowest", (0.0, -1.0))
def test_decoding_waits_for_nothing(
    case: tuple[str, dict[str, Any]], lowest: float, waits: list[str]
) -> None:
    name, options = case
    frame = make(name, **options).encode(torch.rand(SHAPE).add_(lowest))
    with FakeTensorMode(), Crossings(waits):
        decoded = decode(frame, device="cuda")
    assert decoded.is_cuda and decoded.shape == SHAPE
    assert not waits


@pytest.mark.parametrize("rows", (1, 6))
@pytest.mark.parametrize("k", (1, 7, 100, 240))
@pytest.mark.parametrize("kinds", (2, 5, 10**6))
def test_what_is_selected_on_a_device_is_the_same(
    rows: int, k: int, kinds: int
) -> None:
    magnitude = torch.randint(kinds, (rows, 240)).float()
    # pylint: disable-next=protected-access
    selected = topk._largest_on_device(magnitude, k)
    torch.testing.assert_close(selected, topk.largest(magnitude, k), rtol=0, atol=0)


def test_every_compressor_that_computes_on_a_device_is_tested_here() -> None:
    """`ec` is coded on the host, and `rt` draws: no generator without a device.

    `sign`, `qsgd` and `drive` draw, too, and add up on the host. `mask` is tested with
    both of its ways. `spsign` looks for its magnitudes on the host.
    """
    assert set(COMPRESSORS) - {name for name, _ in CASES} == {
        "ec",
        "rt",
        "mask",
        "spsign",
        "sign",
        "qsgd",
        "drive",
    }


@pytest.mark.parametrize("shape", [(7,), SHAPE])
def test_packed_masks_wait_twice_and_then_for_nothing(
    shape: tuple[int, ...], waits: list[str]
) -> None:
    compressor = make("mask", code="packed")
    frame = compressor.encode(torch.rand(shape) < 0.5)
    with FakeTensorMode(), Crossings(waits):
        empty = torch.empty(shape, dtype=torch.bool, device="cuda")
        assert len(compressor.encode(empty)) == len(frame)
        assert waits == ["bounds", "cuda to cpu"]
        decoded = decode(frame, device="cuda")
    assert decoded.is_cuda and decoded.shape == shape and decoded.dtype == torch.bool
    assert len(waits) == 2


def test_masks_are_coded_on_the_host_and_come_back(device: str) -> None:
    """With a mask and its reference on any device."""
    mask, reference = torch.rand(SHAPE) < 0.1, torch.rand(SHAPE) < 0.1
    before = mask ^ (reference & (torch.rand(SHAPE) < 0.1))
    for given in (None, before):
        frame = make("mask").encode(mask, reference=given)
        there = given if given is None else given.to(device)
        assert make("mask").encode(mask.to(device), reference=there) == frame
        decoded = decode(frame, device=device, reference=there)
        assert decoded.device.type == device and torch.equal(decoded.cpu(), mask)
