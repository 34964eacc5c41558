"""The benchmark of FedPM's codes."""

import pytest

from masksl.bench import masks


def test_rows_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "NETWORK", "conv4_16")
    rows = masks.measure(1)
    bits = {(row["coded"], row["by"]): row["bits"] for row in rows}
    coded = [bits["mask", by] for by in ("global", "theta", "dither")]
    assert coded == sorted(coded, reverse=True) and coded[0] < 1.01
    assert bits["mask", "layer"] < 1.01
    coded = [bits["votes", by] for by in ("full", "previous", "dither")]
    assert coded == sorted(coded, reverse=True)
    assert len(rows) == 7
    masks.show(rows)
