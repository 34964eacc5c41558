"""The benchmark of FLASH's masks."""

import pytest

from masksl.bench import pruning


def test_rows_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "NETWORK", "resnet8")
    rows = pruning.measure(1)
    assert [row["times"] for row in rows] == [16, 16, 1, 1, 1]
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in rows)
    assert rows[0]["share"] == 1
    pruning.show(rows)
