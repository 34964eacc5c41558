"""FLASH trains under masks, and sends what they keep."""

from typing import Any

import numpy as np
import pytest
import torch

from masksl.config import ConfigError
from masksl.methods.flash import VARIANTS
from masksl.methods.flash import client as side
from masksl.methods.flash.messages import COUNTS, HELD, MASK, TRAIN, UPDATE, WARMUP
from masksl.methods.flash.server import FlashServer
from masksl.runtime import messages
from masksl.runtime.messages import RunError
from tests.conftest import Training, prepare, settings_of, train, untimed

# Four clients of 40 samples, five mini-batches each.
SMALL = (
    *("method=flash", "method.density=0.05", "rounds=3", "clients=4", "batch_size=8"),
    *("dataset.limit=160", "dataset.test_limit=40", "threads.server=1"),
    *("method.warmup_epochs=2",),
)
LAYERS, ELEMENTS, REST = 3, 221_760, 2_570
DENSE = 4 * (ELEMENTS + REST)


def weights(training: Training) -> torch.Tensor:
    server: FlashServer = training.server
    return server.start.layers.flat(server.tensors)


def mask(training: Training) -> np.ndarray:
    masks = training.server.masks
    return masks[masks.current].mask


def without_bytes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    traffic = ("bytes", "bytes_up", "bytes_down", "link_seconds", "messages")
    return [
        {key: row[key] for key in row if key not in traffic} for row in untimed(rows)
    ]


# --- identities -----------------------------------------------------------------------


def test_a_mask_that_keeps_all_is_no_mask() -> None:
    dense = train(*SMALL, "method.variant=dense")
    whole = train(*SMALL, "method.variant=pdst", "method.density=1.0")
    assert torch.equal(weights(dense), weights(whole))
    assert without_bytes(dense.rows) == without_bytes(whole.rows)


@pytest.mark.parametrize("variant", ["pdst", "spdst"])
def test_a_mask_that_stays_is_that_of_the_average(variant: str) -> None:
    training = prepare(settings_of(*SMALL, f"method.variant={variant}", "rounds=2"))
    for number in (1, 2):
        training.strategy.run_round(training.grid, number, 2)
        assert np.array_equal(weights(training).numpy() != 0, mask(training))
        assert int(mask(training).sum()) == round(0.05 * ELEMENTS)
    counts = training.server.start.layers.counts(mask(training))
    if variant == "pdst":
        assert counts == [29, 3686, 7373]
    else:  # the first layer has the largest weights
        assert counts[0] > 300


@pytest.mark.parametrize("rebuild", ["avg", "aggregate"])
def test_the_mask_for_all_has_at_most_its_density(rebuild: str) -> None:
    options = ("method.variant=jmwst", f"method.rebuild={rebuild}")
    training = prepare(settings_of(*SMALL, *options))
    masks = []
    for number in (1, 2):
        training.strategy.run_round(training.grid, number, 2)
        average = training.server._now.average  # pylint: disable=protected-access
        kept = int(mask(training).sum())
        least = min(round(0.05 * ELEMENTS), sum(average.mean_counts()))
        assert least - LAYERS <= kept <= round(0.05 * ELEMENTS)
        assert np.array_equal(weights(training).numpy() != 0, mask(training))
        row = training.rows[-1]
        assert row["density"] > row["density_masked"] == kept / ELEMENTS
        assert 0 < row["overlap"] < 1 and "top1_union" in row
        masks.append(mask(training))
    assert not np.array_equal(masks[0], masks[1])


def test_without_cutting_the_mask_stays() -> None:
    still = ("method.prune_rate=0", "method.warmup=init")
    one = train(*SMALL, *still, "method.variant=spdst")
    other = train(*SMALL, *still, "method.variant=jmwst")
    assert torch.equal(weights(one), weights(other))
    assert np.array_equal(mask(one), mask(other))


