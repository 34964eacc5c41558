"""The partition ``dirichlet_equal``: sizes, cover, mixes."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from masksl import dataset
from masksl.data.dirichlet import deal, draw_counts, draw_mixes
from masksl.dataset import DatasetConfig


def generator(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def shuffled(classes: int, each: int) -> torch.Tensor:
    """Return labels of equally many samples a class, in random order."""
    labels = torch.arange(classes).repeat(each)
    return labels[torch.randperm(len(labels))]


def shares_of(labels: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the share of each class in each part, float64, (clients, classes)."""
    classes = int(labels.max()) + 1
    counts = [labels[part].bincount(minlength=classes) for part in parts]
    return torch.stack([count / count.sum(dtype=torch.float64) for count in counts])


@pytest.mark.parametrize("alpha", [1e-320, 1e-5, 0.1, 1, 1000, 1e308])
@pytest.mark.parametrize("clients", [1, 7, 100, 1000])
def test_every_sample_is_at_one_client_and_sizes_are_equal(
    clients: int, alpha: float
) -> None:
    labels = shuffled(10, 100)
    parts = deal(labels, clients, alpha, generator())
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    even = torch.arange(1000).tensor_split(clients)
    assert [len(part) for part in parts] == [len(part) for part in even]
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_classes_of_any_size_and_number_are_dealt() -> None:
    labels = torch.tensor([7] * 5 + [40] + [3] * 90 + [8, 8])
    for alpha in (0.01, 100.0):
        parts = deal(labels, 3, alpha, generator())
        assert [len(part) for part in parts] == [33, 33, 32]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(98))
    assert [p.tolist() for p in deal(labels[:4], 4, 0.1, generator())] == [
        *([0], [1], [2], [3])
    ]


def test_fifty_thousand_samples_are_dealt_at_once() -> None:
    labels = shuffled(100, 500)
    began = time.process_time()
    deal(labels, 100, 0.1, generator())
    assert time.process_time() - began < 2


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 50.0])
def test_mixes_are_dirichlet(alpha: float) -> None:
    """Their mean and the mean of the sum of squares, and those of NumPy's."""
    mixes = np.exp(draw_mixes(20_000, 10, alpha, generator()))
    mixes /= mixes.sum(axis=1, keepdims=True)
    assert mixes.mean(axis=0) == pytest.approx([0.1] * 10, abs=0.012)
    squares = (mixes**2).sum(axis=1)
    assert squares.mean() == pytest.approx((alpha + 1) / (10 * alpha + 1), rel=0.01)
    numpys = (generator(4).dirichlet([alpha] * 10, 20_000) ** 2).sum(axis=1)
    at = [0.1, 0.25, 0.5, 0.75, 0.9]
    assert np.quantile(squares, at) == pytest.approx(np.quantile(numpys, at), rel=0.03)


def test_mixes_of_tiny_concentration_keep_their_order() -> None:
    """So that a class used up is followed by the next of the mix."""
    mixes = draw_mixes(50, 10, 1e-6, generator())
    assert np.isfinite(mixes).all()
    assert all(len(set(mix)) == 10 for mix in mixes.tolist())
    counts = draw_counts(mixes[:1], np.array([25]), np.array([10] * 10), generator())
    best = (-mixes[0]).argsort()
    # A client alone would take all; of 25 wanted samples the first two classes give 20.
    assert counts[0, best].tolist() == [10, 10, 5, *[0] * 7]


def test_counts_have_the_sums_of_clients_and_of_classes() -> None:
    sizes, classes = np.array([5, 4, 4, 4]), np.array([1, 9, 0, 7])
    before = sizes.copy(), classes.copy()
    for seed in range(30):
        source = generator(seed)
        given = draw_counts(draw_mixes(4, 4, 0.2, source), sizes, classes, source)
        assert given.min() >= 0
        assert np.array_equal(given.sum(axis=1), sizes)
        assert np.array_equal(given.sum(axis=0), classes)
    assert np.array_equal(sizes, before[0]) and np.array_equal(classes, before[1])


def test_a_scarce_class_goes_to_all_that_want_it_alike() -> None:
    """Every client wants the class 0 alone, of which one in ten can be given."""
    mixes = np.array([[0.0, -1e4]] * 10)
    sizes, classes = np.array([10] * 10), np.array([10, 90])
    draws = [draw_counts(mixes, sizes, classes, generator(n))[:, 0] for n in range(400)]
    assert np.mean(draws, axis=0) == pytest.approx([1.0] * 10, abs=0.2)


def test_the_last_clients_are_like_the_first() -> None:
    first, last = [], []
    for seed in range(40):
        labels = shuffled(10, 500)
        shares = shares_of(labels, deal(labels, 50, 0.1, generator(seed)))
        squares = (shares**2).sum(dim=1)
        first.append(squares[:5].mean())
        last.append(squares[-5:].mean())
    assert np.mean(first) == pytest.approx(np.mean(last), rel=0.1)


def test_the_concentration_says_how_uneven_the_classes_are() -> None:
    labels = shuffled(10, 5_000)
    few, many, even = (
        shares_of(labels, deal(labels, 100, alpha, generator()))
        for alpha in (0.01, 0.1, 1000.0)
    )
    assert (few > 0.02).sum(dim=1).double().mean() < 2.5
    assert few.max(dim=1).values.mean() > 0.75
    assert 0.4 < (many**2).sum(dim=1).mean() < 0.55  # mixes alone: 0.55
    # Of 500 samples 50 are of a class, and the standard deviation is about 7.
    assert (even - 0.1).abs().max() < 0.06
    assert (even - 0.1).std() < 0.02


def test_parts_depend_on_the_seed_of_the_run_alone() -> None:
    config = DatasetConfig(partition="dirichlet_equal", alpha=0.1)
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)["state"]["key"].copy()
    parts = dataset.partition.__wrapped__(config, 10, 42)
    torch.manual_seed(1)
    again = dataset.partition.__wrapped__(config, 10, 42)
    torch.random.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = dataset.partition.__wrapped__(config, 10, 43)
    labels = dataset.load(config).train.labels
    assert not torch.equal(shares_of(labels, parts), shares_of(labels, other))
    assert np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], numpy_state
    )
    # Samples of a client come in random order, not class by class.
    first = labels[parts[0]]
    assert not torch.equal(first, first.sort().values)


def test_digits_are_divided_evenly() -> None:
    labels = dataset.load(DatasetConfig()).train.labels
    assert len(labels) == 1437
    shares = {}
    for alpha in (0.1, 1000.0):
        config = DatasetConfig(partition="dirichlet_equal", alpha=alpha)
        parts = dataset.partition(config, 10, 42)
        assert [len(part) for part in parts] == [144] * 7 + [143] * 3
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(1437))
        shares[alpha] = shares_of(labels, parts)
    assert shares[0.1].max(dim=1).values.mean() > 0.45
    assert (shares[1000.0] - 0.1).abs().max() < 0.1


@pytest.mark.slow
def test_real_images_are_divided_evenly(data_root: Path) -> None:
    config = DatasetConfig(
        name="cifar10", root=str(data_root), partition="dirichlet_equal", alpha=0.1
    )
    parts = dataset.partition(config, 100, 42)
    assert [len(part) for part in parts] == [500] * 100
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(50_000))
