"""Memory that encoding takes beside its input."""

from typing import Any

import torch

from masksl.compress import make
from tests.codec.test_frames import memory
from tests.conftest import run_alone

CASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("qu", {"bits": 3}),
    ("qu", {"bits": 12, "rounding": "stochastic"}),
    ("qq", {}),
    ("fp", {}),
    ("sp", {}),
    ("sp", {"positions": "auto", "scope": "sample"}),
    ("rt", {}),
    ("rt", {"scope": "sample"}),
    ("ms", {}),
    ("ms", {"scope": "sample", "lossless": "context"}),
    ("ec", {}),
    ("ec", {"context": "none"}),
    ("ec", {"bits": 2.32}),
]
# Bytes that the interpreter itself may take meanwhile: some pages.
SLACK = 2**16


def check() -> None:
    """Encode with every compressor; at most three times the tensor may be taken."""
    torch.set_num_threads(1)
    for signed in (False, True):
        tensor = torch.randn(256, 64, 16, 16)
        if not signed:
            tensor.relu_()
        for name, options in CASES:
            compressor = make(name, **options)
            compressor.encode(tensor[:16])  # what is loaded and kept at first use
            before = memory("VmRSS", reset_peak=True)
            frame = compressor.encode(tensor)
            extra = memory("VmHWM") - before
            assert 0 < extra <= 3 * tensor.nbytes + SLACK, (
                name,
                options,
                signed,
                extra,
            )
            del frame
    check_masks()


def check_masks() -> None:
    """Encode masks; the levels of a reference take two bytes an element."""
    chance = torch.rand(256, 64, 16, 16)
    mask, known = chance < 0.1, chance < 0.11
    for code, reference, most in (
        ("packed", None, 3),
        ("auto", None, 0.5),
        ("auto", known, 3),
        ("auto", known.byte(), 3),
    ):
        compressor = make("mask", code=code)
        part = None if reference is None else reference[:16]
        compressor.encode(mask[:16], reference=part)
        before = memory("VmRSS", reset_peak=True)
        frame = compressor.encode(mask, reference=reference)
        extra = memory("VmHWM") - before
        assert 0 < extra <= most * mask.nbytes + SLACK, (
            code,
            reference is not None,
            extra,
        )
        del frame


def test_encoding_takes_at_most_three_times_the_tensor() -> None:
    run_alone("tests.test_memory")


if __name__ == "__main__":
    check()
