"""Client halves whose changes travel compressed: copies stay equal, nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from masksl import main
from masksl.compress import make
from masksl.methods.split.client_half import BUFFERS
from masksl.methods.split.coding import REMAINDER, SHARED, ChangeCoder
from masksl.methods.split.messages import BUFFER, COLLECT, FORWARD, OPTIMIZER, UPDATE
from masksl.runtime import results
from masksl.runtime.messages import DIGEST, MODEL
from masksl.training.optimizer import OptimizerConfig, apply_gradients, stepped
from masksl.training.tensors import Tensors, copies
from tests.conftest import ROOT, Training, prepare, settings_of, train, untimed
from tests.runtime.test_checkpoint import check_resumed, same_checkpoints

# 160 samples of four clients: five steps in a round.
SMALL = (
    *("rounds=3", "clients=4", "dataset.limit=160", "dataset.test_limit=40"),
    *("batch_size=8", "threads.server=1", "cut=medium", "optimizer.lr=0.02"),
)
CODED = ("model_compressor=ec", "model_compressor.error=0.25")
SYNCS = ("step", "round")
ADAM = ("optimizer.name=adam", "optimizer.lr=0.002")


def copies_are_equal(training: Training) -> None:
    """Check that every client has the server's half, bit for bit."""
    shared = training.server.sync.shared
    averaged = shared.optimizer is None
    for number, client in enumerate(training.strategy.clients.clients):
        assert client.version == shared.version
        state = training.client(number).state
        for name, tensor in shared.own.items():
            assert torch.equal(state[SHARED][name], tensor), (number, name)
        for name, tensor in shared.tensors.items() if averaged else ():
            assert torch.equal(state[MODEL][name], tensor), (number, name)
        for group, tensors in shared.optimizer_state.items():
            for name, tensor in tensors.items():
                assert torch.equal(state[group][name], tensor), (number, group, name)


# --- the step that every processor takes alike ----------------------------------------


def draws(seed: int) -> Tensors:
    """Return tensors of a small network, the same on every processor."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"weight": (37, 23), "bias": (37,), "scale": ()}
    return {n: torch.rand(s, generator=generator) - 0.5 for n, s in sizes.items()}


OPTIMIZERS = [
    OptimizerConfig(momentum=0.0),
    OptimizerConfig(weight_decay=0.0),
    OptimizerConfig(nesterov=True),
    OptimizerConfig(name="adam", lr=0.01),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=str)
def test_a_step_is_that_of_pytorch_up_to_rounding(config: OptimizerConfig) -> None:
    theirs, state = draws(0), dict[str, Tensors]()
    ours, own = copies(theirs), dict[str, Tensors]()
    for number in range(1, 6):
        gradients = draws(number)
        before = copies(ours)
        apply_gradients(theirs, gradients, state, config, config.lr)
        after, found = stepped(ours, gradients, own, config, config.lr)
        assert all(torch.equal(ours[name], before[name]) for name in ours)
        ours, own = after, found
    assert set(own) == set(config.states) == set(state)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
        for group in config.states:
            torch.testing.assert_close(own[group][name], state[group][name])


STEPS = """
from masksl.training.tensors import digest
from masksl.training.optimizer import stepped
from tests.methods.split.test_coded_halves import OPTIMIZERS, draws
for config in OPTIMIZERS:
    tensors, state = draws(0), {}
    for number in range(1, 20):
        tensors, state = stepped(tensors, draws(number), state, config, 0.03)
    print(digest([*tensors.values(), *(t for s in state.values() for t in s.values())]))
