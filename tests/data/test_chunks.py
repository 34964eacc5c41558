"""The partition ``chunks``: sizes, classes, cover."""

import numpy as np
import pytest
import torch

from masksl import dataset
from masksl.data.chunks import deal, draw_sizes
from masksl.dataset import DatasetConfig


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled(classes: int, each: int) -> torch.Tensor:
    """Return labels of equally many samples a class, in random order."""
    labels = torch.arange(classes).repeat(each)
    return labels[torch.randperm(len(labels), generator=generator())]


@pytest.mark.parametrize(
    ("samples", "clients"), [(60_000, 10), (6_000, 100), (500, 500), (501, 500), (9, 1)]
)
def test_sizes_are_proportional_to_whole_numbers(samples: int, clients: int) -> None:
    drawn = torch.randint(10, 100, (clients,), generator=generator())
    sizes = torch.tensor(draw_sizes(samples, clients, generator()))
    assert sizes.sum() == samples
    assert sizes.min() >= 1
    exact = 1 + (samples - clients) * drawn / drawn.sum()
    assert (sizes - exact).abs().max() < 1.01


@pytest.mark.parametrize("classes_per_client", [1, 2, 4, 10])
@pytest.mark.parametrize("clients", [1, 7, 100, 1000])
def test_every_sample_is_dealt_to_one_client(
    clients: int, classes_per_client: int
) -> None:
    labels = shuffled(10, 100)
    parts = deal(labels, clients, classes_per_client, generator())
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    assert [len(part) for part in parts] == draw_sizes(1000, clients, generator())


@pytest.mark.parametrize("wanted", [2, 4])
def test_the_first_clients_have_chunks_of_consecutive_classes(wanted: int) -> None:
    """No class is exhausted before client 30 of 100."""
    labels = shuffled(10, 600)
    parts = deal(labels, 100, wanted, generator())
    numbers = []
    for part in parts:
        counts = labels[part].bincount(minlength=10)
        numbers.append(int(counts.count_nonzero()))
        size, chunk = len(part), len(part) // wanted
        if len(numbers) <= 30:
            sorted_counts = counts[counts > 0].sort(descending=True).values
            assert sorted_counts[:wanted].tolist() == [chunk] * wanted
            assert sorted_counts[wanted:].sum() == size % wanted
            held = (counts > 0).int()
            assert (held - held.roll(1) == 1).sum() == 1  # one stretch, cyclically
    assert set(numbers[:30]) == {wanted, wanted + 1}
    assert np.mean(numbers) < wanted + 2


def test_exhausted_classes_are_skipped() -> None:
    """The walk of every client, sample by sample, on a few samples."""
    labels = torch.tensor([5, 7, 7, 7, 7, 9, 9, 9, 9, 9])
    for seed in range(20):
        sizes = draw_sizes(10, 3, source := generator(seed))
        starts = torch.randint(3, (3,), generator=source).tolist()
        left = {0: [0], 1: [1, 2, 3, 4], 2: [5, 6, 7, 8, 9]}
        expected = []
        for size, at in zip(sizes, starts, strict=True):
            part: list[int] = []
            chunk = max(1, size // 2)
            while len(part) < size:
                for _ in range(chunk):
                    if left[at] and len(part) < size:
                        part.append(left[at].pop(0))
                at = (at + 1) % 3
            expected.append(sorted(part))
        parts = deal(labels, 3, 2, generator(seed))
        assert [part.tolist() for part in parts] == expected


def test_parts_depend_on_the_seed_of_the_run_alone() -> None:
    config = DatasetConfig(partition="chunks", classes_per_client=2)
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)["state"]["key"].copy()
    parts = dataset.partition.__wrapped__(config, 10, 42)
    torch.manual_seed(1)
    again = dataset.partition.__wrapped__(config, 10, 42)
    torch.random.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = dataset.partition.__wrapped__(config, 10, 43)
    assert [len(part) for part in parts] != [len(part) for part in other]
    assert np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], numpy_state
    )
    # Samples of a client come in random order, not class by class.
    labels = dataset.load(config).train.labels[parts[0]]
    assert not torch.equal(labels, labels.sort().values)


def test_classes_without_samples_do_not_count() -> None:
    labels = torch.tensor([2, 2, 40, 40])
    deal(labels, 2, 2, generator())
    with pytest.raises(ValueError, match="classes_per_client=3: must be at most 2, "):
        deal(labels, 2, 3, generator())
