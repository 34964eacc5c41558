"""Split learning equals what it must equal: identities over whole runs."""

import pickle
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from masksl import compress, dataset, model
from masksl.bench.steps import pytorchs
from masksl.compress import decode
from masksl.methods.client import Client, Place
from masksl.methods.split import client as split_client
from masksl.methods.split.client import GRAPHS, GraphCache
from masksl.methods.split.payloads import one_of_each_map
from masksl.methods.split.server_half import ServerHalf
from masksl.runtime.round import Round
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import OptimizerConfig
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.utils import derive_seed
from tests.conftest import (
    TIMED,
    Training,
    prepare,
    settings_of,
    train,
    untimed,
)

UNSPLIT = (
    "dataset=digits",
    "dataset.name=toy",
    "dataset.limit=160",
    "dataset.test_limit=8",
    "compressor=none",
    "clients=1",
    "batch_size=8",
    "rounds=1",
    "optimizer.lr=0.01",
    "threads.server=1",
)


@pytest.fixture(scope="module")
def plain_cnn() -> Any:
    """Register a network without BatchNorm."""

    def build(classes: int, channels: int) -> model.Units:
        widths = [channels, 16, 32]
        convolutions = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 64, classes))
        return [*convolutions, head]

    model.ARCHITECTURES["plain_cnn"] = model.Architecture(build, 3, {}, ())
    yield
    del model.ARCHITECTURES["plain_cnn"]


def unsplit(training: Training, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Train the whole network on what one client sees; return losses and weights."""
    settings = training.strategy.settings
    seed = int(settings["seed"])
    units = model.build(
        str(settings["model.name"]), 10, 3, seed=derive_seed(seed, "model")
    )
    network = nn.Sequential(*units).train()
    optimizer = pytorchs(training.server.optimizer, network.parameters())
    losses = []
    torch.set_num_threads(1)
    for step in range(steps):
        images, labels = training.client(0).train_batch(Place(1, step))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "dropout.server", round=1, step=step))
            loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Return both halves after a run, named as in the whole network."""
    server = training.server
    if server.sync.shared is not None:
        state = dict(server.sync.shared.tensors)
    else:
        state = training.client_tensors(0)
    cut = len(training.client(0).setup.module)
    for name, tensor in server.half.module.state_dict().items():
        unit, rest = name.split(".", 1)
        state[f"{int(unit) + cut}.{rest}"] = tensor
    return state


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("resnet8", 5),
        pytest.param("vgg19", 20, marks=pytest.mark.slow),
        pytest.param("resnet18", 20, marks=pytest.mark.slow),
    ],
)
def test_split_equals_unsplit_bit_for_bit(name: str, steps: int) -> None:
    """Steps at every named cut, dropout on, every client_sync."""
    overrides = [*UNSPLIT, f"model={name}", f"dataset.limit={8 * steps}"]
    losses, weights = unsplit(prepare(settings_of(*overrides)), steps)
    assert len(losses) == steps
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    for cut, sync in (("shallow", "round"), ("medium", "step"), ("deep", "never")):
        training = train(*overrides, f"cut={cut}", f"client_sync={sync}")
        assert training.losses == losses
        state = whole_state(training)
        assert state.keys() == weights.keys()
        for key, tensor in weights.items():
            assert torch.equal(state[key], tensor), (cut, key)


ONECYCLE = (
    *("dataset=digits", "model=small_cnn", "clients=1", "dataset.limit=130"),
    *("dataset.test_limit=20", "compressor=none", "optimizer.lr=0.1", "rounds=3"),
    *("schedule.name=onecycle", "optimizer.label_smoothing=0.1", "threads.server=1"),
)