"""


def test_processors_take_the_same_steps() -> None:
    """One without fused operations and one with what this machine has."""
    found = {}
    for capability in ("default", ""):
        env = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
        command = [sys.executable, "-c", STEPS]
        found[capability] = subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    assert found["default"] == found[""] and len(found[""]) == len(OPTIMIZERS)


# --- coding ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ec", "spsign", "ms", "qu", "sign", "drive"])
def test_what_is_not_sent_is_remembered(name: str) -> None:
    coder, remainder = ChangeCoder(make(name)), dict[str, torch.Tensor]()
    sums, sent = draws(0), draws(0)
    buffers = {"steps": torch.tensor(3), "mean": torch.randn(5)}
    for number in range(1, 31):
        coded = coder.encode(draws(number), remainder, buffers, seed=number)
        remainder = coded.remainder
        for key, tensor in draws(number).items():
            sums[key] += tensor
            sent[key] += coded.sent[key]
        assert torch.equal(coded.sent["mean"], buffers["mean"])
        assert torch.equal(coded.sent["steps"], buffers["steps"])
    for key, total in sums.items():
        torch.testing.assert_close(sent[key] + remainder[key], total)
    norms = [
        torch.cat([t.reshape(-1) for t in each.values()]).norm()
        for each in (remainder, draws(30))
    ]
    assert 0 < norms[0] < 40 * norms[1]


# --- runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("sync", SYNCS)
def test_a_compressor_that_loses_nothing_changes_nothing(sync: str) -> None:
    """Up to the rounding of sums and of the division by the standard deviation."""
    job = (*SMALL, f"client_sync={sync}")
    exact = train(*job)
    kept = ("model_compressor=sp", "model_compressor.sparsity=0")
    found = train(*job, *kept, "model_compressor.values=float32")
    assert found.losses == pytest.approx(exact.losses, rel=2e-3)
    for name, tensor in exact.server.sync.shared.tensors.items():
        other = found.server.sync.shared.tensors[name]
        torch.testing.assert_close(other, tensor, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("options", [(), ADAM, ("fraction=0.5",)], ids=str)
@pytest.mark.parametrize("sync", SYNCS)
def test_copies_stay_equal(sync: str, options: tuple[str, ...]) -> None:
    training = train(*SMALL, *CODED, f"client_sync={sync}", *options)
    copies_are_equal(training)
    version = training.server.sync.shared.version
    assert version == (3 if sync == "round" else 15)
    traffic = training.traffic
    if not options:  # nobody missed anything
        assert not traffic.bytes(MODEL) and not traffic.bytes(OPTIMIZER)
        assert traffic.bytes(DIGEST, "up") == 3 * 4 * 8
        ups = 3 * 4 if sync == "round" else 15 * 4
        assert traffic.messages(UPDATE, "up") == traffic.messages(UPDATE, "down") == ups
    for number in range(4):
        lost = training.client(number).state.get(REMAINDER)
        assert lost or options == ("fraction=0.5",)
        assert not lost or any(tensor.any() for tensor in lost.values())


@pytest.mark.parametrize("sync", SYNCS)
def test_buffers_travel_when_they_are_needed(sync: str) -> None:
    training = train(*SMALL, *CODED, f"client_sync={sync}", "evaluations=2")
    messages = training.traffic.messages(BUFFER)
    assert messages == (3 * 2 * 4 * 2 if sync == "step" else 0)
    assert training.traffic.bytes(BUFFER, phase="training") == 0
    if sync == "step":
        own = [training.client(number).state[BUFFERS] for number in range(4)]
        for name, averaged in training.server.sync.shared.buffers.items():
            if averaged.is_floating_point():
                mean = sum(buffers[name].double() for buffers in own) / 4
                torch.testing.assert_close(averaged.double(), mean)


@pytest.mark.parametrize("sync", SYNCS)
def test_a_client_that_failed_gets_the_half_in_full_once(
    sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (*SMALL, *CODED, f"client_sync={sync}")
    handlers: Any = prepare(settings_of(*job)).client(0).setup.method.handlers
    real = handlers[FORWARD]

    def fail(client: Any, content: Any) -> Any:
        place = content["place"]
        if client.number == 2 and (place["round"], place["step"]) == (2, 1):
            raise RuntimeError("out of order")
        return real(client, content)

    monkeypatch.setitem(handlers, FORWARD, fail)
    training = train(*job)
    copies_are_equal(training)
    assert training.traffic.messages(MODEL, "down") == 1
    assert training.traffic.messages(MODEL, "up") == 0


@pytest.mark.parametrize("sync", SYNCS)
def test_a_copy_that_differs_is_replaced_once(
    sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one client the initial half is another, as of another processor."""
    job = (*SMALL, *CODED, f"client_sync={sync}")
    handlers: Any = prepare(settings_of(*job)).client(0).setup.method.handlers
    real = handlers[FORWARD]

    def other(client: Any, content: Any) -> Any:
        place = content["place"]
        if client.number == 2 and (place["round"], place["step"]) == (1, 0):
            names = [name for name, _ in client.setup.module.named_parameters()]
            changed = {name: client.setup.initial[name] + 1e-6 for name in names}
            client.state[SHARED] = changed
        return real(client, content)

    monkeypatch.setitem(handlers, FORWARD, other)
    training = train(*job)
    copies_are_equal(training)
    assert training.traffic.messages(MODEL, "down") == 1


