"""Networks as lists of units, their named cuts, and the two halves of a cut.

A unit is one indivisible piece of a network in forward order. The client keeps the
first ``cut`` units, the server the others.

torchvision is imported by the networks that are made of its layers, when they are
built: importing it takes half as long as starting a process, and others do not need it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import nn

Units = list[nn.Module]
"""A network: its units in forward order."""


class ModelConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """The network of a run.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    stem_stride : int
        Stride of the first convolution; one that the network takes.
    """

    name: str = Field("small_cnn", description="the name of a network")
    stem_stride: int = Field(1, description="1, or 2 with model.name=resnet8")

    @field_validator("name", mode="before")
    @classmethod
    def _is_registered(cls, name: object) -> object:
        if name not in ARCHITECTURES:
            allowed = f"one of {', '.join(ARCHITECTURES)}"
            raise PydanticCustomError("allowed", allowed)  # type: ignore[arg-type]
        return name

    @field_validator("stem_stride")
    @classmethod
    def _is_taken(cls, stride: int, info: ValidationInfo) -> int:
        architecture = ARCHITECTURES.get(info.data.get("name", ""))
        if architecture and stride not in architecture.stem_strides:
            raise ValueError("not taken")
        return stride


@dataclass(frozen=True)
class Architecture:
    """A network, described before it is built.

    Parameters
    ----------
    build : Callable[..., list[nn.Module]]
        Returns the units, given the number of classes and of input channels, and
        ``stem_stride`` by name if it is not 1.
    units : int
        Number of units.
    cuts : dict[str, int]
        Number of units of the client, by the name of the cut.
    image_sizes : tuple[int, ...]
        Supported heights, equal to the widths; empty if all from 8 on are.
    channels : tuple[int, ...]
        Supported numbers of input channels.
    stem_strides : tuple[int, ...]
        Supported strides of the first convolution. Weights do not depend on them.
    """

    build: Callable[..., Units]
    units: int
    cuts: dict[str, int]
    image_sizes: tuple[int, ...]
    channels: tuple[int, ...] = (3,)
    stem_strides: tuple[int, ...] = (1,)


def build(
    name: str, classes: int, channels: int, *, seed: int, stem_stride: int = 1
) -> Units:
    """Build a network with initial weights.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    classes : int
        Outputs of the last unit.
    channels : int
        Channels of the images.
    seed : int
        Seed of the weights. PyTorch's global generator is not changed.
    stem_stride : int
        Stride of the first convolution.

    Returns
    -------
    list[nn.Module]
        The units in forward order; together they map float32 images of shape
        (B, channels, H, W) to logits of shape (B, classes).

    Raises
    ------
    ValueError
        If the network does not take the stride.
    """
    architecture = ARCHITECTURES[name]
    if stem_stride not in architecture.stem_strides:
        allowed = " or ".join(map(str, architecture.stem_strides))
        raise ValueError(f"stem_stride={stem_stride}: must be {allowed} for {name}")
    options = {} if stem_stride == 1 else {"stem_stride": stem_stride}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return architecture.build(classes, channels, **options)


def resolve_cut(name: str, cut: int | str) -> int:
    """Return the number of units of the client.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    cut : int | str
        A number of units, or ``shallow``, ``medium`` or ``deep``.

    Raises
    ------
    ValueError
        If the network has no such cut.
    """
    architecture = ARCHITECTURES[name]
    units = None
    if isinstance(cut, str):
        units = int(cut) if cut.isdecimal() else architecture.cuts.get(cut)
    elif isinstance(cut, int) and not isinstance(cut, bool):
        units = cut
    if units is None or not 1 <= units < architecture.units:
        raise ValueError(
            f"cut={cut!r}: must be {', '.join(architecture.cuts)} "
            f"or a whole number from 1 to {architecture.units - 1} for {name}"
        )
    return units


def split(units: Units, cut: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the client half and the server half.

    Parameters
    ----------
    units : list[nn.Module]
        A whole network.
    cut : int
        Number of units of the client, at least 1 and fewer than all.

    Raises
    ------
    ValueError
        If a half would be empty.
    """
    if not 1 <= cut < len(units):
        raise ValueError(f"cut={cut!r}: must be from 1 to {len(units) - 1}")
    return nn.Sequential(*units[:cut]), nn.Sequential(*units[cut:])


def activation_shape(
    client: nn.Sequential, channels: int, size: int, device: torch.device
) -> tuple[int, ...]:
    """Return the shape of the activation of one sample, without the batch dimension.

    Parameters
    ----------
    client : nn.Sequential
        Client half, on ``device``; its mode is restored afterwards.
    channels, size : int
        Images have the shape (channels, size, size).
    device : torch.device
        Device of the client half.
    """
    training = client.training
    with torch.no_grad():
        images = torch.zeros(1, channels, size, size, device=device)
        shape = tuple(client.eval()(images).shape[1:])
    client.train(training)
    return shape


# --- the networks ---------------------------------------------------------------------


