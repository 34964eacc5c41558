"""A network of one's own: two convolutions and a head, three units."""

from torch import nn

from masksl.model import ARCHITECTURES, Architecture, Units


def build(classes: int, channels: int) -> Units:
    """Return the units in forward order."""
    first = nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    head = nn.Flatten(), nn.Linear(32 * 2 * 2, classes)
    return [nn.Sequential(*layers) for layers in (first, second, head)]


ARCHITECTURES["mine"] = Architecture(build, 3, {"shallow": 1, "deep": 2}, (), (1, 3))