@pytest.mark.parametrize("sync", SYNCS)
def test_what_clients_share_changes_nothing(
    sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client computes everything itself, as if it were alone."""
    job = (*SMALL, *CODED, f"client_sync={sync}")
    expected = train(*job)
    handlers: Any = expected.client(0).setup.method.handlers
    for kind in (FORWARD, "train.backward", "evaluate.forward", COLLECT):
        real = handlers[kind]

        def alone(client: Any, content: Any, real: Any = real) -> Any:
            client.setup.caches.method = client.setup.caches.received = None
            return real(client, content)

        monkeypatch.setitem(handlers, kind, alone)
    found = train(*job)
    assert untimed(found.rows) == untimed(expected.rows)


RUNS = [
    ("client_sync=step", "fraction=0.6", "evaluations=2"),
    ("client_sync=round", "fraction=0.6", "checkpoint.every=2"),
    ("client_sync=step", *ADAM, "gradient_compressor=ec_unbiased"),
    ("client_sync=round", "dataset.test_limit=3"),  # one client has no test image
    ("client_sync=step", "dataset.test_limit=3"),
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_resumed_run_equals_an_undisturbed_one(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    check_resumed(tmp_path, *SMALL, *CODED, "rounds=5", *options)
    same_checkpoints(tmp_path / "whole", tmp_path / "third", 20)


@pytest.mark.slow
@pytest.mark.parametrize("sync", SYNCS)
def test_engines_agree_and_lost_hosts_change_nothing(
    sync: str, order: Path, tmp_path: Path
) -> None:
    plugin = "plugins=[tests.methods.split.plugin_kill]"
    job = (*SMALL, *CODED, f"client_sync={sync}", plugin, "evaluations=2")
    main.run(settings_of(*job), tmp_path / "local")
    places = [f"{FORWARD} 1 3", "train.backward 2 0", "evaluate.forward 3 1"]
    for engine, killed in (("ray", []), ("flower", []), ("ray", places)):
        order.write_text("\n".join(killed))
        folder = tmp_path / f"{engine}{len(killed)}"
        main.run(settings_of(*job, f"engine={engine}"), folder)
        assert order.read_text() == "", "not everybody was killed"
        rows: list[Any] = [
            untimed(results.read_rows(each)) for each in (folder, tmp_path / "local")
        ]
        for row in (*rows[0], *rows[1]):
            del row["rebuilt_graphs"]  # where a client's next message goes to
        assert rows[0] == rows[1]
        same_checkpoints(tmp_path / "local", folder, 20)


@pytest.mark.parametrize("sync", SYNCS)
def test_a_client_that_fails_early_has_no_part_in_the_averaged_buffers(
    sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (*SMALL, *CODED, f"client_sync={sync}", "rounds=1")
    handlers: Any = prepare(settings_of(*job)).client(0).setup.method.handlers
    real = handlers[FORWARD]

    def fail(client: Any, content: Any) -> Any:
        if client.number == 2:
            raise RuntimeError("out of order")
        return real(client, content)

    monkeypatch.setitem(handlers, FORWARD, fail)
    training = train(*job)
    steps = {
        int(tensor)
        for name, tensor in training.server.sync.shared.buffers.items()
        if name.endswith("num_batches_tracked")
    }
    assert steps == {5}
    assert training.traffic.messages(BUFFER, "up") == (3 if sync == "step" else 0)


def test_a_failed_measurement_does_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = (*SMALL, *CODED, "gradient_compressor=ec_unbiased")
    handlers: Any = prepare(settings_of(*job)).client(0).setup.method.handlers
    expected = train(*job)

    def fail(client: Any, content: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(handlers, "query.gradient", fail)
    found = train(*job)
    assert found.losses == expected.losses
    assert all("gradient_error" not in row for row in found.rows)
