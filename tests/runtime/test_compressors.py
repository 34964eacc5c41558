"""Compressors of a run: what is compiled or loaded before its first round."""

import pytest

from masksl.compress import Compressor
from masksl.methods.client import Setup
from tests.conftest import settings_of


def test_clients_warm_up_the_compressors_of_all_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm: list[str] = []
    monkeypatch.setattr(Compressor, "warm_up", lambda self: warm.append(self.name))
    chosen = "compressor=qu", "gradient_compressor=qsgd", "model_compressor=sp"
    Setup.of(settings_of(*chosen, "seed=7"))
    assert warm == ["qu", "qsgd", "sp"]
