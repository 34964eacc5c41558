"""The benchmark of picture coders."""

import numpy as np
import torch

from masksl.bench import pictures


def test_maps_of_a_mosaic_are_side_by_side() -> None:
    maps = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    whole = pictures.mosaic(maps)
    assert whole.shape == (4, 6)
    assert np.array_equal(whole[:2, 2:4], maps[0, 1])
    assert np.array_equal(whole[2:, :2], maps[1, 0])
    assert pictures.mosaic(maps[:1]).shape == (4, 4)  # one place is empty


def test_picture_coders_stay_below_the_error_of_ec() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(4, 8, 16, 16, generator=generator).relu()
    low, found = pictures._bits(tensor, (0.2, 0.4))
    assert low["ec"] and found["ec"] and low["ec"] > found["ec"]
    assert found["ec"] and "JPEG" in found and len(found) >= 2
    for name, bits in found.items():
        if name != "ec" and bits is not None:
            files = list(pictures._files(name, tensor))
            least = min(size for size, error in files if error <= 0.4)
            assert bits >= 8 * least / tensor.numel()