@pytest.mark.parametrize("sync", ["step", "round", "never"])
def test_onecycle_and_smoothing_equal_unsplit_bit_for_bit(sync: str) -> None:
    """With PyTorch's own scheduler and loss, in every step of three rounds."""
    training = train(*ONECYCLE, f"client_sync={sync}")
    steps = training.rows[0]["steps"]
    prepared = prepare(settings_of(*ONECYCLE))
    units = model.build("small_cnn", 10, 1, seed=derive_seed(42, "model"))
    network = nn.Sequential(*units).train()
    optimizer = pytorchs(prepared.server.optimizer, network.parameters())
    schedule = OneCycleLR(optimizer, 0.1, 3 * steps, cycle_momentum=False)
    losses = []
    torch.set_num_threads(1)
    for number in range(3 * steps):
        place = Place(1 + number // steps, number % steps)
        images, labels = prepared.client(0).train_batch(place)
        loss = functional.cross_entropy(network(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if number < 3 * steps - 1:
            schedule.step()
    assert training.losses == losses
    state = whole_state(training)
    for key, tensor in network.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg19", "resnet18"])
@pytest.mark.parametrize("cut", ["shallow", "medium", "deep"])
@pytest.mark.parametrize("sync", ["step", "round", "never"])
def test_split_equals_unsplit_in_every_way(name: str, cut: str, sync: str) -> None:
    overrides = [*UNSPLIT, f"model={name}", "dataset.limit=40"]
    losses, weights = unsplit(prepare(settings_of(*overrides)), 5)
    training = train(*overrides, f"cut={cut}", f"client_sync={sync}")
    assert training.losses == losses
    state = whole_state(training)
    assert all(torch.equal(state[key], weights[key]) for key in weights)


TEN = (
    "dataset=digits",
    "dataset.name=toy",
    "dataset.test_limit=10",
    "dataset.partition=dirichlet",
    "model.name=plain_cnn",
    "cut=1",
    "compressor=none",
    "rounds=1",
    "threads.server=1",
    "optimizer.momentum=0.9",
)


def union_reference(
    training: Training, steps: int, lr: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the whole network on the union of the clients' batches."""
    strategy = training.strategy
    seed = derive_seed(int(strategy.settings["seed"]), "model")
    network = nn.Sequential(*model.build("plain_cnn", 10, 3, seed=seed))
    optimizer = pytorchs(training.server.optimizer, network.parameters())
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses = []
    for step in range(steps):
        batches = [
            training.client(client.number).train_batch(Place(1, step))
            for client in strategy.clients.clients
            if step < training.server.train_steps(client)
        ]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


def test_ten_unequal_clients_equal_the_union_batch(plain_cnn: None) -> None:
    overrides = (*TEN, "client_sync=step", "batch_size=6", "optimizer.lr=0.05")
    training = train(*overrides)
    clients = training.strategy.clients.clients
    counts = [training.server.train_steps(client) for client in clients]
    sizes = [client.train_samples for client in clients]
    assert len(training.losses) == max(counts) >= 20
    assert len(set(sizes)) > 5
    losses, weights = union_reference(training, max(counts), 0.05)
    for ours, reference in zip(training.losses[:20], losses[:20], strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
    state = whole_state(training)
    difference = torch.cat([(state[k] - w).flatten() for k, w in weights.items()])
    norm = torch.cat([w.flatten() for w in weights.values()]).norm()
    assert float(difference.norm() / norm) <= 1e-5


def test_average_after_one_local_step_is_the_union_step(plain_cnn: None) -> None:
    overrides = (*TEN, "batch_size=1000", "optimizer.lr=0.05")
    by_round = train(*overrides, "client_sync=round")
    losses, weights = union_reference(by_round, 1, 0.05)
    assert by_round.losses == pytest.approx(losses, rel=1e-6)
    for key, tensor in whole_state(by_round).items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        ("client_sync=step",),
        ("client_sync=round",),
        ("client_sync=never",),
        ("compressor=rt", "gradient_positions=kept"),
    ],
    ids=str,
)
def test_lost_graphs_are_rebuilt_without_a_trace(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("rounds=2", "clients=3", "dataset.limit=100", *options)
    undisturbed = train(*overrides)
    take, clients = GraphCache.take, {}
    of = Client.of

    def remember(context: Any) -> Client:
        client = of(context)
        clients[client.number] = client
        return client

    def lose(cache: GraphCache, run_id: int, number: int, place: Place) -> Any:
        network = take(cache, run_id, number, place)
        # A client of another process has its pickled state alone.
        state = clients[number].context.state
        for name, record in state.array_records.items():
            for key, array in record.items():
                state[name][key] = pickle.loads(pickle.dumps(array))
        return network if number == 1 else None

    monkeypatch.setattr(Client, "of", remember)
    monkeypatch.setattr(GraphCache, "take", lose)
    disturbed = train(*overrides)
    assert disturbed.losses == undisturbed.losses
    rows, others = untimed(disturbed.rows), untimed(undisturbed.rows)
    assert [row.pop("rebuilt_graphs") for row in rows] != [0, 0]
    assert [row.pop("rebuilt_graphs") for row in others] == [0, 0]
    assert rows == others


def test_clients_stay_apart_under_never() -> None:
    training = train("rounds=1", "clients=2", "dataset.limit=52", "client_sync=never")
    one, other = training.client_tensors(0), training.client_tensors(1)
    assert not torch.equal(one["0.0.weight"], other["0.0.weight"])


def test_state_of_a_client_under_step_is_dropped_between_steps() -> None:
    training = train("rounds=1", "clients=2", "dataset.limit=60", "client_sync=step")
    clients = training.strategy.clients
    rates = Rates(ScheduleConfig(), 0.1, 2, 2)
    round_ = Round(2, rates, clients.clients, clients, steps=1)
    training.server.run_step(round_, 0)
    contexts = training.grid.contexts.values()
    assert all("model" not in context.state for context in contexts)


def test_fraction_samples_clients_by_round() -> None:
    training = prepare(settings_of("fraction=0.3"))
    drawn = [
        [c.number for c in training.strategy.clients.sample(r)] for r in range(1, 20)
    ]
    assert all(len(set(numbers)) == 3 for numbers in drawn)
    assert len({tuple(numbers) for numbers in drawn}) > 5
    assert drawn == [
        [c.number for c in training.strategy.clients.sample(r)] for r in range(1, 20)
    ]
    training = train("fraction=0.3", "rounds=2", "dataset.limit=300")
    assert 70 <= training.rows[0]["samples"] <= 100


@pytest.mark.parametrize("name", list(model.ARCHITECTURES["vgg19"].cuts))
def test_gradients_can_be_compressed(name: str) -> None:
    training = train(
        "rounds=1",
        "dataset.limit=60",
        "clients=2",
        f"cut={name}",
        "gradient_compressor=qu",
        "gradient_compressor.bits=8",
    )
    gradient = training.rows[0]["bytes"]["training"]["down"]["gradient"]
    activation = training.traffic.dense("activation", phase="training")
    assert activation / 4 < gradient < activation / 4 + 4 * 64


SMALL = ("rounds=2", "clients=3", "dataset.limit=100", "dataset.test_limit=20")


@pytest.mark.parametrize("sync", ["step", "round", "never"])
@pytest.mark.parametrize("name", ["sp", "rt"])
def test_gradients_at_all_positions_are_whole_gradients(name: str, sync: str) -> None:
    """Where k = d, `kept` is `all`, bit for bit."""
    options = (f"compressor={name}", "compressor.sparsity=0", f"client_sync={sync}")
    whole, kept = (
        train(*SMALL, *options, f"gradient_positions={which}")
        for which in ("all", "kept")
    )
    assert kept.losses == whole.losses
    for row, other in zip(kept.rows, whole.rows, strict=True):
        for changed in ("bytes", "link_seconds", *TIMED):
            del row[changed], other[changed]
        assert row.pop("gradient_error") == row.pop("weight_gradient_error") == 0
        assert row.pop("gradient_bits") == pytest.approx(32, rel=1e-2)
        assert row == other
    for number in range(3):
        ours, theirs = (run.client_tensors(number) for run in (kept, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (run.server.half.module.state_dict() for run in (kept, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "options",
    [
        ("compressor=sp", "compressor.sparsity=0.6"),  # zeros are kept too
        ("compressor=sp", "compressor.scope=sample", "compressor.lossless=auto"),
        ("compressor=rt", "compressor.positions=auto", "compressor.values=float16"),
        ("compressor=rt", "compressor.evaluation=random", "client_sync=step"),
    ],
    ids=str,
)
def test_gradients_at_kept_positions_are_masked_gradients(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole gradient with zeros where the activation was dropped trains the same."""
    kept = train(*SMALL, *options, "gradient_positions=kept")
    encode, frames = compress.Compressor.encode, {}

    def encode_and_keep(self: Any, tensor: torch.Tensor, **rest: Any) -> bytes:
        frame = encode(self, tensor, **rest)
        if self.name in ("sp", "rt"):
            frames["last"] = frame
        return frame

    handlers = split_client.HANDLERS
    forward, backward = handlers["train.forward"], LocalNetwork.backward
    masks: dict[int, torch.Tensor] = {}

    def forward_and_mask(client: Client, content: Any) -> Any:
        reply = forward(client, content)
        frame = frames["last"]
        mask = torch.zeros(decode(frame).shape)
        mask.view(-1)[compress.kept_positions(frame)] = 1
        _, network = GRAPHS.networks[client.number]
        masks[id(network)] = mask
        return reply

    def masked(self: Any, gradient: torch.Tensor, positions: None) -> Any:
        assert positions is None
        return backward(self, gradient * masks[id(self)])

    monkeypatch.setattr(compress.Compressor, "encode", encode_and_keep)
    monkeypatch.setitem(handlers, "train.forward", forward_and_mask)
    monkeypatch.setattr(LocalNetwork, "backward", masked)
    reference = train(*SMALL, *options)
    assert masks
    assert kept.losses == reference.losses
    assert kept.losses != train(*SMALL[:-1], "dataset.limit=90", *options).losses


def test_the_paper_s_bits_on_real_cifar(data_root: Path) -> None:
    training = train(
        "experiment=vgg19_cifar10",
        "cut=shallow",
        "rounds=1",
        f"dataset.root={data_root}",
        "dataset.limit=104",
        "dataset.test_limit=52",
        "clients=2",
    )
    traffic = training.traffic
    sent, dense = traffic.bytes("activation"), traffic.dense("activation")
    assert dense == 4 * (104 + 52) * 64 * 16 * 16
    assert 32 * sent / dense == pytest.approx(2.32, abs=2e-3)


# --- the halves -----------------------------------------------------------------


def test_server_step_scales_each_gradient_to_its_own_mean() -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    activations, labels = [torch.randn(2, 4), torch.randn(6, 4)], []
    expected = []
    for activation in activations:
        labels.append(torch.randint(0, 3, (len(activation),)))
        own = activation.clone().requires_grad_(True)
        functional.cross_entropy(module(own), labels[-1]).backward()
        expected.append(own.grad)
    server = ServerHalf(module, OptimizerConfig(), threads=1)
    _, gradients = server.step(activations, labels, lr=0.1, seed=0)
    assert not activations, "their memory is free during the step"
    for ours, own in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, own)


def test_toy_data_needs_no_partition_of_its_own() -> None:
    parts = dataset.partition(dataset.DatasetConfig(name="toy"), 4, 1)
    assert sum(map(len, parts)) == 1000


@pytest.mark.parametrize("sync", ["step", "round", "never"])
def test_evaluating_more_often_changes_no_training(sync: str) -> None:
    """A round here has three steps, so that two of four checks fall together."""
    quick = ("dataset.limit=160", "clients=3", "rounds=2", f"client_sync={sync}")
    once, often = train(*quick), train(*quick, "evaluations=4")
    assert once.losses == often.losses
    for row, more in zip(once.rows, often.rows, strict=True):
        assert row["checks"] == []
        assert [check["step"] for check in more["checks"]] == [1, 2]
        assert {key: row[key] for key in ("top1", "test_loss")} == {
            key: more[key] for key in ("top1", "test_loss")
        }
        sent, more_sent = (r["bytes"]["evaluation"]["up"] for r in (row, more))
        assert more_sent["label"] == 3 * sent["label"]


@pytest.fixture
def pooled_cnn() -> Any:
    """Register a network whose second cut lies before the average over maps."""

    def build(classes: int, channels: int) -> model.Units:
        convolution = nn.Sequential(nn.Conv2d(channels, 6, 3, 1, 1), nn.ReLU())
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
        )
        return [convolution, nn.Identity(), head]

    model.ARCHITECTURES["pooled_cnn"] = model.Architecture(build, 3, {}, (), (1,))
    yield
    del model.ARCHITECTURES["pooled_cnn"]


POOLED = (
    *("model.name=pooled_cnn", "cut=2", "clients=2", "dataset.limit=48", "rounds=2"),
    *("batch_size=8", "dataset.test_limit=8", "threads.server=1", "compressor=none"),
)


@pytest.mark.parametrize("sync", ["step", "round", "never"])
def test_one_value_of_each_map_is_the_whole_gradient(
    sync: str, pooled_cnn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = train(*POOLED, f"client_sync={sync}")
    size = len(compress.make("none").encode(torch.zeros(8, 6, 1, 1)))
    assert found.traffic.bytes("gradient") == 2 * 2 * 3 * size
    assert found.traffic.dense("gradient") == 2 * 2 * 3 * 4 * 8 * 6 * 64
    monkeypatch.setattr("masksl.methods.split.payloads.one_of_each_map", lambda _: None)
    whole = train(*POOLED, f"client_sync={sync}")
    assert whole.traffic.bytes("gradient") > 40 * found.traffic.bytes("gradient")
    assert whole.losses == found.losses
    for key, tensor in whole_state(whole).items():
        assert torch.equal(whole_state(found)[key], tensor), key


def test_the_server_codes_a_frame_in_each_of_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The frames of three clients wait for each other, and come in the right order."""
    job = ("rounds=1", "clients=3", "dataset.limit=90", "traffic=compact")
    alone = train(*job, "threads.server=1")
    together = threading.Barrier(3, timeout=60)

    def meeting(frame: Any, **options: Any) -> torch.Tensor:
        together.wait()
        return compress.decode(frame, **options)

    monkeypatch.setattr("masksl.methods.split.payloads.decode", meeting)
    found = train(*job, "threads.server=3")
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)


def test_a_compressor_that_is_smaller_than_one_value_of_each_map_is_taken(
    pooled_cnn: None,
) -> None:
    coarse = ("gradient_compressor=ec", "gradient_compressor.error=0.9")
    assert train(*POOLED, *coarse).traffic.bytes("gradient") < train(
        *POOLED
    ).traffic.bytes("gradient")


def test_maps_that_are_constant_are_found() -> None:
    maps = torch.randn(3, 4, 1, 1)
    constant = maps.expand(3, 4, 5, 6).clone()
    found = one_of_each_map(constant)
    assert found is not None and torch.equal(found, maps)
    for place in ((0, 0, 0, 1), (2, 3, 4, 5)):
        other = constant.clone()
        other[place] += 1e-6
        assert one_of_each_map(other) is None
    assert one_of_each_map(maps) is None and one_of_each_map(maps[..., 0]) is None


@pytest.mark.parametrize(
    "options",
    [
        ("gradient_compressor=ec_unbiased",),
        ("gradient_compressor=qu", "client_sync=step"),
        ("compressor=sp", "gradient_positions=kept"),
    ],
    ids=str,
)
def test_errors_of_gradients_are_measured_and_change_nothing(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ("rounds=2", "clients=3", "dataset.limit=90", "cut=medium", *options)
    found = train(*job)
    names = ("gradient_error", "weight_gradient_error", "gradient_bits")
    for row in found.rows:
        assert 0 < row["gradient_error"] < 1.5 and 0 < row["weight_gradient_error"]
        assert 0 < row["gradient_bits"] < 32
    monkeypatch.setattr("masksl.methods.split.server.SplitServer._measure", nothing)
    without = train(*job)
    rows = [
        [{k: v for k, v in row.items() if k not in names} for row in untimed(run.rows)]
        for run in (found, without)
    ]
    assert rows[0] == rows[1] and found.losses == without.losses
    assert all(name not in row for row in without.rows for name in names)


def nothing(*_: Any) -> None:
    """Do nothing."""


def test_a_gradient_that_is_sent_exactly_has_no_error() -> None:
    job = ("rounds=1", "clients=2", "dataset.limit=60", "compressor=sp")
    whole = (*job, "compressor.sparsity=0", "gradient_positions=kept")
    row = train(*whole).rows[0]
    assert row["gradient_error"] == row["weight_gradient_error"] == 0
    assert "gradient_error" not in train(*job).rows[0]