def _small_cnn(classes: int, channels: int) -> Units:
    """Return three convolutions and a head, about 225,000 weights, for 8x8 on."""
    widths = [channels, 64, 128, 128]
    units: Units = [
        nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            # Pooling first gives the same result, and the ReLU has a quarter to do.
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        )
        for before, after in pairwise(widths)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return [*units, nn.Sequential(*head)]


def _lenet(
    *widths: int, hidden: int, pool: tuple[int, int]
) -> Callable[[int, int], Units]:
    """Return the constructor of a LeNet for 28x28: 5x5 convolutions and two layers.

    A pooling, given by its width and its stride, follows every convolution.
    """

    def build_lenet(classes: int, channels: int) -> Units:
        size, units = 28, []
        for before, after in pairwise([channels, *widths]):
            layers = nn.Conv2d(before, after, 5), nn.MaxPool2d(*pool)
            units.append(nn.Sequential(*layers, nn.ReLU(inplace=True)))
            size = (size - 4 - pool[0]) // pool[1] + 1
        flat = nn.Flatten(), nn.Linear(widths[-1] * size**2, hidden)
        units.append(nn.Sequential(*flat, nn.ReLU(inplace=True)))
        return [*units, nn.Sequential(nn.Linear(hidden, classes))]

    return build_lenet


def _mlp(*widths: int, size: int = 28) -> Callable[[int, int], Units]:
    """Return the constructor of a network with hidden layers for images of a size."""

    def build_mlp(classes: int, channels: int) -> Units:
        units: Units = [
            nn.Sequential(nn.Linear(before, after), nn.ReLU(inplace=True))
            for before, after in pairwise([size**2 * channels, *widths])
        ]
        units[0] = nn.Sequential(nn.Flatten(), *units[0])
        return [*units, nn.Linear(widths[-1], classes)]

    return build_mlp


def _conv(*widths: int, hidden: int = 256) -> Callable[[int, int], Units]:
    """Return the constructor of a plain convolutional network without normalisation.

    Two 3x3 convolutions of every width, each pair with a pooling, and three layers:
    Conv-4 to Conv-10 of the lottery-ticket literature (Frankle and Carbin, 2019). One
    channel means images of 28x28, three of 32x32.
    """

    def build_conv(classes: int, channels: int) -> Units:
        size, before, units = 28 if channels == 1 else 32, channels, []
        for width in widths:
            for inputs in (before, width):
                conv = nn.Conv2d(inputs, width, 3, padding=1)
                units.append([conv, nn.ReLU(inplace=True)])
            units[-1].append(nn.MaxPool2d(2))
            size, before = size // 2, width
        flat = nn.Linear(before * size**2, hidden)
        units += [
            [nn.Flatten(), flat, nn.ReLU(inplace=True)],
            [nn.Linear(hidden, hidden), nn.ReLU(inplace=True)],
        ]
        head = nn.Linear(hidden, classes)
        return [*(nn.Sequential(*layers) for layers in units), head]

    return build_conv


_VGG19_LAYERS: list[int | str] = [
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
    *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
]
"""Output channels of VGG19's convolutions; M is a pooling."""


def _vgg19(classes: int, channels: int) -> Units:
    """Return VGG19 with BatchNorm for 32x32: 16 convolutions and the classifier."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.models.vgg import make_layers

    del channels
    units: list[list[nn.Module]] = []
    for layer in make_layers(_VGG19_LAYERS, batch_norm=True):
        if isinstance(layer, nn.Conv2d):  # starts a unit; a pooling belongs to it
            units.append([])
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        units[-1].append(layer)
    classifier = nn.Sequential(
        nn.Flatten(),
        nn.Linear(512, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, classes),
    )
    for module in classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return [*(nn.Sequential(*layers) for layers in units), classifier]


def _resnet_units(network: Any, stem: nn.Sequential) -> Units:
    """Return the units of torchvision's ResNet with another stem."""
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    blocks = [block for stage in stages for block in stage]
    head = nn.Sequential(network.avgpool, nn.Flatten(), network.fc)
    return [stem, *blocks, head]


