"""SASG and its baselines equal what they must equal, and count what they send."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn
from torch.nn import functional

from masksl import model
from masksl.compress import make
from masksl.config import ConfigError
from masksl.methods.client import Place
from masksl.methods.sasg.client import (
    FLAT,
    MEMORY,
    REFERENCE,
    SKIPS,
    WEIGHTS,
    gradient,
)
from masksl.methods.sasg.messages import (
    BUFFERS,
    SKIP,
    THRESHOLD,
    TRAIN,
    UPDATE,
    threshold_record,
)
from masksl.methods.sasg.server import _rate_before
from masksl.methods.sasg.vectors import Layout, squared_norm
from masksl.runtime.compressors import EXACT
from masksl.runtime.messages import DIGEST, MODEL, PLACE, RunError
from masksl.runtime.round import Round
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.utils import derive_seed
from tests.conftest import prepare, settings_of, train, untimed

SMALL = (
    *("method=sasg", "clients=4", "dataset.limit=160", "batch_size=10", "rounds=3"),
    *("dataset.test_limit=40", "threads.server=1", "model.name=linear"),
    *("optimizer.lr=0.05", "method.delay=3", "method.history=2", "compressor=topk"),
)
EXACTLY = ("compressor.sparsity=0",)
SGD = ("method.upload=dense", "method.adaptive=false")
LASG = ("method.upload=dense",)
SPARSE = ("method.adaptive=false",)
METHODS = {"sgd": SGD, "lasg": LASG, "sparse": SPARSE, "sasg": ()}


@pytest.fixture(autouse=True)
def networks() -> Iterator[None]:
    """Register a network of two tensors, 640 weights and 10 biases."""

    def linear(classes: int, channels: int) -> model.Units:
        return [nn.Flatten(), nn.Linear(64 * channels, classes)]

    model.ARCHITECTURES["linear"] = model.Architecture(linear, 2, {}, (), (1,))
    yield
    del model.ARCHITECTURES["linear"]


def weights(*overrides: str) -> torch.Tensor:
    """Return w at the end of a run."""
    flat: torch.Tensor = train(*SMALL, *overrides).server.weights.flat
    return flat


# --- identities -----------------------------------------------------------------------


def test_sgd_is_the_mean_gradient_at_a_rate_as_many_times_as_large() -> None:
    """Rate and number of workers are powers of two, so that nothing is rounded."""
    training = train(*SMALL, *SGD, "optimizer.lr=0.0078125")
    seed = int(training.strategy.settings["seed"])
    units = model.build("linear", 10, 1, seed=derive_seed(seed, "model"))
    network = nn.Sequential(*units)
    torch.set_num_threads(1)
    for number in range(1, 4):
        for step in range(4):
            sums = [torch.zeros_like(p) for p in network.parameters()]
            for worker in range(4):
                images, labels = training.client(worker).train_batch(
                    Place(number, step)
                )
                loss = functional.cross_entropy(network(images), labels)
                gradients = torch.autograd.grad(loss, list(network.parameters()))
                sums = [a + b for a, b in zip(sums, gradients, strict=True)]
            with torch.no_grad():
                for parameter, total in zip(network.parameters(), sums, strict=True):
                    parameter -= 4 * 0.0078125 * (total / 4)
    tensors = training.server.layout.named(training.server.weights.flat)
    for name, parameter in network.named_parameters():
        assert torch.equal(tensors[name], parameter), name


@pytest.mark.parametrize(("other", "upload"), [(SPARSE, ()), (SGD, LASG)])
def test_without_the_rule_everybody_uploads(
    other: tuple[str, ...], upload: tuple[str, ...]
) -> None:
    off = train(*SMALL, *upload, "method.constant=0")
    assert torch.equal(off.server.weights.flat, weights(*other))
    assert sum(row["uploads"] for row in off.rows) == 4 * 12
    assert not off.traffic.bytes(THRESHOLD) and not off.traffic.bytes(SKIP)


@pytest.mark.parametrize(("sparse", "dense"), [((), LASG), (SPARSE, SGD)])
def test_all_elements_kept_are_a_dense_upload(
    sparse: tuple[str, ...], dense: tuple[str, ...]
) -> None:
    kept = train(*SMALL, *sparse, *EXACTLY, "rounds=8", "method.constant=40")
    whole = train(*SMALL, *dense, "rounds=8", "method.constant=40")
    assert torch.equal(kept.server.weights.flat, whole.server.weights.flat)
    skips = [sum(row["skips"] for row in run.rows) for run in (kept, whole)]
    assert skips[0] == skips[1]
    assert (skips[0] > 0) == (not sparse)
    assert not kept.client(0).state[MEMORY][FLAT].any()


def test_an_infinite_constant_has_all_upload_in_every_eleventh_iteration() -> None:
    training = train(
        *("method=sasg", "clients=10", "dataset.limit=100", "batch_size=10"),
        *("model.name=linear", "rounds=100", "method.constant=1e30"),
        *("dataset.test_limit=20", "threads.server=1"),
    )
    uploads = [row["uploads"] for row in training.rows]
    expected = [10 * (t < 10 or t >= 21 and (t - 21) % 11 == 0) for t in range(100)]
    assert uploads == expected and sum(uploads) == 180


@pytest.mark.parametrize("constant", [10, 40, 400])
def test_uploads_and_skips_are_all_iterations(constant: int) -> None:
    training = train(*SMALL, "rounds=12", f"method.constant={constant}")
    uploads, skips = (sum(r[k] for r in training.rows) for k in ("uploads", "skips"))
    assert uploads + skips == 4 * 48
    assert 4 * 3 < uploads < 4 * 48
    assert all(0 <= worker.skips <= 4 for worker in training.server.workers)


def test_a_worker_that_has_nothing_new_skips() -> None:
    """The same batch at the weights of its last upload: the difference is zero."""
    training = train(*SMALL, "rounds=1")
    client = training.client(2)
    now = client.state[WEIGHTS][FLAT]
    assert torch.equal(now, training.server.weights.previous)
    client.state[REFERENCE] = {FLAT: now.clone()}
    reply = gradient(client, message(1, 0, threshold=0.0))
    assert SKIP in reply and UPDATE not in reply
    memory = client.state[MEMORY][FLAT].clone()
    client.state[REFERENCE] = {FLAT: now + 1}
    assert UPDATE in gradient(client, message(1, 0, threshold=0.0))
    assert torch.equal(client.state[REFERENCE][FLAT], now)
    assert not torch.equal(client.state[MEMORY][FLAT], memory)
    memory = client.state[MEMORY][FLAT].clone()
    for skips in (2, 3, 4):  # once more than the delay, from an upload on
        assert SKIP in gradient(client, message(1, 0, threshold=1e9))
        assert int(client.state[SKIPS]["number"]) == skips
    assert UPDATE in gradient(client, message(1, 0, threshold=1e9))
    assert int(client.state[SKIPS]["number"]) == 1
    assert not torch.equal(client.state[MEMORY][FLAT], memory)


def message(round_: int, step: int, threshold: float | None) -> Any:
    place = {"round": round_, "step": step, "lr": 0.05}
    content = RecordDict({PLACE: ConfigRecord(place)})  # type: ignore[arg-type]
    if threshold is not None:
        content[THRESHOLD] = threshold_record(threshold)
    return content


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_what_is_not_sent_is_remembered(values: str) -> None:
    layout = Layout.of(nn.Linear(50, 20))
    change = torch.randn(layout.elements)
    compressor = make("sp", sparsity=0.9, values=values)
    data = layout.encode(change, compressor, seed=0)
    vector = layout.decode_vector(data, compressor)
    memory = change.clone()
    vector.take_from(memory)
    whole = memory.clone()
    vector.add_to(whole)
    assert vector.positions is not None and len(vector.positions) == 100 + 2
    if values == "float32":
        assert torch.equal(whole, change)
        assert not memory[vector.positions].any()
    else:
        torch.testing.assert_close(whole, change, rtol=2**-23, atol=0)
        assert memory[vector.positions].any()


# --- the way down ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("compressor=ec", "compressor.error=0.3"),
        ("compressor=spsign", "compressor.sparsity=0.9"),
        pytest.param(
            ("compressor=spsign", "model.name=small_cnn"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_all_ways_down_give_the_same_weights(options: tuple[str, ...]) -> None:
    found = {}
    for way in ("dense", "sum", "relay"):
        run = train(*SMALL, *options, f"method.down={way}", "method.constant=20")
        assert sum(row["skips"] for row in run.rows) > 0
        found[way] = run.server.weights.flat
        for number in range(4):
            held = run.client(number).state[WEIGHTS][FLAT]
            assert torch.equal(held, run.server.weights.previous), (way, number)
    assert torch.equal(found["sum"], found["dense"])
    assert torch.equal(found["relay"], found["dense"])


@pytest.mark.parametrize("way", ["dense", "sum", "relay"])
def test_what_workers_share_changes_nothing(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker computes everything itself, as if it were alone."""
    job = (*SMALL, "compressor=spsign", f"method.down={way}", "method.constant=20")
    expected = train(*job)
    handlers: Any = expected.client(0).setup.method.handlers
    real = handlers[TRAIN]

    def alone(client: Any, content: Any) -> Any:
        client.setup.caches.method = None
        return real(client, content)

    monkeypatch.setitem(handlers, TRAIN, alone)
    found = train(*job)
    assert torch.equal(found.server.weights.flat, expected.server.weights.flat)
    assert untimed(found.rows) == untimed(expected.rows)


