"""Masks have exact counts, change by the published rule, and are coded exactly."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from masksl import model
from masksl.compress import FrameError, make
from masksl.methods.flash import FlashConfig
from masksl.methods.flash.average import Average, largest, scaled_down
from masksl.methods.flash.coding import (
    DRAWN,
    FULL,
    GIVEN,
    GROWN,
    SAME,
    MaskCoding,
    Versioned,
    pack_counts,
    unpack_counts,
)
from masksl.methods.flash.evolution import Evolution, Plan, spread
from masksl.methods.flash.layers import Layers, NetworkError, allot, draw
from masksl.methods.flash.start import FIRST, Start
from masksl.settings import RunConfig


def run_of(seed: int) -> RunConfig:
    return RunConfig(rounds=1, clients=4, batch_size=8, eval_batch_size=8, seed=seed)


def start_of(*units: nn.Module, seed: int = 3, **options: Any) -> Start:
    torch.manual_seed(0)
    config = FlashConfig(**({"density": 0.1} | options))
    return Start.of(nn.Sequential(*units), config, run_of(seed))


def cnn(**options: Any) -> Start:
    units = model.build("small_cnn", 10, 1, seed=1)
    return Start.of(nn.Sequential(*units), FlashConfig(**options), run_of(3))


def trio(**options: Any) -> Start:
    """Return three maskable layers: 1, 600 and 3,000 weights."""
    layers = nn.Linear(1, 1), nn.Linear(20, 30), nn.Linear(100, 30), nn.Linear(2, 2)
    return start_of(*layers, **options)


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "options", "layers", "weights"),
    [
        ("resnet18", 3, {}, 20, 11_159_232),
        ("resnet18", 3, {"mask_shortcuts": False}, 17, 10_987_200),
        ("resnet8", 3, {}, 9, 76_720),
        ("mnist_net", 1, {"mask_first": False}, 2, 261_000),
        ("small_cnn", 1, {}, 3, 221_760),
        ("small_cnn", 3, {}, 3, 222_912),
    ],
)
def test_networks_have_the_published_numbers_of_maskable_weights(
    name: str, channels: int, options: dict[str, Any], layers: int, weights: int
) -> None:
    units = model.build(name, 10, channels, seed=1)
    found = Layers.of(nn.Sequential(*units), FlashConfig(**options))
    assert (len(found.sizes), found.elements) == (layers, weights)
    assert not found.shapes.keys() & set(found.rest)


def test_a_network_of_one_layer_is_refused() -> None:
    with pytest.raises(NetworkError, match="no layer before the last one"):
        start_of(nn.Linear(4, 2))


@pytest.mark.parametrize("total", [0, 1, 7, 100, 158, 161])
def test_counts_add_up_and_no_layer_has_more_than_all(total: int) -> None:
    sizes = [1, 60, 100]
    for shares in ([1.0, 60.0, 100.0], [50.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        counts = allot(shares, sizes, total)
        assert sum(counts) == total
        assert all(0 <= own <= size for own, size in zip(counts, sizes, strict=True))
    even = allot([1.0, 60.0, 100.0], sizes, total)
    assert all(abs(n - total * s / 161) < 1 for n, s in zip(even, sizes, strict=True))


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    assert allot([90.0, 10.0, 10.0], [20, 100, 100], 60) == [20, 20, 20]
    assert allot([1.0, 1.0, 1.0], [100, 100, 100], 100) == [34, 33, 33]


def test_drawn_masks_are_exact_and_follow_from_the_seed() -> None:
    sizes, counts = [1, 600, 3000], [1, 500, 30]
    mask = draw(5, counts, sizes)
    parts = np.split(mask, [1, 601])
    assert [int(part.sum()) for part in parts] == counts
    assert np.array_equal(mask, draw(5, counts, sizes))
    assert not np.array_equal(mask, draw(6, counts, sizes))
    hits = sum(draw(seed, [0, 6, 900], sizes).astype(int) for seed in range(2000))
    expected = np.repeat([0.0, 20.0, 600.0], sizes)
    deviation = np.sqrt(2000 * np.repeat([0, 0.01 * 0.99, 0.3 * 0.7], sizes))
    assert np.all(np.abs(hits - expected) <= 5.5 * deviation)


# --- prune and regrow -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "share"),
    [(1, 0), (2, 0), (3, 0.0833), (4, 0.0625), (5, 0.1), (8, 0.0938), (19, 0.1184)],
)
def test_one_pass_has_one_adjustment_of_the_published_rate(
    batches: int, share: float
) -> None:
    plan = Plan(batches, 1, 0.25)
    rates = [plan.rate_after(step) for step in range(batches)]
    assert sum(rates) == max(rates) == rates[batches // 2]
    assert max(rates) == pytest.approx(share, abs=1e-4)


def test_passes_but_the_last_end_with_an_adjustment() -> None:
    rates = [Plan(2, 3, 0.3).rate_after(step) for step in range(6)]
    assert rates == pytest.approx([0, 0.2, 0, 0.1, 0, 0])


def evolved(start: Start, density: float, rate: float, times: int) -> Any:
    layers = start.layers
    counts = allot(layers.sizes, layers.sizes, layers.kept(density))
    before = start.mask(counts)
    mask = torch.from_numpy(before.copy())
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(layers.elements, generator=generator) * mask
    evolution = Evolution(mask, layers.kept(density), start.growth(2, 7))
    for _ in range(times):
        evolution.adjust(layers.named(flat), rate)
    return before, evolution, flat


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_an_adjustment_keeps_the_number_of_weights(density: float) -> None:
    start = cnn()
    before, evolution, flat = evolved(start, density, 0.25, 1)
    mask, layers = evolution.mask.numpy(), start.layers
    assert abs(int(mask.sum()) / layers.kept(density) - 1) < 0.05
    assert not flat[~evolution.mask].any()
    assert not flat[evolution.mask & ~torch.from_numpy(before)].any()  # grown at 0
    (change,) = evolution.changes
    cut = np.flatnonzero(before)[change.cut]
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.randn(layers.elements, generator=generator).abs().numpy()
    parts = zip(layers.parts(magnitudes), layers.parts(before), strict=True)
    means = [float(own[kept].mean()) for own, kept in parts]
    for start_, size, grown, mean in zip(
        np.cumsum([0, *layers.sizes]), layers.sizes, change.grown, means, strict=False
    ):
        own = slice(start_, start_ + size)
        kept = before[own].copy()
        gone = cut[(cut >= start_) & (cut < start_ + size)] - start_
        kept[gone] = False
        room = size - int(kept.sum())
        assert grown <= 0.99 * room
        assert int(mask[own].sum()) == int(kept.sum()) + grown
        active = magnitudes[own][before[own]]
        inactive = 1 - before[own].mean()
        careful = inactive < 0.2 and mean > sum(means) / 3
        rate = min(0.25, inactive) if careful else 0.25
        assert len(gone) == math.ceil(rate * len(active))
        if len(gone) < len(active):
            assert magnitudes[own][gone].max() <= np.sort(active)[len(gone)]


def test_adjustments_are_repeated_from_what_was_cut_and_grown() -> None:
    start = cnn()
    before, evolution, _ = evolved(start, 0.05, 0.2, 3)
    after = start.growth(2, 7).repeat(before, evolution.changes)
    assert np.array_equal(after, evolution.mask.numpy())
    assert not np.array_equal(after, before)
    other = start.growth(3, 7).repeat(before, evolution.changes)
    assert not np.array_equal(after, other)


def test_growth_beyond_the_room_of_a_layer_goes_to_all() -> None:
    assert spread([0.5, 0.5], 10.0, [100, 100]) == [5, 5]
    grown = spread([0.9, 0.1], 100.0, [10, 1000])
    assert grown[0] == 9 and abs(sum(grown) - 100) <= 2
    assert spread([0.5, 0.5], 100.0, [1, 1]) == [0, 0]  # 99 % of one weight


def test_corrections_follow_the_errors() -> None:
    start = trio()
    _, evolution, _ = evolved(start, 0.1, 0.25, 1)
    evolution._remember(10)  # pylint: disable=protected-access
    first = evolution._errors[0]  # pylint: disable=protected-access
    correction = 0.25 * (1.75 * first) + 0.75 * 10 + (first + 10) / 2
    assert evolution._correction == correction  # pylint: disable=protected-access


def test_densities_come_from_the_initial_weights_alone() -> None:
    start = cnn(density=0.02, warmup_epochs=5)
    counts = start.first_counts([start.warmup()])
    assert sum(counts) == 4435
    densities = [n / s for n, s in zip(counts, start.layers.sizes, strict=True)]
    assert densities == pytest.approx([0.906, 0.021, 0.016], rel=0.1)


def test_initial_weights_make_up_for_those_that_are_masked() -> None:
    start = trio(scale_init=True)
    counts = [1, 60, 750]
    plain, scaled = start.tensors, start.weights(counts)
    for name, factor in zip(start.layers.shapes, [1, 10**0.5, 2], strict=True):
        assert torch.allclose(scaled[name], plain[name] * factor)
    assert all(torch.equal(scaled[name], plain[name]) for name in start.layers.rest)


# --- on the wire ----------------------------------------------------------------------


def entropy(mask: np.ndarray, groups: np.ndarray) -> float:
    """Return bits of a mask by the shares of ones in groups."""
    bits = 0.0
    for group in np.unique(groups):
        share = float(mask[groups == group].mean())
        if 0 < share < 1:
            own = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
            bits += own * int((groups == group).sum())
    return bits


@pytest.mark.parametrize("way", ["auto", "given", "full", "packed"])
def test_masks_come_down_exactly(way: str) -> None:
    start = cnn(masks=way)
    coding, layers = MaskCoding(start), start.layers
    counts = allot([9.0, 1.0, 1.0], layers.sizes, layers.kept(0.05))
    first = Versioned(FIRST, start.mask(counts))
    data = coding.encode(first, None)
    assert data == bytes([DRAWN, 1, 0, 0, 0]) + pack_counts(counts)
    assert np.array_equal(coding.decode(data, None).mask, first.mask)
    _, evolution, _ = evolved(start, 0.05, 0.2, 1)
    new = Versioned(7, evolution.mask.numpy())
    for held in (None, first):
        data = coding.encode(new, held)
        version, mask = coding.decode(data, held)
        assert version == 7 and np.array_equal(mask, new.mask)
        form = GIVEN if held and way in ("auto", "given") else FULL
        assert data[0] == form
        groups = layers.numbers.astype(int)
        if form == GIVEN:
            groups = 2 * groups + first.mask
        bits = entropy(new.mask, groups)
        if way == "packed":
            bits = layers.elements
        assert abs(len(data) - bits / 8) <= 0.01 * bits / 8 + 16 * len(layers.sizes)
    same = coding.encode(new, new)
    assert same == bytes([SAME, 7, 0, 0, 0])
    assert coding.decode(same, new) is new
    with pytest.raises(FrameError, match="by version 7, but version 1 is held"):
        coding.decode(same, first)
    with pytest.raises(FrameError, match="by version 7, but none is held"):
        coding.decode(same, None)


@pytest.mark.parametrize("kept", [[0, 0, 5], [1, 600, 3000], [1, 0, 1]])
def test_empty_full_and_small_layers_come_back(kept: list[int]) -> None:
    start = trio()
    coding = MaskCoding(start)
    one, two = Versioned(2, start.mask(kept)), Versioned(3, start.mask([1, 60, 300]))
    for new, held in ((one, None), (one, two), (two, one), (two, None)):
        data = coding.encode(new, held)
        assert np.array_equal(coding.decode(data, held).mask, new.mask)
        tensors = coding.tensors(new)
        assert np.array_equal(coding.of_tensors(tensors).mask, new.mask)


@pytest.mark.parametrize("way", ["auto", "given", "full", "packed"])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_adjusted_masks_go_up_exactly(way: str, times: int) -> None:
    start = cnn(masks=way, local_epochs=4)
    coding, growth = MaskCoding(start), start.growth(2, 7)
    before, evolution, _ = evolved(start, 0.02, 0.109, times)
    after = evolution.mask.numpy()
    data = coding.encode_changes(before, evolution.changes, after)
    assert np.array_equal(coding.decode_changes(data, before, growth), after)
    if not times:
        assert data == bytes([SAME, 0, 0, 0, 0])
        return
    allowed = {"auto": {GROWN, GIVEN}, "given": {GIVEN}}.get(way, {FULL})
    assert data[0] in allowed
    if way == "auto" and times == 1:
        (change,) = evolution.changes
        counts = start.layers.counts(before)
        bits = entropy(change.cut, np.repeat([0, 1, 2], counts))
        assert len(data) <= bits / 8 + 3 * 4 + 16 * 3
        assert len(data) < 340


def test_broken_masks_are_refused() -> None:
    start = trio()
    coding, growth = MaskCoding(start), start.growth(0, 1)
    before, evolution, _ = evolved(start, 0.1, 0.2, 1)
    up = coding.encode_changes(before, evolution.changes, evolution.mask.numpy())
    new = Versioned(2, evolution.mask.numpy())
    down = coding.encode(new, Versioned(FIRST, before))
    assert (up[0], down[0]) == (GROWN, GIVEN)
    for place in range(len(up)):
        with pytest.raises(FrameError):
            coding.decode_changes(up[:place], before, growth)
    for place in range(len(down)):
        with pytest.raises(FrameError):
            coding.decode(down[:place], Versioned(FIRST, before))
    other = Versioned(FIRST, start.mask([1, 60, 299]))
    with pytest.raises(FrameError, match="another reference"):
        coding.decode(down, other)
    with pytest.raises(FrameError, match="qu frame of shape"):
        frame = make("qu").encode(torch.ones(start.layers.elements))
        coding.decode(
            down[:1].replace(bytes([GIVEN]), bytes([FULL])) + down[1:5] + frame, None
        )
    with pytest.raises(FrameError, match="1 bytes too many"):
        coding.decode_changes(up + b"0", before, growth)
    with pytest.raises(FrameError, match="1 bytes too many"):
        coding.decode(bytes([SAME, 1, 0, 0, 0, 0]), Versioned(FIRST, before))
    with pytest.raises(FrameError, match="mask of 2 adjustments, expected up to 1"):
        coding.decode_changes(up[:1] + b"\x02" + up[2:], before, growth)
    with pytest.raises(FrameError, match="form 9"):
        coding.decode(b"\x09" + down[1:], None)
    with pytest.raises(FrameError, match="form 9"):
        coding.decode_changes(b"\x09" + up[1:], before, growth)
    with pytest.raises(FrameError, match="2 weights of layer 0, which has 1"):
        unpack_counts(pack_counts([2, 0, 0]), start.layers.sizes)
    with pytest.raises(FrameError, match="counts of 8 bytes, expected 12"):
        unpack_counts(pack_counts([1, 0]), start.layers.sizes)


# --- averages -------------------------------------------------------------------------


def averaged(by_mask: bool, start: Start, *clients: tuple[int, Any]) -> Average:
    average = Average(start.layers, by_mask)
    for number, (samples, mask) in enumerate(clients):
        generator = torch.Generator().manual_seed(number)
        kept = torch.randn(int(mask.sum()), generator=generator)
        average.add(number, samples, mask, kept, {})
    return average


def test_equal_masks_are_averaged_alike() -> None:
    start = trio()
    mask = start.mask([1, 60, 300])
    clients = [(3, mask), (4, mask), (9, mask)]
    one, two = (averaged(way, start, *clients) for way in (False, True))
    assert torch.equal(one.weights(), two.weights())
    assert np.array_equal(one.weights().numpy() != 0, mask)
    assert one.overlap() == 1.0
    assert one.mean_counts() == [1, 60, 300]


def test_a_weight_is_averaged_over_all_or_over_those_that_have_it() -> None:
    start = trio()
    masks = [draw(seed, [1, 60, 300], start.layers.sizes) for seed in (1, 2)]
    clients = [(1, masks[0]), (3, masks[1])]
    over_all, over_some = (averaged(way, start, *clients) for way in (False, True))
    both, neither = masks[0] & masks[1], ~(masks[0] | masks[1])
    plain, own = over_all.weights().numpy(), over_some.weights().numpy()
    assert np.array_equal(plain[both], own[both])
    assert not plain[neither].any() and not own[neither].any()
    first, second = masks[0] & ~masks[1], masks[1] & ~masks[0]
    assert np.allclose(plain[first] * 4, own[first])
    assert np.allclose(plain[second] * 4 / 3, own[second])
    union = masks[0] | masks[1]
    assert over_all.overlap() == both.sum() / union.sum()


def test_the_average_of_one_client_is_what_it_sent() -> None:
    start = trio()
    mask = start.mask([1, 60, 300])
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(361, generator=generator)
    for way in (False, True):
        assert torch.equal(averaged(way, start, (7, mask)).weights()[mask], kept)


def test_the_largest_weights_make_a_mask() -> None:
    start = trio()
    flat = torch.zeros(start.layers.elements)
    flat[0], flat[5], flat[7], flat[3600] = 1.0, -3.0, 2.0, 0.5
    mask = largest(start.layers, flat, [1, 2, 1])
    assert np.flatnonzero(mask).tolist() == [0, 5, 7, 3600]
    assert np.flatnonzero(largest(start.layers, flat, [0, 1, 0])).tolist() == [5]
    assert scaled_down([10.0, 20.5, 3.0], 10) == [2, 6, 0]
    assert scaled_down([1.0, 2.0], 10) == [1, 2]
    assert scaled_down([1.0, 2.0, 1.0], 1) == [0, 1, 0]  # a mask keeps something
