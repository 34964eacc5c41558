"""The benchmark of the compressors."""

import pytest
import torch

from masksl.bench import compress as bench
from masksl.compress import decode, make


def test_rows_are_complete(device: str) -> None:
    rows = bench.measure(1, device, sizes=(2,))
    assert len(rows) == 2 * (len(bench.CASES) + 1) + 1  # a copy, no signs in one
    for row in rows:
        assert row["factor"] == pytest.approx(4 * row["elements"] / row["bytes"])
        assert row["encode_ms"] > 0
    bench.show(rows, device)


def test_straightforward_version_gives_what_ms_gives() -> None:
    tensor = torch.randn(8, 64, 16, 16).relu()
    sent = bench.straightforward_encode(tensor, tensor.numel() // 100)
    plain = bench.straightforward_decode(*sent, tensor.shape)
    torch.testing.assert_close(plain, decode(make("ms").encode(tensor)))
