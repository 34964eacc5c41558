"""Federated averaging equals what it must equal, and counts what it sends."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import nn
from torch.nn import functional

from masksl import model
from masksl.bench.steps import pytorchs
from masksl.compress import make
from masksl.config import ConfigError
from masksl.methods import client as clients
from masksl.methods.client import Client, Place
from masksl.methods.fedavg.messages import SCORE, score_of, score_record
from masksl.methods.fedavg.server import FedAvgServer
from masksl.methods.global_model import GlobalModel
from masksl.runtime.messages import FrameError, RunError
from masksl.runtime.round import Round
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.training.score import Score
from masksl.utils import derive_seed
from tests.conftest import (
    TIMED,
    Training,
    prepare,
    settings_of,
    train,
    untimed,
)

SMALL = (
    *("method=fedavg", "rounds=2", "clients=3", "dataset.limit=100"),
    *("dataset.test_limit=40", "threads.server=1"),
)


@pytest.fixture(autouse=True)
def networks() -> Iterator[None]:
    """Register two networks: one with BatchNorm and dropout, one of two tensors."""

    def build(classes: int, channels: int) -> model.Units:
        conv = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        )
        head = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.LazyLinear(classes))
        size = 32 if channels == 3 else 8
        nn.Sequential(conv, head)(torch.zeros(2, channels, size, size))
        conv[1].reset_running_stats()
        return [conv, head]

    def linear(classes: int, channels: int) -> model.Units:
        return [nn.Sequential(nn.Flatten()), nn.Linear(64 * channels, classes)]

    architectures = model.ARCHITECTURES
    architectures["dropout_cnn"] = model.Architecture(build, 2, {}, (), (1, 3))
    architectures["linear"] = model.Architecture(linear, 2, {}, (), (1,))
    yield
    del architectures["dropout_cnn"], architectures["linear"]


# --- identities -----------------------------------------------------------------------


def central(
    training: Training, rounds: int, epochs: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train one network in a plain loop on what the one client sees.

    The optimiser starts anew in each round, as that of a client does.
    """
    settings, client = training.strategy.settings, training.client(0)
    seed = int(settings["seed"])
    name = str(settings["model.name"])
    units = model.build(name, 10, 3, seed=derive_seed(seed, "model"))
    network = nn.Sequential(*units).train()
    losses = []
    torch.set_num_threads(1)
    for number in range(1, rounds + 1):
        optimizer = pytorchs(training.strategy.optimizer, network.parameters())
        total, samples = 0.0, 0
        for step in range(epochs * client.train_steps()):
            images, labels = client.train_batch(Place(number, step))
            place = {"client": 0, "round": number, "step": step}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "dropout.client", **place))
                loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            samples += len(labels)
        losses.append(total / samples)
    return losses, network.state_dict()


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("network", ["dropout_cnn", "resnet8"])
def test_one_client_is_central_training_bit_for_bit(network: str, name: str) -> None:
    overrides = (
        *("method=fedavg", "dataset.name=toy", f"model.name={network}", "clients=1"),
        *("dataset.limit=60", "dataset.test_limit=8", "batch_size=8", "rounds=2"),
        *("method.local_epochs=2", "optimizer.lr=0.01", "optimizer.nesterov=false"),
        f"optimizer.name={name}",
    )
    losses, weights = central(prepare(settings_of(*overrides)), 2, 2)
    training = train(*overrides)
    assert training.losses == losses
    assert [row["loss"] for row in training.rows] == losses
    assert [row["samples"] for row in training.rows] == [120, 120]
    tensors = training.server.model.tensors
    assert tensors.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize("options", [(), ("compressor=sign",)], ids=str)
def test_parameters_go_as_most_clients_do(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    real = FedAvgServer._decode

    def kept(self: Any, content: RecordDict) -> dict[str, torch.Tensor]:
        seen[len(seen)] = real(self, content)
        return seen[len(seen) - 1]

    monkeypatch.setattr(FedAvgServer, "_decode", kept)
    rule = ("method.aggregate=majority", "method.server_lr=0.01", "rounds=1")
    training = prepare(settings_of(*SMALL, *rule, *options))
    before = {n: t.clone() for n, t in training.server.model.tensors.items()}
    training.strategy.run_round(training.grid, 1, 1)
    server = training.server
    assert len(seen) == 3
    for name, tensor in server.model.tensors.items():
        sent = torch.stack([own[name].double() for own in seen.values()])
        if name not in server.model.parameters:
            continue
        if not options:
            sent = sent.float() - before[name]
        votes = (sent > 0).sum(0) - (sent < 0).sum(0)
        assert set(votes.unique().tolist()) <= set(range(-3, 4))
        expected = before[name] + 0.01 * votes.sign()
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-8)
        if options:  # each sign is a vote
            assert bool((votes != 0).all())


