"""A compressor from outside the package: one class, one YAML file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from masksl.engine import ENGINES
from masksl.runtime import results
from tests.conftest import ROOT

MODULE = '''
"""A compressor that sends every element as its sign and the mean magnitude."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch

from masksl.codec import wire
from masksl.codec.bits import pack_bits, packed_size, unpack_bits
from masksl.compress import Compressor, register


@register
@dataclass(frozen=True)
class Sign(Compressor):
    """One bit an element."""

    name: ClassVar[str] = "signs"
    scale: float = 1.0

    def pack(self, flat, shape, bounds, *, seed, training):
        mean = self.scale * flat.abs().mean().item()
        bits = pack_bits((flat > 0).view(torch.uint8), 1)
        return struct.pack("<d", mean), [bits]

    @classmethod
    def unpack(cls, header, payload, device):
        (mean,) = header.unpack_params(struct.Struct("<d"))
        wire.check_payload(header, payload, packed_size(header.elements, 1))
        packed = wire.to_tensor(payload, torch.uint8, device)
        return unpack_bits(packed, header.elements, 1).float() * 2 * mean
'''


@pytest.mark.slow  # an example is one, too
@pytest.mark.parametrize("engine", ENGINES)
def test_a_compressor_of_ones_own(engine: str, tmp_path: Path) -> None:
    (tmp_path / "one_bit.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "conf/compressor").mkdir(parents=True)
    file = tmp_path / "conf/compressor/signs.yaml"
    file.write_text("name: signs\nscale: 1.5\n", encoding="utf-8")
    overrides = (
        f"engine={engine}",
        f"hydra.searchpath=[file://{tmp_path}/conf]",
        "plugins=[one_bit]",
        "compressor=signs",
        "rounds=1",
        "clients=2",
        "dataset.limit=60",
        f"hydra.run.dir={tmp_path}/run",
    )
    done = subprocess.run(
        [sys.executable, "-m", "masksl.main", *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    summary = results.read_summary(tmp_path / "run")
    assert summary["compressor"] == "signs"
    assert 1.0 < summary["bits_per_element"] < 1.1
