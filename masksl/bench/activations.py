"""Error and size of compressed activations of a briefly trained network.

The activations are those of 256 images outside the training set, in training mode, as a
client sends them. The images are the first training images, which are held out, or the
first test images if the network comes from a run.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from masksl import model
from masksl.compress import decode, make
from masksl.dataset import DatasetConfig, load
from masksl.runtime import checkpoint
from masksl.runtime.checkpoint import CheckpointError
from masksl.runtime.results import network_name
from masksl.settings import EARLIER
from masksl.utils import seeded_generator

HELD_OUT = 256  # number of images, taken from the start of the set
BATCH = 100

Row = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network and its training: one epoch with seed 0, or the training of a run.

    Parameters
    ----------
    model, dataset : str
        Names of the network and of the data set; in a run, `results.network_name`.
    images : int | None
        Number of training images; in a run, summed over its rounds. None: all but those
        held out.
    lr : float
        Learning rate of SGD with momentum 0.9 and weight decay 5e-4; in a run, that of
        the first round.
    top1 : float | None
        Test accuracy of the run, a fraction; None without a run.
    """

    model: str
    dataset: str
    images: int | None
    lr: float
    top1: float | None = None


def train(network: Network, root: str) -> tuple[model.Units, torch.Tensor, int]:
    """Train a network on the CPU.

    Parameters
    ----------
    network : Network
        The network, its data set and its learning rate.
    root : str
        Folder of the data sets.

    Returns
    -------
    tuple[list[nn.Module], torch.Tensor, int]
        Its units; the held-out images, float32, shape (256, C, H, W); the number of
        training images.
    """
    data = load(DatasetConfig(name=network.dataset, root=root))
    spec = data.spec
    units = model.build(network.model, spec.classes, spec.channels, seed=0)
    whole = nn.Sequential(*units).train()
    optimizer = torch.optim.SGD(
        whole.parameters(), lr=network.lr, momentum=0.9, weight_decay=5e-4
    )
    draws = seeded_generator(0, "briefly trained")
    rest = len(data.train.labels) - HELD_OUT
    order = HELD_OUT + torch.randperm(rest, generator=draws)[: network.images]
    # Dropout draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        for indices in order.split(BATCH):
            images, labels = data.train_batch(indices, draws)
            loss = nn.functional.cross_entropy(whole(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return units, data.train_images(torch.arange(HELD_OUT))[0], len(order)


def activation(units: model.Units, cut: int, images: torch.Tensor) -> torch.Tensor:
    """Return the activation of images at a cut, in training mode."""
    half, _ = model.split(units, cut)
    with torch.no_grad():
        return half.train()(images)


def measure(tensor: torch.Tensor, name: str, options: dict[str, Any]) -> Row:
    """Compress a tensor and measure size and error.

    Returns
    -------
    dict[str, Any]
        ``bits`` per element, with the header; ``error``, the relative 2-norm error;
        ``norm``, the 2-norm of the error.
    """
    frame = make(name, **options).encode(tensor)
    norm = float((decode(frame) - tensor).norm())
    return {
        "compressor": name,
        "options": options,
        "bits": 8 * len(frame) / tensor.numel(),
        "error": norm / float(tensor.norm()),
        "norm": norm,
    }


# --- bits at one error ----------------------------------------------------------------

PAPER_BITS = 2.32  # per element: ms at sparsity 99 % with 2 bits
MS_BEST = {"values": "bfloat16", "lossless": "auto"}


def compare(tensor: torch.Tensor) -> list[Row]:
    """Measure `ms` at the paper's setting, and others at its error or its bits."""
    paper = measure(tensor, "ms", {})
    error = paper["error"]
    others: list[tuple[str, dict[str, Any]]] = [
        ("ms", {"lossless": "fast"}),
        ("ms", {"values": "bfloat16", "lossless": "fast"}),
        ("ms", {"values": "bfloat16", "lossless": "context"}),
        ("ms", MS_BEST),
        ("ec", {"error": error}),
        ("ec", {"error": error, "context": "none"}),
        ("ec", {"bits": PAPER_BITS}),
    ]
    rows = [paper, *(measure(tensor, *other) for other in others)]
    for row in rows:
        row["share"] = row["bits"] / PAPER_BITS
        row["error_ratio"] = row["error"] / error
    return rows


def targets(root: str, vgg19_images: int | None) -> list[Row]:
    """Return the rows of `compare` for two networks on CIFAR-10 and for noise.

    Parameters
    ----------
    root : str
        Folder that holds CIFAR-10.
    vgg19_images : int | None
        Training images of VGG19; the small CNN is trained on all 49,744.
    """
    rows: list[Row] = []
    for network, cut in (
        (Network("small_cnn", "cifar10", None, 0.05), 1),
        (Network("vgg19", "cifar10", vgg19_images, 0.02), 2),
    ):
        units, images, seen = train(network, root)
        name = f"{network.model}, {cut} of {len(units)} units, {seen:,} images"
        tensor = activation(units, cut, images)
        rows += [{"activation": name} | row for row in compare(tensor)]
    noise = torch.randn(256, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    return rows + [
        {"activation": "half-normal noise"} | row for row in compare(noise.abs())
    ]


def show_targets(rows: Iterable[Row]) -> None:
    """Print rows of `targets` as a table."""
    table = Table(title=f"share: bits an element over {PAPER_BITS}")
    for column in ("activation", "compressor"):
        table.add_column(column)
    for column in ("bits", "share", "error", "error / ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["activation"],
            label(row),
            *(f"{row[key]:.3f}" for key in ("bits", "share")),
            *(f"{row[key]:.4f}" for key in ("error", "error_ratio")),
        )
    Console(width=130).print(table)


def label(row: Row) -> str:
    """Return a compressor and its options as text."""
    options = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row["options"].items()
    )
    return ", ".join([row["compressor"], *options])


# --- error against bits ---------------------------------------------------------------

BUDGETS = range(2, 8)  # q: ms keeps 1 of 32 elements and has masks of q bits
FLOATS = {3: (2, 1), 4: (2, 2), 5: (3, 2), 6: (3, 3), 7: (3, 4), 8: (4, 4)}


def settings(budget: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the compressors that the paper counts as budget + 1 bits per element."""
    share = budget / 32
    exponent, mantissa = FLOATS[budget + 1]
    return [
        ("qu", {"bits": budget + 1}),
        ("qq", {"bits": budget + 1}),
        ("fp", {"exponent": exponent, "mantissa": mantissa}),
        ("sp", {"sparsity": 1 - share}),
        ("rt", {"sparsity": 1 - share}),
        ("ms", {"sparsity": 1 - 1 / 32, "bits": budget}),
        ("ms", {"sparsity": 1 - 1 / 32, "bits": budget, "lossless": "context"}),
        ("ec", {"bits": float(budget + 1)}),
        ("ec", {"bits": (budget + 1) / 4}),
    ]


def figure2(units: model.Units, name: str, images: torch.Tensor) -> list[Row]:
    """Measure all compressors of `settings` at the named cuts of a network.

    Parameters
    ----------
    units : list[nn.Module]
        The network.
    name : str
        Its name.
    images : torch.Tensor
        float32, shape (B, C, H, W), normalised.
    """
    rows = []
    for cut, count in model.ARCHITECTURES[name].cuts.items():
        tensor = activation(units, count, images)
        shape = "x".join(map(str, tensor.shape))
        for budget in BUDGETS:
            for compressor, options in settings(budget):
                row = {"cut": cut, "shape": shape, "budget": budget + 1}
                rows.append(row | measure(tensor, compressor, options))
    return rows


def figure2_of_training(network: Network, root: str) -> dict[str, Any]:
    """Train a network; return its description and its rows of `figure2`."""
    units, images, seen = train(network, root)
    rows = figure2(units, network.model, images)
    return {"network": asdict(network) | {"images": seen}, "rows": rows}


def figure2_of_run(folder: Path, root: str) -> dict[str, Any]:
    """Return the description of a run's network, and its rows of `figure2`.

    The images are the first test images.

    Parameters
    ----------
    folder : Path
        See `trained`.
    root : str
        Folder of the data sets.

    Raises
    ------
    CheckpointError
        See `trained`.
    """
    units, facts = trained(folder)
    run = facts["settings"]
    name, dataset = run["model.name"], run["dataset.name"]
    data = load(DatasetConfig(name=dataset, root=root))
    images, _ = data.test_batch(torch.arange(HELD_OUT))
    seen = sum(row["samples"] for row in facts["rows"])
    top1 = facts["rows"][-1]["top1"]
    network = Network(network_name(run), dataset, seen, run["optimizer.lr"], top1)
    return {"network": asdict(network), "rows": figure2(units, name, images)}


def trained(folder: Path) -> tuple[model.Units, dict[str, Any]]:
    """Return the network of a run as in its checkpoint, and the checkpoint's facts.

    Parameters
    ----------
    folder : Path
        Run folder with a checkpoint, of any round.

    Raises
    ------
    CheckpointError
        If it has no readable checkpoint, or its clients have different halves.
    """
    # Imported here: the compressors are timed without Flower.
    # pylint: disable-next=import-outside-toplevel
    from masksl.methods.split.server import network_of

    tensors, facts = checkpoint.read(folder)
    run = EARLIER | facts["settings"]
    if run["client_sync"] == "never":
        raise CheckpointError(f"{folder}: its clients have a half each, expected one")
    return list(network_of(tensors, run)), facts | {"settings": run}


def described(facts: dict[str, Any]) -> Row:
    """Return what tables say of the network of `trained`, given its facts."""
    return {
        "model": network_name(facts["settings"]),
        "dataset": facts["settings"]["dataset.name"],
        "top1": facts["rows"][-1]["top1"],
    }


def show_figure2(result: dict[str, Any]) -> None:
    """Print the rows of `figure2` as a table."""
    network = Network(**result["network"])
    title = f"{network.model}, {network.dataset}, {network.images:,} images"
    if network.top1 is not None:
        title += f", top-1 {network.top1:.2%}"
    table = Table(title=title)
    for column in ("cut", "compressor"):
        table.add_column(column)
    for column in ("bits", "relative error", "2-norm of the error"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        figures = f"{row['bits']:.3f}", f"{row['error']:.4f}", f"{row['norm']:.1f}"
        table.add_row(row["cut"], label(row), *figures)
    Console(width=110).print(table)
