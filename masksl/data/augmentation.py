"""Random crops and flips of whole batches, and crop boxes of single images."""

from collections.abc import Sequence

import torch

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""


def random_crop(
    images: torch.Tensor, padding: int, generator: torch.Generator
) -> torch.Tensor:
    """Pad images with zeros and crop each one at a random position.

    Parameters
    ----------
    images : torch.Tensor
        Shape (B, C, H, W), any dtype and device.
    padding : int
        Zeros on every side, in pixels.
    generator : torch.Generator
        On the CPU; draws a position for each image.

    Returns
    -------
    torch.Tensor
        Same shape, dtype and device.
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    offsets = offsets.to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # (B, H)
    columns = offsets[1] + torch.arange(width, device=images.device)  # (B, W)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip each image left to right with probability one half.

    Parameters
    ----------
    images : torch.Tensor
        Shape (B, C, H, W), any dtype and device.
    generator : torch.Generator
        On the CPU; draws one number for each image.

    Returns
    -------
    torch.Tensor
        Same shape, dtype and device.
    """
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped.to(images.device), images.flip(-1), images)


def centre_box(width: int, height: int) -> Box:
    """Return the central square; its side is 224/256 of the shorter side.

    Parameters
    ----------
    width, height : int
        Size of the image in pixels.
    """
    side = min(width, height) * 224 / 256
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, draws: Sequence[Sequence[float]]) -> Box:
    """Return a box of 8 to 100 % of the area with an aspect ratio from 3:4 to 4:3.

    If no draw fits into the image, the box is the largest central square.

    Parameters
    ----------
    width, height : int
        Size of the image in pixels.
    draws : Sequence[Sequence[float]]
        Shape (tries, 4), uniform in [0, 1): area, aspect ratio, left and upper edge.
        The first one that fits is used.
    """
    for area, ratio, left, upper in draws:
        size = (0.08 + 0.92 * area) * width * height
        aspect = (3 / 4) ** (1 - 2 * ratio)
        box_width, box_height = (size * aspect) ** 0.5, (size / aspect) ** 0.5
        if box_width <= width and box_height <= height:
            x, y = left * (width - box_width), upper * (height - box_height)
            return x, y, x + box_width, y + box_height
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side