def test_two_batches_are_too_few_for_a_mask_to_change() -> None:
    training = train(*SMALL, "method.variant=nst", "batch_size=20")
    assert all(row["overlap"] == 1 for row in training.rows)
    assert np.array_equal(weights(training).numpy() != 0, mask(training))


def test_a_mask_changes_in_every_kth_round_alone() -> None:
    training = train(*SMALL, "method.variant=jmwst", "method.interval=2")
    assert ["top1_union" in row for row in training.rows] == [True, False, True]
    up, down = (
        [row["bytes"]["training"][way].get(MASK, 0) for row in training.rows]
        for way in ("up", "down")
    )
    assert up[1] == 0 < min(up[0], up[2])
    assert down[2] == 4 * 5 < down[1]  # the version that they hold


def test_clients_have_masks_of_their_own() -> None:
    training = train(*SMALL, "method.variant=nst", "fraction=0.5")
    masks, server = training.server.masks, training.server
    assert set(masks.own) <= set(range(4)) and len(masks.own) >= 2
    for number, version in masks.own.items():
        held = training.client(number).state[HELD]
        assert int(held["version"]) == version
        assert np.array_equal(masks.coding.of_tensors(held).mask, masks[version].mask)
    assert training.rows[-1]["density"] > training.rows[-1]["density_masked"]
    assert server.version == 3


def test_one_group_of_clients_is_no_group() -> None:
    options = ("method.hetero=[1.0]", "method.hetero_ends=[1.0]")
    one = train(*SMALL, *options, "method.aggregate=fma")
    other = train(*SMALL, "method.aggregate=fedavg")
    assert torch.equal(weights(one), weights(other))


@pytest.mark.parametrize("variant", ["spdst", "jmwst"])
def test_masks_of_groups_are_nested(variant: str) -> None:
    training = prepare(
        settings_of(
            *(*SMALL, f"method.variant={variant}", "method.aggregate=fma"),
            *("method.hetero=[0.5,0.75,1.0]", "method.hetero_ends=[0.3,0.6,1.0]"),
            "method.rebuild=aggregate",
        )
    )
    for number in (1, 2, 3):
        before = mask(training) if number > 1 else None
        training.strategy.run_round(training.grid, number, 3)
        told = training.server._now.versions  # pylint: disable=protected-access
        held = [training.client(number).state[HELD] for number in range(4)]
        masks = [training.server.masks.coding.of_tensors(own) for own in held]
        assert [own.version for own in masks] == [told[n] for n in range(4)]
        if number == 1:
            assert len({own.version for own in masks}) == 1
            continue
        small, middle, *whole = sorted(
            (own.mask for own in masks), key=np.count_nonzero
        )
        assert not (small & ~middle).any() and not (middle & ~whole[0]).any()
        assert np.array_equal(whole[0], whole[1])
        assert before is not None and np.array_equal(whole[0], before)
        half = int(small.sum()) / (0.05 * ELEMENTS)
        assert half == pytest.approx(0.5, abs=0.001)


def test_a_softmax_before_the_loss_is_an_option() -> None:
    """Its loss is between that of all right and that of all wrong, 1 apart."""
    row = train(*SMALL, "method.softmax=true", "rounds=1").rows[0]
    assert 1.46 < row["loss"] < 2.47 and 1.46 < row["test_loss"] < 2.47


# --- bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["jmwst", pytest.param("nst", marks=pytest.mark.slow)]
)
def test_no_way_of_coding_masks_changes_the_training(variant: str) -> None:
    options = (*SMALL, f"method.variant={variant}")
    runs = [train(*options, f"method.masks={way}") for way in ("auto", "given", "full")]
    runs.append(train(*options, "method.masks=packed"))
    for other in runs[1:]:
        assert torch.equal(weights(runs[0]), weights(other))
        assert without_bytes(runs[0].rows) == without_bytes(other.rows)
    sent = [run.traffic.bytes(MASK, "up") for run in runs]
    assert sent == sorted(sent) and sent[3] > ELEMENTS / 8