def test_passes_are_shuffled_anew() -> None:
    client = prepare(settings_of(*SMALL)).client(1)
    steps = client.train_steps()
    assert steps == 2
    labels = [
        torch.cat([client.train_batch(Place(1, p * steps + s))[1] for s in range(2)])
        for p in range(3)
    ]
    assert len({tuple(own.tolist()) for own in labels}) == 3
    assert len({tuple(own.sort().values.tolist()) for own in labels}) == 1


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("compressor=qu", "compressor.bits=8", "compressor.rounding=stochastic"),
        ("method.server_lr=0.5",),
        ("model_compressor=qu", "model_compressor.bits=8"),
    ],
    ids=str,
)
def test_equal_clients_have_the_model_of_one(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All clients have the same data and draw the same numbers."""

    def seed(client: Client, purpose: str, place: Place) -> int:
        return derive_seed(client.run.seed, purpose, round=place.round, step=place.step)

    monkeypatch.setattr(Client, "seed", seed)
    shard = torch.arange(60)
    monkeypatch.setattr(clients, "partition", lambda _, number, seed: [shard] * number)
    runs = {}
    for number in (1, 2, 3, 8, 16):
        training = train(*SMALL, *options, f"clients={number}")
        assert training.rows[0]["samples"] == 60 * number
        runs[number] = training.server.model.tensors
    for number, tensors in runs.items():
        for name, tensor in runs[1].items():
            assert torch.equal(tensors[name], tensor), (number, name)


def trained(*overrides: str) -> tuple[Training, dict[str, torch.Tensor], Any, Any]:
    """Run a first round up to its average.

    Returns the run, the initial model, what every client sent, and weights.
    """
    training = prepare(settings_of(*SMALL, "dataset.partition=dirichlet", *overrides))
    server, manager = training.server, training.strategy.clients
    start = {name: t.clone() for name, t in server.model.tensors.items()}
    rates = Rates(ScheduleConfig(), 0.05, 1, 1)
    round_ = Round(1, rates, manager.clients, manager, steps=1)
    assert server.steps(round_) == 1
    server.run_step(round_, 0)
    received = dict(server._received)  # pylint: disable=protected-access
    server.finish(round_)
    return training, start, received, [c.train_samples for c in manager.clients]


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_average_is_weighted_by_samples(rate: float) -> None:
    training, start, received, weights = trained(f"method.server_lr={rate}")
    assert len(set(weights)) > 1 and list(received) == [0, 1, 2]
    shares = [weight / sum(weights) for weight in weights]
    for name, tensor in training.server.model.tensors.items():
        parts = [received[number][name] for number in range(3)]
        if not tensor.is_floating_point():
            assert int(tensor) == max(map(int, parts)) > 0
            continue
        mean = torch.zeros(tensor.shape, dtype=torch.float64)
        for share, part in zip(shares, parts, strict=True):
            mean += share * part.double()
        if name in training.server.model.parameters and rate != 1:
            mean = start[name] + rate * (mean - start[name])
            torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(tensor, mean.float()), name


def test_updates_are_added_to_the_model_that_clients_decoded() -> None:
    training, start, received, weights = trained(
        *("compressor=sp", "compressor.sparsity=0.9", "method.server_lr=0.5")
    )
    for name, tensor in training.server.model.tensors.items():
        if name not in training.server.model.parameters:
            continue
        kept = [int((received[n][name] != 0).sum()) for n in range(3)]
        assert all(k <= max(1, tensor.numel() / 10 + 1) for k in kept), name
        mean = sum(
            (w / sum(weights)) * received[n][name].double()
            for n, w in enumerate(weights)
        )
        expected = start[name] + 0.5 * mean
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-8)


def test_an_exact_update_leads_to_the_same_model() -> None:
    """Of `sp` that keeps everything: model and update differ by rounding alone."""
    whole = train(*SMALL)
    updates = train(*SMALL, "compressor=sp", "compressor.sparsity=0")
    for name, tensor in whole.server.model.tensors.items():
        other = updates.server.model.tensors[name]
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)


# --- what is sent ---------------------------------------------------------------------

LINEAR = (*SMALL, "model.name=linear", "rounds=3")


def test_bytes_of_two_tensors_by_hand() -> None:
    """A weight of 10 x 64 and a bias of 10."""
    exact = 32 + 4 * (640 + 10)
    training = train(*LINEAR)
    first, second, third = training.rows
    assert first["bytes"] == {"training": {"up": {"model": 3 * exact}}}
    both = {"up": {"model": 3 * exact}, "down": {"model": 3 * exact}}
    assert second["bytes"] == third["bytes"] == {"training": both}
    assert third["messages"]["training"] == {"up": {"model": 3}, "down": {"model": 3}}
    assert training.traffic.dense() == 5 * 3 * 4 * 650

    # marks of two tensors; for each 9 bytes, 18 of parameters, a byte an element
    coded = 32 + 1 + 2 * (9 + 18) + 640 + 10
    training = train(*LINEAR, "compressor=qu", "compressor.bits=8")
    both = {"up": {"update": 3 * coded}, "down": {"model": 3 * exact}}
    assert training.rows[1]["bytes"] == {"training": both}
    summary = training.server.summary(training.rows, training.traffic)
    assert summary["compression_factor"] == 4 * 650 / coded
    assert summary["bits_per_element"] == 8 * coded / 650

    options = ("model_compressor=qu", "model_compressor.bits=8")
    training = train(*LINEAR, *options)
    both = {"up": {"model": 3 * exact}, "down": {"model": 3 * coded}}
    assert training.rows[1]["bytes"] == {"training": both}
    assert training.traffic.dense("model", "down") == 2 * 3 * 4 * 650


def test_half_floats_are_an_update() -> None:
    training = train(*LINEAR, "compressor.values=bfloat16")
    assert training.rows[0]["bytes"]["training"]["up"].keys() == {"update"}
    assert training.server.summary([], training.traffic)["bits_per_element"] < 17


def test_only_those_who_lack_the_model_get_it() -> None:
    options = (*SMALL, "clients=4", "fraction=0.5", "rounds=3")
    training = train(*options)
    assert "down" not in training.rows[0]["messages"]["training"]
    for row in training.rows[1:]:
        assert row["messages"]["training"] == {"up": {"model": 2}, "down": {"model": 2}}
    versions = [client.version for client in training.strategy.clients.clients]
    assert sorted(versions)[-1] == 2  # nobody has what was made last, version 3
    training = train(*options, "method.evaluate=clients")
    for row in training.rows:
        assert row["messages"] == {
            "training": {"up": {"model": 2}},
            "evaluation": {"up": {"score": 4}, "down": {"model": 4}},
        }
    assert {client.version for client in training.strategy.clients.clients} == {3}


def test_both_evaluations_agree() -> None:
    here, there = train(*SMALL), train(*SMALL, "method.evaluate=clients")
    for row, other in zip(here.rows, there.rows, strict=True):
        assert "evaluation" not in row["bytes"]
        assert other["bytes"]["evaluation"]["up"] == {"score": 3 * 16}
        for key in ("loss", "top1", "top5"):
            assert row[key] == other[key]
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
    alone = train(*SMALL, "method.evaluate=clients", "clients=1")
    few = train(*SMALL, "method.evaluate=clients", "dataset.test_limit=2")
    assert alone.rows[0]["messages"]["evaluation"]["up"]["score"] == 1
    assert few.rows[0]["messages"]["evaluation"]["up"]["score"] == 2


@pytest.mark.parametrize("compressor", ["none", "sp"])
def test_replicas_are_equal_bit_for_bit(compressor: str) -> None:
    """What clients decode is what the server scores and adds to."""
    training = prepare(
        settings_of(
            *(*SMALL, "rounds=3", "method.evaluate=clients", "model=resnet8"),
            *("dataset.name=toy", f"compressor={compressor}", "model_compressor=qu"),
            *("model_compressor.bits=5", "model_compressor.rounding=stochastic"),
        )
    )
    for number in range(1, 4):
        training.strategy.run_round(training.grid, number, 3)
        tensors = training.server.model.tensors
        assert len(tensors["1.conv1.weight"].unique()) <= 32
        assert int(tensors["0.1.num_batches_tracked"]) > 0
        for client in range(3):
            theirs = training.client_tensors(client)
            assert list(theirs) == list(tensors)
            assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


def test_a_compressed_model_survives_its_state() -> None:
    """Restored, the same bytes are sent, although encoding anew gives others."""
    compressor = make("rt", sparsity=0.5, evaluation="random")
    start = {"w": torch.randn(50), "n": torch.tensor(3)}
    ours, theirs = (
        GlobalModel(dict(start), ["w"], compressor=compressor) for _ in range(2)
    )
    ours.replace({"w": torch.randn(50), "n": torch.tensor(4)}, seed=5)
    groups = ours.state()
    assert groups.keys() == {"model", "model.sent"}
    flat = {f"{g}/{n}": t for g, members in groups.items() for n, t in members.items()}
    theirs.load(flat, ours.version)
    assert theirs.record()["frame"].data == ours.record()["frame"].data
    assert torch.equal(theirs.tensors["w"], ours.tensors["w"])
    assert theirs.optimizer_state == {}
    ours.replace(dict(ours.tensors), seed=6)
    assert theirs.record()["frame"].data != ours.record()["frame"].data


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.local_epochs=0", "method.local_epochs=0: must be a whole number from"),
        ("method.local_epochs=1.5", "method.local_epochs=1.5: must be a whole number"),
        ("method.server_lr=0", "method.server_lr=0: must be a number greater than 0"),
        ("method.server_lr=1e31", "method.server_lr=1e+31: must be a number greater t"),
        ("method.server_lr=inf", "method.server_lr=inf: must be a number greater"),
        ("method.evaluate=x", "method.evaluate='x': must be one of server, clients"),
        (
            "gradient_compressor=qu",
            "gradient_compressor.name='qu': must be none with method=fedavg",
        ),
        (
            "gradient_compressor.values=bfloat16",
            "gradient_compressor.values='bfloat16': must be float32 with method=fedavg",
        ),
        ("model_compressor.values=x", "model_compressor.values='x': must be one of"),
        ("+cut=2", "cut=2: must be one of rounds, "),
        (
            "+client_sync=round",
            "client_sync='round': must be a known name, near ones: ",
        ),
        (
            "+gradient_positions=all",
            "gradient_positions='all': must be one of rounds, ",
        ),
        ("+method.momentum=1", "method.momentum=1: must be one of method.name, "),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of("method=fedavg", override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_keys_of_split_are_named() -> None:
    for key in ("cut", "client_sync", "gradient_positions"):
        with pytest.raises(ConfigError, match=key):
            settings_of("method=fedavg", f"{key}=1")


def test_the_default_compressor_is_none() -> None:
    settings = settings_of("method=fedavg")
    names = {key: settings[key] for key in settings if key.endswith("compressor.name")}
    assert set(names.values()) == {"none"} and len(names) == 3
    assert settings_of("method=fedavg", "compressor=sp")["compressor.name"] == "sp"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optimizer.lr=1e30",),
            r"^round 1, step 0, client 0, compressor none: loss of local step \d not f",
        ),
        (
            ("compressor=sp", "optimizer.lr=1e30"),
            r"^round 1, step 0, client 0, compressor sp: loss of local step \d not fin",
        ),
        (
            ("batch_size=100", "optimizer.lr=1e30", "optimizer.weight_decay=1e12"),
            "^round 1, step 0, client 0, compressor none: tensor .*: .* not finite$",
        ),
        (("method.server_lr=1e30",), "^round 1, evaluation: loss not finite$"),
        (
            ("method.server_lr=1e30", "optimizer.lr=1e12", "batch_size=100"),
            "^round 1, averaged model: not finite$",
        ),
    ],
)
def test_divergence_ends_a_run_with_one_line(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        train(*SMALL, *overrides)


def test_a_client_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is that of the others, and it gets the model again."""
    handlers: Any = prepare(settings_of(*SMALL)).client(0).setup.method.handlers
    handler = handlers["train.local"]

    def fail(client: Client, content: Any) -> Any:
        if client.number == 1 and content["place"]["round"] == 1:
            raise ValueError("out of paper")
        return handler(client, content)

    monkeypatch.setitem(handlers, "train.local", fail)
    training = train(*SMALL)
    first, second = training.rows
    assert first["left_out"] == [{"client": 1, "phase": "training", "step": 0}]
    assert first["samples"] == 67 and second["samples"] == 100
    assert second["messages"]["training"] == {"up": {"model": 3}, "down": {"model": 3}}


def test_a_score_has_sixteen_bytes_and_fits_its_shard() -> None:
    given = Score(40, 12.5, 30, 39)
    record: Any = score_record(given)
    content = RecordDict({SCORE: record})
    assert score_of(content, 40) == given
    assert len(record[SCORE].data) == 16
    with pytest.raises(FrameError, match="score of 30 and 39 hits among 38 samples"):
        score_of(content, 38)
    record[SCORE].data = b"short"
    with pytest.raises(FrameError, match="message without a score"):
        score_of(content, 40)


def test_evaluating_more_often_changes_nothing() -> None:
    """A round has one step, after which it is scored anyway."""
    once, often = train(*SMALL), train(*SMALL, "evaluations=4")
    assert untimed(once.rows) == untimed(often.rows)
    assert all(key in once.rows[0] for key in TIMED)
