"""FedPM counts votes exactly, codes them exactly, and sends what it says."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from masksl import model
from masksl.codec import philox
from masksl.compress import FrameError, make
from masksl.config import ConfigError
from masksl.methods.client import Place, place_of
from masksl.methods.fedpm import CODES, FedPmConfig
from masksl.methods.fedpm import client as side
from masksl.methods.fedpm.ballot import Ballot
from masksl.methods.fedpm.codes import formula, reference_of, start
from masksl.methods.fedpm.dither import Prediction, bins, numbers
from masksl.methods.fedpm.frozen import Frozen, NetworkError
from masksl.methods.fedpm.messages import (
    DIGEST,
    MASK,
    THETA,
    TRAIN,
    VOTERS,
    VOTES,
    ballot_of,
    ballot_records,
    theta_of,
    theta_records,
)
from masksl.methods.fedpm.server import FedPmServer
from masksl.methods.fedpm.theta import SCALE, Theta
from masksl.methods.fedpm.votes import decode_mask, decode_votes, encode_votes
from masksl.runtime.messages import RunError, raw_record
from tests.conftest import prepare, settings_of, train, untimed

SMALL = (
    *("method=fedpm", "model.name=fedpm_linear", "rounds=3", "clients=3"),
    *("dataset.limit=90", "dataset.test_limit=40", "threads.server=1"),
)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a network of two layers."""

    def build(classes: int, channels: int) -> model.Units:
        hidden = nn.Flatten(), nn.Linear(64 * channels, 24), nn.ReLU()
        return [nn.Sequential(*hidden), nn.Linear(24, classes)]

    architecture = model.Architecture(build, 2, {}, (), (1,))
    monkeypatch.setitem(model.ARCHITECTURES, "fedpm_linear", architecture)


ELEMENTS = 65 * 24 + 25 * 10