def test_what_is_sent_has_the_expected_size() -> None:
    """A set of exact values begins with 32 bytes: kept weights, then the rest."""
    training = train(*SMALL, "rounds=2")
    kept = round(0.05 * ELEMENTS)
    first, second = (row["bytes"]["training"] for row in training.rows)
    values = 4 * (4 * (kept + REST) + 32)
    assert first["up"] == {COUNTS: 4 * LAYERS, messages.MODEL: values}
    assert first["down"] == {MASK: 4 * (5 + 4 * LAYERS)}
    assert second["up"] == {messages.MODEL: values}
    assert second["down"] == {MASK: 4 * 5, messages.MODEL: values}
    assert training.traffic.dense(messages.MODEL) == 3 * 4 * DENSE


def test_updates_and_weights_are_sent_small() -> None:
    training = train("contender=flash_jmwst_compact", *SMALL[1:], "rounds=2")
    row = training.rows[-1]
    up = row["bytes"]["training"]["up"]
    down = row["bytes"]["training"]["down"]
    assert up[UPDATE] * 100 < 4 * DENSE and down[messages.MODEL] * 50 < 4 * DENSE
    assert row["top1"] > 0.05


def test_an_update_holds_what_the_one_before_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent is u + lost; what is lost then is that minus what was decoded."""
    overrides = [*SMALL, "clients=1", "dataset.limit=40", "rounds=2"]
    overrides += ["method.variant=nst", "compressor=ec", "compressor.error=0.5"]
    training = prepare(settings_of(*overrides, "method.feedback=true"))
    seen: list[Any] = []
    encode, changes = side.ValueCoding.encode, side._changes
    # pylint: disable=protected-access

    def record(coding: Any, kept: Any, counts: Any, rest: Any, *, seed: int) -> bytes:
        data = encode(coding, kept, counts, rest, seed=seed)
        if not coding.absolute:
            seen[-1] += [kept.clone(), rest["3.2.weight"].clone()]
            decoded, others = coding.decode(data, counts)
            seen[-1] += [decoded, others["3.2.weight"]]
        return data

    def plain(*arguments: Any) -> Any:
        kept, rest = changes(*arguments)
        seen.append([kept.clone(), rest["3.2.weight"].clone()])
        return kept, rest

    monkeypatch.setattr(side.ValueCoding, "encode", record)
    monkeypatch.setattr(side, "_changes", plain)
    elements = training.server.start.layers.elements
    lost, head = torch.zeros(elements), torch.zeros(10, 128)
    for number in (1, 2):
        training.strategy.run_round(training.grid, number, 2)
        at = torch.from_numpy(training.server.masks[number + 1].mask)
        own, weight, sent, sent_weight, decoded, decoded_weight = seen[-1]
        assert torch.equal(sent, own + lost[at])
        assert torch.equal(sent_weight, weight + head)
        assert 0 < float((sent - decoded).norm() / sent.norm()) <= 0.5
        lost, head = torch.zeros(elements), sent_weight - decoded_weight
        lost[at] = sent - decoded
        state = training.client(0).state[side.LOST]
        assert torch.equal(state[side.KEPT], lost[at])
        assert torch.equal(state["3.2.weight"], head)
    assert len(seen) == 2 and lost.any()


def test_the_server_adds_updates_to_weights_that_it_did_not_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes down at 8 bits is what clients begin with, not what is averaged."""
    overrides = [*SMALL, "clients=1", "dataset.limit=40", "rounds=2"]
    overrides += ["model_compressor=qu", "model_compressor.bits=8"]
    training = prepare(settings_of(*overrides))
    changes: list[torch.Tensor] = []
    decode = side.ValueCoding.decode

    def record(coding: Any, data: bytes, counts: Any) -> Any:
        kept, rest = decode(coding, data, counts)
        if not coding.absolute:
            changes.append(kept.clone())
        return kept, rest

    monkeypatch.setattr(side.ValueCoding, "decode", record)
    training.strategy.run_round(training.grid, 1, 2)
    before = weights(training)
    training.strategy.run_round(training.grid, 2, 2)
    at = torch.from_numpy(mask(training))
    assert len(changes) == 2
    assert torch.equal(weights(training)[at], before[at] + changes[1])


