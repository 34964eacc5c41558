"""Encoding and decoding on a GPU wait for it twice a frame at most.

Without one, PyTorch's fake tensors stand for it: they know every operation and no
values, so that whatever would have to wait for a value raises.
"""

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from masksl import topk, wire
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


def test_fake_tensors_refuse_to_wait() -> None:
    with FakeTensorMode():
        values = torch.empty(10, device="cuda")
        with pytest.raises(DataDependentOutputException):
            values.amin().item()
        with pytest.raises(DynamicOutputShapeException):
            topk.positions(values > 0)


@pytest.mark.parametrize("case", CASES + ENCODED, ids=str)
@pytest.mark.parametrize("lowest", (0.0, -1.0))
def test_packing_waits_for_nothing(
    case: tuple[str, dict[str, Any]], lowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that finding the bounds and fetching the payload are the two waits."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    name, options = case
    compressor = make(name, **options)
    real = torch.rand(SHAPE).mul_(1 - lowest).add_(lowest)
    real.view(-1)[:2] = torch.tensor([lowest, 1.0])
    frame = compressor.encode(real)
    with FakeTensorMode():
        flat = torch.empty(math.prod(SHAPE), device="cuda")
        bounds = lowest, 1.0
        params, parts = compressor.pack(flat, SHAPE, bounds, seed=0, training=True)
    header, payload = wire.parse(frame)
    assert params == header.params
    assert all(part.is_cuda for part in parts if isinstance(part, torch.Tensor))
    sizes = [part.nbytes for part in parts if isinstance(part, torch.Tensor)]
    assert sum(sizes) == len(payload)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("lowest", (0.0, -1.0))
def test_decoding_waits_for_nothing(
    case: tuple[str, dict[str, Any]], lowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    name, options = case
    frame = make(name, **options).encode(torch.rand(SHAPE).add_(lowest))
    with FakeTensorMode():
        decoded = decode(frame, device="cuda")
        assert decoded.is_cuda and decoded.shape == SHAPE


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
    """`ec` is coded on the host, and `rt` draws: no generator without a device."""
    assert set(COMPRESSORS) - {name for name, _ in CASES} == {"ec", "rt"}
