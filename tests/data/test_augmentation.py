"""Random crops, flips and boxes."""

import torch

from masksl.data.augmentation import centre_box, random_box, random_crop, random_flip


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.randint(1, 256, (50, 3, 6, 6), dtype=torch.uint8)
    cropped = random_crop(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2,) * 4)
    positions = set()
    for image, crop in zip(padded, cropped, strict=True):
        matching = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image[:, y : y + 6, x : x + 6], crop)
        ]
        assert matching
        positions.update(matching)
    assert len(positions) > 15


def test_about_half_of_the_images_are_flipped() -> None:
    images = torch.arange(400 * 4).view(400, 1, 1, 4)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).all(dim=(1, 2, 3))
    assert 150 < int(same.sum()) < 250
    assert torch.equal(flipped[~same], images[~same].flip(-1))


def test_random_boxes_lie_within_the_image() -> None:
    draws = torch.rand(200, 10, 4, generator=torch.Generator().manual_seed(0))
    for draw in draws.tolist():
        left, upper, right, lower = random_box(500, 333, draw)
        assert 0 <= left < right <= 500 + 1e-6
        assert 0 <= upper < lower <= 333 + 1e-6
        assert 0.07 < (right - left) * (lower - upper) / (500 * 333) <= 1
        assert 0.74 < (right - left) / (lower - upper) < 1.34


def test_boxes_at_the_centre() -> None:
    assert centre_box(512, 256) == (144, 16, 368, 240)
    assert random_box(500, 300, [[1.0, 0.0, 0.0, 0.0]]) == (100, 0, 400, 300)