# --- failures -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_goes_on_without_a_client_that_fails(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when it has trained, its mask changed already."""
    handlers = dict(side.CLIENT.handlers)

    def fail(client: Any, content: Any) -> Any:
        reply = handlers[TRAIN](client, content)
        if client.number == 1 and messages.place_of(content)["round"] == 2:
            raise RuntimeError("out of order")
        return reply

    monkeypatch.setitem(side.CLIENT.handlers, TRAIN, fail)  # type: ignore[arg-type]
    training = train(*SMALL, f"method.variant={variant}", "rounds=3")
    assert [len(row["left_out"]) for row in training.rows] == [0, 1, 0]
    assert torch.isfinite(weights(training)).all()
    if variant == "nst":
        version = training.server.masks.own[1]
        held = training.client(1).state[HELD]
        assert int(held["version"]) == version == 1 + 1 + 2 * 4 + 1
        full = training.rows[2]["bytes"]["training"]["down"][MASK]
        assert full > 3 * 5 + 1000  # it gets the whole mask of the round before


def test_the_first_stage_goes_on_without_a_client_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers, failing = dict(side.CLIENT.handlers), {0, 1, 2}

    def fail(client: Any, content: Any) -> Any:
        if client.number in failing:
            raise RuntimeError("out of order")
        return handlers[WARMUP](client, content)

    monkeypatch.setitem(side.CLIENT.handlers, WARMUP, fail)  # type: ignore[arg-type]
    training = train(*SMALL, "method.warmup_fraction=1.0", "rounds=1")
    assert training.traffic.bytes(COUNTS, "up") == 4 * LAYERS
    assert [failure["client"] for failure in training.rows[0]["left_out"]] == [0, 1, 2]
    assert int(mask(training).sum()) == round(0.05 * ELEMENTS)
    failing.add(3)
    with pytest.raises(RunError, match="no client is left in the first stage"):
        train(*SMALL, "method.warmup_fraction=1.0", "rounds=1")


def test_a_client_whose_weights_are_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(coding: Any, data: bytes, counts: Any) -> Any:
        del data
        return torch.full((sum(counts),), torch.nan), dict(coding.rest)

    monkeypatch.setattr(side.ValueCoding, "decode", broken)
    with pytest.raises(RunError, match="step 0, client 0, .* weights not finite"):
        train(*SMALL, "rounds=1")


def test_weights_that_are_not_finite_end_the_run() -> None:
    with pytest.raises(RunError, match="round 1, step 0, client 0, pdst, .* finite"):
        train(*SMALL, "optimizer.lr=1e30", "method.variant=pdst")
    with pytest.raises(RunError, match="client 1, first stage: loss of local step 1"):
        train(*SMALL, "optimizer.lr=1e30")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.density=0", "method.density=0: must be a number greater than 0"),
        ("method.variant=set", "method.variant='set': must be one of dense, nst"),
        ("method.hetero=[0.5]", "the last one 1"),
        ("method.hetero=[0.5,1.0]", "method.hetero_ends=[]: must be"),
        ("method.hetero_ends=[1.0]", "method.hetero_ends=[1.0]: must be"),
        ("gradient_compressor=qu", "must be none with method=flash"),
    ],
)
def test_wrong_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(*SMALL, override)
    assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"\[\] unless variant is spdst or jmwst"):
        settings_of(*SMALL, "method.variant=nst", "method.hetero=[1.0]")