# --- frozen weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "channels", "weights", "packed"),
    [
        ("conv4", 10, 1, 1_933_258, 241_658),
        ("conv4", 47, 1, 1_942_767, 242_846),
        ("conv6", 10, 3, 2_262_602, 282_826),
        ("conv8", 100, 3, 5_301_412, 662_677),
        ("conv10", 100, 3, 19_197_092, 2_399_637),
        ("mlp_600_300", 10, 1, 654_310, 81_789),
        ("mlp_800_200", 47, 1, 797_647, 99_706),
        ("mlp_300_100", 10, 1, 266_610, 33_327),
        ("conv4_16", 10, 3, 152_602, 19_076),
    ],
)
def test_networks_have_the_published_numbers_of_weights(
    name: str, classes: int, channels: int, weights: int, packed: int
) -> None:
    with torch.device("meta"):
        units = model.ARCHITECTURES[name].build(classes, channels)
    every = [p.numel() for unit in units for p in unit.parameters()]
    assert sum(every) == weights and -(-weights // 8) == packed
    assert len(units) == model.ARCHITECTURES[name].units
    if name == "conv6":
        counts = [sum(p.numel() for p in unit.parameters()) for unit in units]
        assert counts[:5] == [1_792, 36_928, 73_856, 147_584, 295_168]
        assert counts[5:] == [590_080, 1_048_832, 65_792, 2_570]


def test_frozen_weights_are_signed_constants_of_the_seed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    frozen = Frozen.of(module, math.e, 7)
    named = frozen.named(frozen.weights)
    for name, fan_in in (("0", 27), ("2", 32)):
        for kind in ("weight", "bias"):
            own = named[f"{name}.{kind}"]
            expected = torch.tensor(math.e / math.sqrt(fan_in))
            assert torch.equal(own.abs(), expected.expand(own.shape))
    share = float((frozen.weights < 0).float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(frozen.elements)
    assert Frozen.of(module, math.e, 7).digest == frozen.digest
    others = Frozen.of(module, math.e, 8), Frozen.of(module, 2.0, 7)
    assert len({frozen.digest, *(other.digest for other in others)}) == 3


def test_other_layers_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(NetworkError, match="BatchNorm2d has weight"):
        Frozen.of(module, 1.0, 0)
    with pytest.raises(RunError, match="^model.name=small_cnn with method=fedpm: Bat"):
        prepare(settings_of("method=fedpm", "model=small_cnn", "clients=2"))


# --- votes ----------------------------------------------------------------------------


def test_votes_are_counted_exactly() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (10, 500))
    theta = Theta.of_votes(masks.sum(0), 10)
    expected = (10 + 98 * masks.sum(0)) / 1000
    assert np.array_equal(theta.table[theta.index], expected)
    smoothed = np.where(masks == 1, 0.99, 0.01)  # as the authors' program counts
    alpha, beta = 1 + smoothed.sum(0), 1 + (1 - smoothed).sum(0)
    published = (alpha - 1) / (alpha + beta - 2)
    np.testing.assert_allclose(expected, published, rtol=0, atol=1e-12)
    further = theta.after(masks[:3].sum(0), 3, anew=False)
    assert np.array_equal(further.index, masks.sum(0) + masks[:3].sum(0))
    assert further.voters == 13
    assert theta.after(masks[:3].sum(0), 3, anew=True).voters == 3
    one = Theta.of_votes(np.array([0, 1]), 1)
    np.testing.assert_allclose(one.scores, [-math.log(99), math.log(99)], rtol=1e-6)


def test_thresholds_are_whole_numbers_on_every_machine() -> None:
    theta = Theta.of_votes(np.arange(11), 10)
    exact = [(10 + 98 * n) * SCALE // 1000 for n in range(11)]
    assert theta.thresholds.tolist() == exact
    first = Theta.initial(10**5, 3, "normal")
    scaled = first.table * SCALE
    assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1e-5  # no rounding in doubt
    assert abs(first.scores.mean()) < 0.02 and abs(first.scores.std() - 1) < 0.02
    assert first.levels.max() == 63
    assert Theta.initial(5, 3, "zero").scores.tolist() == [0.0] * 5
    restored = Theta.of_tensors(theta.tensors())
    assert np.array_equal(restored.index, theta.index) and restored.voters == 10


def test_more_votes_than_a_level_can_be_are_refused() -> None:
    theta = Theta.of_votes(np.array([65_535, 0]), 65_535)
    with pytest.raises(FrameError, match="^65536 votes: must be 1 to 65535, set meth"):
        theta.after(np.array([1, 0]), 1, anew=False)


@pytest.mark.parametrize(
    ("every", "first", "anew"),
    [
        (1, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 0, [1, 4, 7]),
        (0, 0, []),
        (5, 2, [1, 2, 3, 8]),
        (0, 3, [1, 2, 3]),
    ],
)
def test_votes_are_forgotten_as_configured(
    every: int, first: int, anew: list[int]
) -> None:
    config = FedPmConfig(reset_every=every, reset_first=first)
    assert [r for r in range(1, 9) if config.begins_anew(r)] == anew


@pytest.mark.parametrize("most", [1, 2, 10, 300, 1000])
@pytest.mark.parametrize("with_contexts", [False, True])
def test_votes_are_coded_exactly(most: int, with_contexts: bool) -> None:
    rng = np.random.default_rng(most)
    contexts = rng.integers(0, 16, 3000) if with_contexts else None
    for votes in (
        rng.integers(0, most + 1, 3000),
        np.zeros(3000, np.int64),
        np.full(3000, most),
    ):
        frames = encode_votes(votes, most, contexts)
        assert np.array_equal(decode_votes(frames, 3000, most, contexts), votes)


def test_votes_need_their_contexts() -> None:
    contexts = np.arange(3000) % 16
    frames = encode_votes((contexts > 7) * 2, 2, contexts)
    with pytest.raises(FrameError, match="another reference"):
        decode_votes(frames, 3000, 2, contexts[::-1])
    many = 2**13  # contexts that would be too many are left out
    frames = encode_votes((contexts > 7) * many, many, contexts)
    assert frames == encode_votes((contexts > 7) * many, many)
    assert decode_votes(frames, 3000, many, contexts).max() == many


def test_coded_votes_take_what_their_shares_do() -> None:
    rng = np.random.default_rng(1)
    contexts = rng.integers(0, 4, 50_000)
    votes = rng.binomial(10, np.array([0.05, 0.3, 0.7, 0.99])[contexts])
    entropy = 0.0
    for context in range(4):
        shares = np.bincount(votes[contexts == context]) / (contexts == context).sum()
        shares = shares[shares > 0]
        bits = -(shares * np.log2(shares)).sum()
        entropy += bits * (contexts == context).sum() / 8
    taken = sum(map(len, encode_votes(votes, 10, contexts)))
    assert entropy < taken < 1.01 * entropy + 300


def test_more_votes_than_voters_are_refused() -> None:
    frames = encode_votes(np.array([7, 0]), 7)
    with pytest.raises(FrameError, match="^7 votes of 5$"):
        decode_votes(frames, 2, 5)
    with pytest.raises(FrameError, match="2 frames of votes up to 7"):
        decode_votes(frames[1:], 2, 7)
    with pytest.raises(FrameError, match="expected a mask of 2"):
        decode_votes([make("sp").encode(torch.ones(2))], 2, 1)
    with pytest.raises(FrameError, match="expected a mask of 3"):
        decode_mask(make("mask").encode(torch.ones(2, dtype=torch.bool)), 3, None)


# --- dithers --------------------------------------------------------------------------


def test_numbers_are_the_generators_words() -> None:
    drawn = numbers(5, 3, 2, 1001)
    words = philox.words(5, 3 << 32 | 2, 501)
    halves = np.stack([words & 0xFFFF, words >> 16], 1).reshape(-1)
    assert np.array_equal(drawn, halves[:1001])


def test_a_mask_drawn_by_numbers_has_its_probabilities() -> None:
    theta = np.array([0.01, 0.2, 0.5, 0.77, 0.99])
    times = 10_000
    kept = np.zeros(5)
    both = []
    for round_ in range(times):
        masks = [numbers(1, round_, c, 5) < np.rint(theta * SCALE) for c in (0, 1)]
        kept += masks[0]
        both.append(masks)
    deviation = np.sqrt(theta * (1 - theta) / times)
    assert np.all(np.abs(kept / times - theta) < 4 * deviation + 1 / SCALE)
    one, other = np.array(both).transpose(1, 0, 2).astype(float)
    for column in (1, 2, 3):
        correlation = np.corrcoef(one[:, column], other[:, column])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(times)
        correlation = np.corrcoef(one[1:, column], one[:-1, column])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(times)


def test_a_client_that_did_not_move_costs_next_to_nothing() -> None:
    theta = Theta.of_votes(np.random.default_rng(0).binomial(10, 0.4, 10**6), 10)
    drawn = numbers(9, 4, 1, 10**6)
    mask = torch.from_numpy(drawn < theta.thresholds)
    reference = torch.from_numpy(bins(drawn, theta.thresholds))
    assert int(reference.max()) == 31 and len(reference.unique()) == 32
    frame = make("mask").encode(mask, reference=reference)
    assert 8 * len(frame) < 0.001 * 10**6 + 8 * 112
    other = torch.from_numpy(bins(numbers(9, 4, 2, 10**6), theta.thresholds))
    with pytest.raises(FrameError, match="another reference"):
        decode_mask(frame, 10**6, other)
    other = torch.from_numpy(bins(numbers(9, 5, 1, 10**6), theta.thresholds))
    with pytest.raises(FrameError, match="another reference"):
        decode_mask(frame, 10**6, other)


def test_numbers_predict_votes() -> None:
    theta = Theta.of_votes(np.random.default_rng(0).binomial(5, 0.5, 1000), 5)
    voters = [0, 2, 3]
    predicted = Prediction.of(7, 2, voters, theta.thresholds)
    masks = [numbers(7, 2, c, 1000) < theta.thresholds for c in voters]
    assert np.array_equal(predicted.ones, np.sum(masks, 0))
    assert predicted.contexts.max() <= 15


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_code_is_exact(code: str, share: float) -> None:
    module = nn.Linear(200, 50)
    frozen, rule, theta = start(module, FedPmConfig(code=code), 3)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for voters in (0, 1, 10, 1000):
        if voters:
            theta = Theta.of_votes(rng.integers(0, voters + 1, frozen.elements), voters)
        mask = rng.random(frozen.elements) < share
        reference = reference_of(rule, frozen, theta, 2, 1)
        frame = make("mask").encode(torch.from_numpy(mask), reference=reference)
        assert np.array_equal(decode_mask(frame, frozen.elements, reference), mask)
        if share == 0.3 and code == "global":
            assert len(frame) <= -(-frozen.elements // 8) + 40


def test_the_papers_figure_is_one_bit_for_an_even_mask() -> None:
    count = 2_262_602
    mask = np.arange(count, dtype=np.uint8) & 1
    assert formula(mask) == pytest.approx(1 + 9.3e-6, abs=1e-7)
    frame = make("mask").encode(torch.from_numpy(mask == 1))
    assert len(frame) == 282_826 + 28 + 4 + 5


def test_the_bits_of_drift_without_training() -> None:
    """Masks drawn by the probabilities themselves, ten voters, as measured before."""
    rng = np.random.default_rng(0)
    theta = 1 / (1 + np.exp(-rng.standard_normal(200_000)))
    expected = {1: 0.865, 2: 0.797, 3: 0.737, 5: 0.639, 8: 0.535, 12: 0.45, 16: 0.403}
    for round_ in range(1, 17):
        if round_ in expected:
            entropy = -(theta * np.log2(theta) + (1 - theta) * np.log2(1 - theta))
            assert entropy.mean() == pytest.approx(expected[round_], abs=0.004)
        votes = rng.binomial(10, theta)
        levels = Theta.of_votes(votes, 10)
        theta = levels.table[levels.index]


# --- what comes down ------------------------------------------------------------------


@pytest.mark.parametrize("down", ["full", "previous", "dither"])
@pytest.mark.parametrize("reset", [0, 1])
def test_clients_have_the_servers_probabilities(down: str, reset: int) -> None:
    config = FedPmConfig(code="dither", down=down, reset_every=reset)
    _, rule, theta = start(nn.Linear(80, 20), config, 1)
    rng = np.random.default_rng(0)
    for round_, voters in ((1, [0, 1, 2]), (2, [1]), (3, [0, 1, 2, 3])):
        votes = rng.integers(0, len(voters) + 1, len(theta.index))
        ballot = Ballot.of(votes, round_, voters, theta, rule)
        content = RecordDict(dict(ballot_records(ballot, 4, 1)))  # type: ignore[arg-type]
        received = ballot_of(content, 4)
        assert received == ballot
        expected = rule.count(theta, votes, len(voters), round_)
        after = received.theta(theta, rule)
        assert after.voters == expected.voters
        assert np.array_equal(after.index, expected.index)
        whole = theta_of(
            RecordDict(dict(theta_records(after, 1))),  # type: ignore[arg-type]
            len(after.index),
        )
        assert np.array_equal(whole.index, after.index)
        theta = after


@pytest.mark.parametrize("down", ["previous", "dither"])
def test_votes_need_the_probabilities_before_them(down: str) -> None:
    config = FedPmConfig(code="dither", down=down)
    _, rule, theta = start(nn.Linear(80, 20), config, 1)
    votes = (theta.thresholds > SCALE // 2) * 2
    ballot = Ballot.of(votes, 1, [0, 1], theta, rule)
    assert np.array_equal(ballot.theta(theta, rule).index, votes)
    other = Theta.initial(len(votes), 5, "normal")
    with pytest.raises(FrameError, match="another reference"):
        ballot.theta(other, rule)
    if down == "dither":
        with pytest.raises(FrameError, match="another reference"):
            replace(ballot, round=2).theta(theta, rule)
        with pytest.raises(FrameError, match="another reference"):
            replace(ballot, voters=(0, 2)).theta(theta, rule)


def test_voters_that_there_are_not_are_refused() -> None:
    content = RecordDict(
        {
            VOTERS: raw_record(b"\x01\0\0\0" + b"\x08"),
            VOTES: next(iter(ballot_records(Ballot(1, (0,), (b"x",)), 3, 1).values())),
        }
    )
    with pytest.raises(FrameError, match=r"clients \[3\] of 3"):
        ballot_of(content, 3)
    content[VOTERS] = raw_record(b"\x01\0\0\0\0")
    with pytest.raises(FrameError, match=r"clients \[\] of 3"):
        ballot_of(content, 3)
    with pytest.raises(FrameError, match="message without votes"):
        ballot_of(RecordDict({VOTERS: raw_record(b"\x01\0\0\0\x01")}), 3)


# --- runs -----------------------------------------------------------------------------


def test_training_is_the_same_whichever_code_carries_the_masks() -> None:
    runs = {code: train(*SMALL, f"method.code={code}") for code in CODES}
    states = [runs[code].server.theta for code in CODES]
    for other in states[1:3]:
        assert np.array_equal(states[0].index, other.index)
    assert not np.array_equal(states[0].index, states[3].index)
    keys = ("loss", "top1", "top1_drawn", "top1_mean", "bits_formula")
    for one, other in zip(runs["global"].rows, runs["theta"].rows, strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
    for run in runs.values():
        assert run.losses[-1] < run.losses[0]
        sent = run.traffic.bytes(MASK) * 8 / (9 * ELEMENTS)
        assert run.server.summary([], run.traffic)["bits_up"] == pytest.approx(sent)


def test_training_is_the_same_whichever_way_votes_come_down() -> None:
    rows = []
    for down in ("full", "previous", "dither"):
        run = train(*SMALL, "method.code=dither", f"method.down={down}")
        own = [{k: v for k, v in row.items() if k != "bits_down"} for row in run.rows]
        for row in own:
            row["bytes"] = row["bytes"]["training"]["up"]
            del row["link_seconds"]
        rows.append(untimed(own))
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(
    "options",
    [
        ("method.code=dither",),
        ("method.reset_every=0",),
        ("method.code=dither", "method.keep_moments=true"),
    ],
    ids=str,
)
def test_a_client_that_failed_gets_all_votes(options: tuple[str, ...]) -> None:
    """It fails before training in one round, after it in another."""
    training = prepare(settings_of(*SMALL, *options, "rounds=4"))
    handlers: Any = training.client(0).setup.method.handlers
    real = handlers[TRAIN]

    def fail(client: Any, content: RecordDict) -> RecordDict:
        round_ = place_of(content).round
        if client.number == 1 and round_ == 1:
            raise OSError("before")
        reply: RecordDict = real(client, content)
        if client.number == 1 and round_ == 3:
            raise OSError("after")
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(handlers, TRAIN, fail)
        for number in range(1, 5):
            training.strategy.run_round(training.grid, number, 4)
            voters = training.server.version.ballot.voters
            assert voters == ((0, 2) if number in (1, 3) else (0, 1, 2))
    down = [row["bytes"]["training"].get("down", {}) for row in training.rows]
    assert [THETA in kinds for kinds in down] == [False, True, False, True]
    total = 10 if options == ("method.reset_every=0",) else 3
    assert training.server.theta.voters == total


def test_scores_that_are_not_finite_end_the_run() -> None:
    options = ("optimizer.name=sgd", "optimizer.lr=1e30", "optimizer.weight_decay=0.1")
    with pytest.raises(RunError, match="client 0, code theta: scores not finite"):
        train(*SMALL, *options)


def test_bytes_by_hand() -> None:
    """Each byte of three rounds of three clients; masks are packed as they are even."""
    run = train(*SMALL, "method.code=global", "method.down=full", "method.start=zero")
    traffic = run.traffic
    assert traffic.bytes(DIGEST, "up") == 9 * 8
    assert traffic.bytes(VOTERS, "down") == 2 * 3 * (4 + 1)
    number, theta, before, ballot = run.server.version
    assert number == 3 and theta.voters == before.voters == 3
    last = encode_votes(before.index, 3)
    assert len(last) == 2 and ballot is not None
    first = traffic.bytes(VOTES, "down") - 3 * sum(map(len, last))
    assert first % 3 == 0 and first > 0
    # A mask: header, shape, form and checksum of a reference, then one bit a weight.
    most = 28 + 4 + 5 + -(-ELEMENTS // 8)
    masks = traffic.bytes(MASK, "up")
    assert 9 * most - 9 * 12 < masks <= 9 * most
    every = sum(traffic.bytes(kind) for kind in (DIGEST, VOTERS, VOTES, MASK))
    assert traffic.bytes() == every


def test_one_round_counts_each_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: dict[tuple[int, int], np.ndarray] = {}
    real = FedPmServer._mask

    def kept(self: Any, round_: Any, number: int, content: Any) -> np.ndarray:
        masks[round_.number, number] = real(self, round_, number, content)
        return masks[round_.number, number]

    monkeypatch.setattr(FedPmServer, "_mask", kept)
    run = train(*SMALL, "method.reset_every=0")
    theta = run.server.theta
    assert theta.voters == 9 and len(masks) == 9
    assert np.array_equal(theta.index, np.sum([*masks.values()], 0))
    for number in range(3):  # each client has the votes of all rounds but the last
        own = Theta.of_tensors(run.client(number).state["theta"])
        expected = [mask for (round_, _), mask in masks.items() if round_ < 3]
        assert np.array_equal(own.index, np.sum(expected, 0))


def test_clients_that_missed_a_vote_get_all_votes() -> None:
    run = train(*SMALL, "fraction=0.67", "rounds=6", "method.reset_every=0")
    assert run.traffic.bytes(THETA, "down") > 0
    assert run.traffic.bytes(VOTES, "down") > 0
    assert run.server.theta.voters == 12


@pytest.mark.parametrize(("estimator", "power"), [("identity", 0), ("probability", 1)])
def test_the_gradient_of_scores(
    estimator: str, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mask that is drawn, by hand: g w theta and the sigmoid's derivative."""
    training = prepare(
        settings_of(
            *SMALL,
            f"method.estimator={estimator}",
            *("optimizer.name=sgd", "optimizer.momentum=0.0", "optimizer.lr=1.0"),
            *("rounds=1", "method.local_epochs=1", "batch_size=30"),
        )
    )
    seen: dict[str, torch.Tensor] = {}
    real = side.apply_gradients

    def spy(tensors: Any, gradients: Any, *rest: Any) -> None:
        seen.setdefault("scores", tensors["scores"].clone())
        seen.setdefault("gradient", gradients["scores"].clone())
        real(tensors, gradients, *rest)

    monkeypatch.setattr(side, "apply_gradients", spy)
    training.strategy.run_round(training.grid, 1, 1)
    client, frozen = training.client(0), training.server.frozen
    place = Place(1, 0)
    generator = torch.Generator().manual_seed(client.seed("fedpm.batch", place))
    drawn = torch.rand(frozen.elements, generator=generator)
    theta = torch.sigmoid(seen["scores"]).requires_grad_(True)
    # The mask's derivative by theta is 1.
    mask = (drawn < theta).float().detach() + theta - theta.detach()
    images, labels = client.train_batch(place)
    module = nn.Sequential(*model.build("fedpm_linear", 10, 1, seed=0))
    weights = frozen.named(frozen.weights * mask)
    logits = torch.func.functional_call(module, weights, (images,))
    loss = nn.functional.cross_entropy(logits, labels)
    (by_theta,) = torch.autograd.grad(loss, theta)
    theta = theta.detach()
    expected = by_theta * theta * (1 - theta) * theta**power
    torch.testing.assert_close(seen["gradient"], expected, rtol=1e-4, atol=1e-8)


def test_kept_moments_change_training() -> None:
    fresh, kept = (
        train(*SMALL, f"method.keep_moments={keep}") for keep in ("false", "true")
    )
    assert fresh.rows[0]["loss"] == kept.rows[0]["loss"]
    assert fresh.rows[1]["loss"] != kept.rows[1]["loss"]
    state = kept.client(0).state
    assert float(state["moments.adam.step"]["scores"]) > 6
    assert not any(name.startswith("moments") for name in fresh.client(0).state)
    assert untimed(kept.rows) == untimed(train(*SMALL, "method.keep_moments=true").rows)


def test_a_client_with_other_weights_ends_the_run() -> None:
    training = prepare(settings_of(*SMALL))
    handlers: Any = training.client(0).setup.method.handlers
    real = handlers[TRAIN]

    def other(client: Any, content: RecordDict) -> RecordDict:
        reply: RecordDict = real(client, content)
        if client.number == 1:
            reply[DIGEST] = raw_record(bytes(8))
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(handlers, TRAIN, other)
        with pytest.raises(RunError, match="^round 1, step 0, client 1, code theta: c"):
            training.strategy.run_round(training.grid, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("compressor=ms",), "compressor.name='ms': must be none with method=fedpm"),
        (
            ("method.down=dither",),
            "method.down='dither': must be dither with code=dither",
        ),
        (("method.code=best",), "method.code='best': must be one of global, layer"),
    ],
)
def test_what_does_not_fit_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of("method=fedpm", *options)