def _small_stem(width: int = 64, stride: int = 1) -> nn.Sequential:
    """Return a stem without pooling, for images of 32x32 and 64x64."""
    conv = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _resnet8(classes: int, channels: int, stem_stride: int = 1) -> Units:
    """Return ResNet8 for 32x32: stem, 3 residual blocks, head, 16 to 64 channels."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.models.resnet import BasicBlock

    del channels
    units: Units = [_small_stem(16, stem_stride)]
    for before, after in ((16, 16), (16, 32), (32, 64)):
        stride, shortcut = 1, None
        if before != after:
            stride = 2
            projection = nn.Conv2d(before, after, 1, stride=2, bias=False)
            shortcut = nn.Sequential(projection, nn.BatchNorm2d(after))
        units.append(BasicBlock(before, after, stride, shortcut))
    for unit in units:
        for module in unit.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    return [*units, nn.Sequential(*head)]


class _Residual(nn.Module):
    """Add to an input what layers make of it.

    Parameters
    ----------
    layers : nn.Module
        Give outputs of the shape of their inputs.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs plus outputs, of the same shape."""
        return inputs + self.layers(inputs)


class _Scale(nn.Module):
    """Multiply by a constant.

    Parameters
    ----------
    factor : float
        The constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the products, of the same shape."""
        return inputs * self.factor


def _resnet9(classes: int, channels: int) -> Units:
    """Return ResNet9 for 32x32: 4 convolutions, 2 residual blocks, head.

    It is the network of Page's "How to train your ResNet" (2018), which learns CIFAR-10
    in few epochs, at half the width: 32 to 256 channels.
    """
    del channels

    def layers(before: int, after: int, pool: bool = False) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        # Pooling before the normalisation leaves it a quarter to do.
        pooling = [nn.MaxPool2d(2)] if pool else []
        return [conv, *pooling, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    head = nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, classes, bias=False)
    return [
        nn.Sequential(*layers(3, 32)),
        nn.Sequential(*layers(32, 64, pool=True)),
        _Residual(*layers(64, 64), *layers(64, 64)),
        nn.Sequential(*layers(64, 128, pool=True)),
        nn.Sequential(*layers(128, 256, pool=True)),
        _Residual(*layers(256, 256), *layers(256, 256)),
        nn.Sequential(*head, _Scale(0.125)),
    ]


def _resnet18(classes: int, channels: int) -> Units:
    """Return ResNet18 for 32x32 and 64x64: stem, 8 residual blocks, head."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.models import resnet18

    del channels
    return _resnet_units(resnet18(num_classes=classes), _small_stem())


def _resnet34(classes: int, channels: int) -> Units:
    """Return ResNet34 for 224x224: stem with pooling, 16 residual blocks, head."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.models import resnet34

    del channels
    network = resnet34(num_classes=classes)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    return _resnet_units(network, stem)


def _resnet34_64(classes: int, channels: int) -> Units:
    """Return ResNet34 for 64x64: 3x3 stem, 16 residual blocks, head."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.models import resnet34

    del channels
    return _resnet_units(resnet34(num_classes=classes), _small_stem())


def _plain(constructor: Callable[[int, int], Units], units: int) -> Architecture:
    """Return the description of a plain convolutional network."""
    cuts = {"shallow": 2, "medium": 4, "deep": units - 2}
    return Architecture(constructor, units, cuts, (28, 32), (1, 3))


_RESNET34_CUTS = {"shallow": 2, "medium": 8, "deep": 14}

ARCHITECTURES = {
    "small_cnn": Architecture(
        _small_cnn, 4, {"shallow": 1, "medium": 2, "deep": 3}, (), (1, 3)
    ),
    "lenet": Architecture(
        _lenet(8, 16, hidden=64, pool=(2, 2)),
        *(4, {"shallow": 1, "medium": 2, "deep": 3}, (28,), (1, 3)),
    ),
    "mnist_net": Architecture(
        _lenet(10, 20, hidden=50, pool=(3, 1)),
        *(4, {"shallow": 1, "medium": 2, "deep": 3}, (28,), (1,)),
    ),
    "mlp_digits": Architecture(
        _mlp(200, 100, size=8), 3, {"shallow": 1, "medium": 2}, (8,), (1,)
    ),
    "mlp_128": Architecture(_mlp(128), 2, {"shallow": 1}, (28,), (1,)),
    "mlp_512": Architecture(_mlp(512), 2, {"shallow": 1}, (28,), (1,)),
    "mlp_300_100": Architecture(_mlp(300, 100), 3, {"shallow": 1}, (28,), (1,)),
    "mlp_600_300": Architecture(_mlp(600, 300), 3, {"shallow": 1}, (28,), (1,)),
    "mlp_800_200": Architecture(_mlp(800, 200), 3, {"shallow": 1}, (28,), (1,)),
    "conv4_16": _plain(_conv(16, 32, hidden=64), 7),
    "conv4": _plain(_conv(64, 128), 7),
    "conv6": _plain(_conv(64, 128, 256), 9),
    "conv8": _plain(_conv(64, 128, 256, 512), 11),
    "conv10": Architecture(
        _conv(64, 128, 256, 512, 1024),
        *(13, {"shallow": 2, "medium": 4, "deep": 11}),
        (32,),
    ),
    "vgg19": Architecture(_vgg19, 17, {"shallow": 2, "medium": 8, "deep": 15}, (32,)),
    "resnet8": Architecture(
        *(_resnet8, 5, {"shallow": 2, "medium": 3, "deep": 4}, (32,)),
        stem_strides=(1, 2),
    ),
    "resnet9": Architecture(_resnet9, 7, {"shallow": 1, "medium": 3, "deep": 4}, (32,)),
    "resnet18": Architecture(
        _resnet18, 10, {"shallow": 2, "medium": 5, "deep": 7}, (32, 64)
    ),
    "resnet34": Architecture(_resnet34, 18, _RESNET34_CUTS, (224,)),
    "resnet34_64": Architecture(_resnet34_64, 18, _RESNET34_CUTS, (64,)),
}
"""Every network by its name; plugins add theirs."""
