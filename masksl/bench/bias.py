"""What compressors change in the gradients of both halves: their bias and their noise.

For each of several mini-batches the gradients of all weights are computed twice: with
nothing compressed, and with the activation, or its gradient, through a compressor. Of
the differences the part that all batches have in common is the bias; an optimiser adds
it up, step by step. The rest is noise, which averages out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from masksl import model
from masksl.bench.activations import described, label, trained
from masksl.compress import decode, make
from masksl.dataset import DatasetConfig, load
from masksl.training.score import mean_loss
from masksl.utils import seeded_generator

Row = dict[str, Any]
Case = tuple[str, dict[str, Any]]

ACTIVATION, GRADIENT = "activation", "gradient"
CASES: dict[str, list[Case]] = {
    ACTIVATION: [
        ("ms", {}),
        *(("ec", {"error": error}) for error in (0.25, 0.15, 0.1, 0.08)),
        *(("ec", {"error": e, "deadzone": 0.5}) for e in (0.25, 0.15, 0.1, 0.08)),
        *(("ec", {"step": s, "rounding": "stochastic"}) for s in (1.0, 0.7)),
    ],
    GRADIENT: [
        *(("ec", {"error": error}) for error in (0.4, 0.25)),
        *(("ec", {"step": s, "rounding": "stochastic"}) for s in (4.0, 2.5, 1.5)),
    ],
}


@dataclass(frozen=True)
class Batch:
    """A mini-batch, and its gradients with nothing compressed.

    Parameters
    ----------
    labels : Tensor
        int64, shape (B,).
    activation : Tensor
        float32, with the graph of the client half.
    gradient : Tensor
        Gradient of the activation, of its shape.
    client, server : Tensor
        Gradients of all weights of a half, float64, one row.
    """

    labels: Tensor
    activation: Tensor
    gradient: Tensor
    client: Tensor
    server: Tensor


class Halves:
    """A network cut in two, in training mode, whose statistics stay as they are.

    Parameters
    ----------
    units : list[nn.Module]
        The network.
    cut : int
        Units of the client half.
    smoothing : float
        Label smoothing of the loss.
    samples : int
        Of a client: it normalises its own samples, the server half those of all.
    """

    def __init__(
        self, units: model.Units, cut: int, smoothing: float, samples: int
    ) -> None:
        self._client, self._server = model.split(units, cut)
        self._smoothing, self._samples = smoothing, samples
        for module in nn.Sequential(self._client, self._server).train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0

    def batch(self, images: Tensor, labels: Tensor) -> Batch:
        """Compute the gradients of a mini-batch with nothing compressed."""
        parts = images.split(self._samples)
        activation = torch.cat([self._client(part) for part in parts])
        gradient, server = self.backward(activation, labels)
        client = self.client_gradient(activation, gradient)
        return Batch(labels, activation, gradient, client, server)

    def backward(self, decoded: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of a decoded activation and of the server half."""
        received = decoded.detach().requires_grad_(True)
        loss = mean_loss(self._server(received), labels, self._smoothing)
        weights = list(self._server.parameters())
        first, *rest = torch.autograd.grad(loss, [received, *weights])
        return first, _flat(rest)

    def client_gradient(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the client half, given that of its activation."""
        weights = list(self._client.parameters())
        return _flat(
            torch.autograd.grad(activation, weights, gradient, retain_graph=True)
        )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


@dataclass
class Differences:
    """What compression adds to the gradients of several batches, as sums over these."""

    batches: int = 0
    total: Tensor | None = None
    squares: float = 0.0
    exact: float = 0.0

    def add(self, coded: Tensor, exact: Tensor) -> None:
        """Add the gradients of one batch, with compression and without."""
        difference = coded - exact
        self.batches += 1
        self.total = difference if self.total is None else self.total + difference
        self.squares += float(difference @ difference)
        self.exact += float(exact @ exact)

    def figures(self) -> Row:
        """Return the lengths of ``bias`` and ``noise``, in those of batches' gradients.

        Products of the differences of two batches have the square of the bias as their
        expectation. Where their mean is negative, the bias is given as 0.
        """
        assert self.total is not None
        products = float(self.total @ self.total) - self.squares
        bias = max(products, 0.0) / (self.batches - 1) / self.exact
        noise = max(self.squares / self.exact - bias, 0.0)
        return {"bias": sqrt(bias), "noise": sqrt(noise)}


def measure(run: Path, root: str, batches: int) -> Row:
    """Return bias and noise by compressor, in the network of a run at its cut.

    Parameters
    ----------
    run : Path
        Folder of a run with a checkpoint, see `masksl.bench.activations.trained`.
    root : str
        Folder of the data sets.
    batches : int
        Number of batches, of as many samples as in a step of the run; at least 2.
    """
    units, facts = trained(run)
    settings = facts["settings"]
    data = load(DatasetConfig(name=settings["dataset.name"], root=root))
    cut = model.resolve_cut(settings["model.name"], settings["cut"])
    smoothing = float(settings.get("optimizer.label_smoothing", 0.0))
    frame = int(settings["batch_size"])
    halves = Halves(units, cut, smoothing, frame)
    size = frame * int(settings["clients"])
    trials = [
        Trial(place, name, options, frame)
        for place, cases in CASES.items()
        for name, options in cases
    ]
    draws = seeded_generator(0, "bias")
    for number in range(batches):
        indices = torch.randint(len(data.train.labels), (size,), generator=draws)
        images, labels = data.train_batch(indices, draws)
        batch = halves.batch(images, labels)
        for trial in trials:
            trial.add(halves, batch, number)
    place = {"rounds": len(facts["rows"]), "cut": settings["cut"]}
    rows = [trial.row() for trial in trials]
    return {"network": described(facts) | place, "batches": batches, "rows": rows}


class Trial:
    """A compressor of activations or of gradients, and what it changes.

    Parameters
    ----------
    place : str
        `ACTIVATION` or `GRADIENT`.
    name : str
        Name of the compressor.
    options : dict[str, Any]
        Its options.
    frame : int
        Samples of a frame.
    """

    def __init__(
        self, place: str, name: str, options: dict[str, Any], frame: int
    ) -> None:
        self._facts = {"place": place, "compressor": name, "options": options}
        self._compressor = make(name, **options)
        self._frame = frame
        self._bits: list[float] = []
        self._client, self._server = Differences(), Differences()

    def add(self, halves: Halves, batch: Batch, number: int) -> None:
        """Add a batch; its number is the seed of what is drawn."""
        if self._facts["place"] == ACTIVATION:
            decoded = self._coded(batch.activation.detach(), number)
            gradient, server = halves.backward(decoded, batch.labels)
            self._server.add(server, batch.server)
        else:
            gradient = self._coded(batch.gradient, number)
        client = halves.client_gradient(batch.activation, gradient)
        self._client.add(client, batch.client)

    def _coded(self, tensor: Tensor, seed: int) -> Tensor:
        """Return a tensor as it is decoded from frames, and note their bits."""
        parts = tensor.split(self._frame)
        first = seed * len(parts)
        frames = [
            self._compressor.encode(part, seed=first + number)
            for number, part in enumerate(parts)
        ]
        self._bits.append(8 * sum(map(len, frames)) / tensor.numel())
        return torch.cat([decode(frame) for frame in frames])

    def row(self) -> Row:
        """Return bits an element, and the bias and noise in each half that has any."""
        halves = {"client": self._client.figures()}
        if self._facts["place"] == ACTIVATION:
            halves["server"] = self._server.figures()
        return self._facts | {"bits": mean(self._bits)} | halves


def show(result: Row) -> None:
    """Print the rows of `measure` as a table."""
    network = result["network"]
    title = f"{network['model']}, {network['dataset']}, {network['cut']} cut"
    title += f", top-1 {network['top1']:.2%} after {network['rounds']} rounds"
    table = Table(
        title=f"{title}: gradients of the halves, {result['batches']} batches"
    )
    for column in ("coded", "compressor"):
        table.add_column(column)
    for column in ("bits", "bias, client", "noise", "bias, server", "noise"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        sides = (row["client"], row.get("server"))
        figures = [
            f"{side[key]:.3f}" if side else "–"
            for side in sides
            for key in ("bias", "noise")
        ]
        table.add_row(row["place"], label(row), f"{row['bits']:.3f}", *figures)
    Console(width=120).print(table)
