"""Networks: parameters, units, cuts, shapes."""

import pytest
import torch

from masksl import model

CASES = [
    ("vgg19", 10, 32, 38_958_922),
    ("resnet8", 10, 32, 78_042),
    ("resnet9", 10, 32, 1_646_112),
    ("resnet18", 100, 32, 11_220_132),
    ("resnet18", 200, 64, 11_271_432),
    ("resnet34", 1000, 224, 21_797_672),
    ("resnet34_64", 200, 64, 21_379_592),
    ("small_cnn", 10, 8, 224_842),
    ("lenet", 10, 28, 20_922),
    ("mnist_net", 10, 28, 261_840),
]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "vgg19": [(64, 16, 16), (256, 4, 4), (512, 2, 2)],
    "resnet8": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "resnet9": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
    "resnet18": [(64, 32, 32), (128, 16, 16), (256, 8, 8)],
    "resnet34": [(64, 56, 56), (128, 28, 28), (256, 14, 14)],
    "resnet34_64": [(64, 64, 64), (128, 32, 32), (256, 16, 16)],
    "small_cnn": [(64, 4, 4), (128, 2, 2), (128, 1, 1)],
    "lenet": [(8, 12, 12), (16, 4, 4), (64,)],
    "mnist_net": [(10, 22, 22), (20, 16, 16), (50,)],
}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def grown(shape: tuple[int, ...], name: str, size: int) -> tuple[int, ...]:
    """Return a shape of `SHAPES` for images of another size of the network."""
    sizes = model.ARCHITECTURES[name].image_sizes or (size,)
    return shape[0], *(side * size // sizes[0] for side in shape[1:])


@pytest.mark.parametrize(("name", "classes", "size", "expected"), CASES)
def test_halves_hold_exactly_the_network(
    name: str, classes: int, size: int, expected: int
) -> None:
    architecture = model.ARCHITECTURES[name]
    channels = max(architecture.channels)
    units = model.build(name, classes, channels, seed=0)
    assert len(units) == architecture.units
    assert sum(map(parameters, units)) == expected
    images = torch.randn(2, channels, size, size)
    whole = torch.nn.Sequential(*units).eval()
    with torch.no_grad():
        logits = whole(images)
        assert logits.shape == (2, classes)
        for cut in range(1, len(units)):
            client, server = model.split(units, cut)
            assert parameters(client) + parameters(server) == expected
        for place, shape in zip(architecture.cuts, SHAPES[name], strict=True):
            client, server = model.split(units, model.resolve_cut(name, place))
            activation = client(images)
            assert activation.shape == (2, *grown(shape, name, size))
            assert torch.equal(server(activation), logits)


def test_the_stride_of_the_stem_leaves_the_weights_as_they_are() -> None:
    plain, strided = (
        model.build("resnet8", 10, 3, seed=5, stem_stride=stride) for stride in (1, 2)
    )
    for one, other in zip(plain, strided, strict=True):
        state = other.state_dict()
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in one.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    for (channels, height, width), cut in zip(
        SHAPES["resnet8"], (2, 3, 4), strict=True
    ):
        client, server = (half.eval() for half in model.split(strided, cut))
        shape = channels, height // 2, width // 2
        assert model.activation_shape(client, 3, 32, torch.device("cpu")) == shape
        assert server(client(images)).shape == (2, 10)
    # The strided convolution gives every second output of the other one.
    ours, others = (units[0][0](images) for units in (strided, plain))
    torch.testing.assert_close(ours, others[:, :, ::2, ::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "allowed"), [("resnet8", "1 or 2"), ("lenet", "1")])
def test_other_strides_are_refused(name: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"stem_stride=3: must be {allowed} for"):
        model.build(name, 10, 3, seed=0, stem_stride=3)


def test_named_cuts() -> None:
    cuts = {n: list(a.cuts.values()) for n, a in model.ARCHITECTURES.items()}
    assert cuts["vgg19"] == [2, 8, 15]
    assert cuts["resnet18"] == [2, 5, 7]
    assert cuts["resnet34"] == cuts["resnet34_64"] == [2, 8, 14]
    assert list(model.ARCHITECTURES["vgg19"].cuts) == ["shallow", "medium", "deep"]


@pytest.mark.parametrize("size", [8, 28, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_cnn_takes_any_image(size: int, channels: int) -> None:
    units = model.build("small_cnn", 7, channels, seed=0)
    images = torch.randn(2, channels, size, size)
    assert torch.nn.Sequential(*units)(images).shape == (2, 7)
    assert units[0][0].out_channels == 64


def test_mnist_net_is_as_it_is_described() -> None:
    units = model.build("mnist_net", 10, 1, seed=0)
    sizes = [p.numel() for unit in units for p in unit.parameters()]
    assert sizes == [250, 10, 5_000, 20, 256_000, 50, 500, 10]
    images = torch.randn(3, 1, 28, 28)
    (conv1, _, _), (conv2, _, _), (_, fc1, _), (fc2,) = units
    outputs = images
    for conv in (conv1, conv2):
        outputs = torch.nn.functional.max_pool2d(conv(outputs), 3, stride=1).relu()
    expected = fc2(fc1(outputs.flatten(1)).relu())
    assert torch.equal(torch.nn.Sequential(*units)(images), expected)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (model.build("small_cnn", 10, 1, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0][0].weight, same[0][0].weight)
    assert not torch.equal(first[0][0].weight, other[0][0].weight)


@pytest.mark.parametrize("cut", [0, 17, -1, 2.0, "wide", True, None])
def test_cuts_outside_the_network_are_refused(cut: object) -> None:
    with pytest.raises(ValueError, match="cut=.*whole number from 1 to 16 for vgg19"):
        model.resolve_cut("vgg19", cut)  # type: ignore[arg-type]
    assert model.resolve_cut("vgg19", "3") == 3