@pytest.mark.parametrize("way", ["dense", "sum", "relay"])
def test_weights_that_differ_are_sent_once(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one worker the initial weights are others, as of another processor."""
    job = (*SMALL, f"method.down={way}")
    handlers: Any = prepare(settings_of(*job)).client(0).setup.method.handlers
    real = handlers[TRAIN]

    def other(client: Any, content: Any) -> Any:
        place = content[PLACE]
        if client.number == 2 and (place["round"], place["step"]) == (1, 0):
            initial = Layout.of(client.setup.module).flat(client.setup.initial)
            client.state[WEIGHTS] = {FLAT: initial + 1e-6}
        return real(client, content)

    monkeypatch.setitem(handlers, TRAIN, other)
    training = train(*job)
    size, times = 32 + 4 * 650, 4 * 11 if way == "dense" else 1
    assert training.traffic.bytes(MODEL, "down") == times * size
    for number in range(4):
        held = training.client(number).state[WEIGHTS][FLAT]
        assert torch.equal(held, training.server.weights.previous)


def test_a_repeated_round_does_not_take_a_step_of_the_first_try() -> None:
    """Gradients of the repeat differ a little, as on a GPU they may."""
    training = prepare(settings_of(*SMALL))
    strategy, server = training.strategy, training.server
    round_ = Round(1, Rates(strategy.schedule, 0.05, 1, 3), [], strategy.clients)
    round_.clients = strategy.clients.sample(1)
    round_.steps = server.steps(round_)
    for step in range(2):
        server.run_step(round_, step)
    strategy.restore(strategy.snapshot)
    strategy.register(training.grid)
    round_.clients = strategy.clients.sample(1)
    round_.rates = Rates(strategy.schedule, 0.05001, 1, 3)
    for step in range(3):
        server.run_step(round_, step)
    for number in range(4):
        held = training.client(number).state[WEIGHTS][FLAT]
        assert torch.equal(held, server.weights.previous)


@pytest.mark.parametrize("elements", [10_000, 101_770, 407_050])
def test_norms_do_not_depend_on_threads(elements: int) -> None:
    flat, found = torch.randn(elements) * 1e-3, set()
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.add(squared_norm(flat))
    torch.set_num_threads(before)
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(flat.double().norm()) ** 2, rel=1e-12)


def test_bytes_by_hand() -> None:
    """Each byte of 12 iterations of four workers, of which 9 may skip."""
    # One frame-set: 6 of 640 weights and 1 of 10 biases, as values and indices.
    one = 32 + 1 + (9 + 11) + 7 * (4 + 4)
    options = ("compressor.positions=paper", "method.constant=20")
    training = train(*SMALL, *options)
    rows, traffic = training.rows, training.traffic
    uploads, skips = (sum(row[key] for row in rows) for key in ("uploads", "skips"))
    assert skips > 0
    assert traffic.bytes(UPDATE, "up") == uploads * one
    assert traffic.bytes(SKIP, "up") == skips
    assert traffic.bytes(THRESHOLD, "down") == 8 * 4 * (12 - 3)
    last = len(training.server.workers.fresh)
    assert traffic.bytes(UPDATE, "down") == 3 * (uploads - last) * one
    assert traffic.bytes("senders", "down") == 4 * 11
    kinds = [(UPDATE, "up"), (SKIP, "up"), (THRESHOLD, "down"), (UPDATE, "down")]
    every = sum(traffic.bytes(*kind) for kind in kinds)
    assert traffic.bytes(DIGEST, "up") == 8 * 4 * 3
    others = traffic.bytes("senders", "down") + traffic.bytes(DIGEST)
    assert traffic.bytes() == every + others


def test_a_dense_way_down_sends_the_model_to_all() -> None:
    training = train(*SMALL, *SGD)
    traffic, size = training.traffic, 32 + 4 * 650
    assert traffic.bytes(UPDATE, "up") == 4 * 12 * size
    assert traffic.bytes("model", "down") == 4 * 11 * size
    assert traffic.bytes() == 4 * 23 * size + 8 * 4 * 3


def test_batch_statistics_are_sent_for_evaluations() -> None:
    network = ("model.name=small_cnn", "rounds=1", "evaluations=2")
    training = train(*SMALL, *network)
    buffers = training.server.buffers
    assert len(buffers) == 9
    size = 32 + sum(tensor.nbytes for tensor in buffers.values())
    assert training.traffic.bytes("buffer", "up") == 2 * 4 * size
    own = [training.client(n).state["buffers"] for n in range(4)]
    name = next(name for name in buffers if name.endswith("running_mean"))
    mean = torch.stack([tensors[name].double() for tensors in own]).mean(0).float()
    torch.testing.assert_close(buffers[name], mean, rtol=1e-6, atol=1e-7)
    assert not torch.equal(own[0][name], own[1][name])
    # One pass an iteration: those at the weights of the last upload leave no trace.
    counts = [t for n, t in own[0].items() if n.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [4] * 3


# --- the threshold --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lag", "rates"),
    [("1", [0.1, 0.1]), ("0", [0.05, 0.05]), ("0.5", [0.1, 0.05])],
)
def test_threshold(lag: str, rates: list[float]) -> None:
    """In round 3 the rate falls from 0.1 to 0.05; its steps 0 and 2 are looked at."""
    training = prepare(
        settings_of(
            *SMALL,
            *("optimizer.lr=0.1", "schedule.name=multistep", "schedule.gamma=0.5"),
            *("schedule.milestones=[2]", f"method.threshold_lag={lag}"),
        )
    )
    for number in (1, 2):
        training.strategy.run_round(training.grid, number, 3)
    server = training.server
    schedule = training.strategy.schedule
    round_ = Round(3, Rates(schedule, 0.1, 3, 3), [], training.strategy.clients)
    round_.steps = 4
    history = server.weights.history
    assert len(history) == 2 and [past.rate for past in history] == [0.1, 0.1]
    total = sum(past.square for past in history)
    for i, step in enumerate((0, 2)):
        found = server._threshold(round_, step)  # pylint: disable=protected-access
        assert found == pytest.approx(0.5 / (rates[i] * 16) * total, rel=1e-12)


def test_threshold_with_the_rate_of_each_step() -> None:
    training = prepare(
        settings_of(
            *(*SMALL, "optimizer.lr=0.1", "schedule.name=multistep"),
            *("schedule.gamma=0.5", "schedule.milestones=[1]", "method.history=6"),
            *("method.threshold_lag=step", "rounds=2"),
        )
    )
    for number in (1, 2):
        training.strategy.run_round(training.grid, number, 2)
    history = training.server.weights.history
    assert [past.rate for past in history] == [0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    expected = 0.5 / 16 * sum(past.square / past.rate for past in history)
    rates = Rates(training.strategy.schedule, 0.1, 2, 2)
    round_ = Round(2, rates, [], training.strategy.clients)
    found = training.server._threshold(round_, 3)  # pylint: disable=protected-access
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [4, 10, 500, 600])
@pytest.mark.parametrize("lag", [0.1, 0.3, 0.7, 1.1, 2.5])
def test_the_rate_is_late_by_as_many_steps(steps: int, lag: float) -> None:
    """In one long run with a rate that halves after the second round."""
    schedule = ScheduleConfig(name="multistep", milestones=(2,), gamma=0.5)
    manager = prepare(settings_of(*SMALL)).strategy.clients
    every = []
    for number in range(1, 6):
        round_ = Round(number, Rates(schedule, 1.0, number, 5), [], manager)
        round_.steps = steps
        every += [_rate_before(round_, step, lag) for step in range(steps)]
    late = 2 * steps + round(lag * steps)
    assert every == [1.0] * late + [0.5] * (5 * steps - late)


def test_the_first_iterations_have_no_threshold() -> None:
    training = train(*SMALL, "rounds=1", "method.delay=4")
    assert training.traffic.bytes(THRESHOLD) == 0
    assert training.rows[0]["uploads"] == 16


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("fraction=0.5", "fraction=0.5: must be 1.0 with method=sasg, where every"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9: must be 0.0 with method"),
        ("optimizer.name=adam", "optimizer.name='adam': must be sgd with method=sasg"),
        ("model_compressor=qu", "model_compressor.name='qu': must be none with method"),
        ("method.delay=0", "method.delay=0: must be a whole number from 1 to 1000000"),
        ("method.threshold_lag=late", "method.threshold_lag='late': must be step or a"),
        ("method.down=up", "method.down='up': must be one of auto, dense, sum, relay"),
    ],
)
def test_what_is_refused(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(*SMALL, override)
    assert str(error.value).startswith(line)


def test_a_sum_of_dense_uploads_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be auto or dense with upload=dense"):
        settings_of(*SMALL, *SGD, "method.down=sum")


@pytest.mark.parametrize(("kind", "step"), [(TRAIN, 2), (BUFFERS, 0)])
@pytest.mark.parametrize("failing", [{3}, {0, 1, 2, 3}])
def test_a_worker_that_fails_ends_the_run(
    kind: str, step: int, failing: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = prepare(settings_of(*SMALL, "model.name=small_cnn"))
    handlers: Any = training.client(3).setup.method.handlers
    real = handlers[kind]

    def fail(client: Any, content: Any) -> Any:
        if client.number in failing and content[PLACE]["step"] == step:
            raise RuntimeError("the disk is on fire")
        return real(client, content)

    monkeypatch.setitem(handlers, kind, fail)
    with pytest.raises(RunError, match=r"method=sasg needs every worker; client 3: .*"):
        training.strategy.run_round(training.grid, 1, 3)


def test_exact_gradients_that_are_not_finite_are_refused() -> None:
    layout = Layout.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        layout.encode(torch.full((6,), torch.inf), EXACT, seed=0)
