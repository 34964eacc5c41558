"""SGD and Adam on named tensors equal PyTorch's, however often they are rebuilt."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from masksl.methods.global_model import GlobalModel
from masksl.methods.split.server_half import ServerHalf
from masksl.runtime import checkpoint
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import (
    STEP,
    OptimizerConfig,
    apply_gradients,
)
from masksl.training.tensors import Tensors, average, copies, group, grouped, tensors_of
from tests.conftest import settings_of, train, untimed
from tests.runtime.test_checkpoint import run, run_until

CASES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
    "decay": {"momentum": 0.0, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"momentum": 0.5, "weight_decay": 0.01, "nesterov": True},
    "adam": {"name": "adam", "weight_decay": 0.0},
    "adam, decay": {"name": "adam", "weight_decay": 0.1, "betas": (0.5, 0.9)},
    "adam, eps": {
        **{"name": "adam", "weight_decay": 5e-4, "eps": 0.1},
        "betas": (0.0, 0.99),
    },
}
GROUPS = {
    "plain": set(),
    "decay": set(),
    "momentum": {"momentum"},
    "nesterov": {"momentum"},
} | dict.fromkeys(
    ("adam", "adam, decay", "adam, eps"), {"adam.mean", "adam.square", "adam.step"}
)


def reference(case: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return PyTorch's optimiser, its arguments written out once more."""
    options = dict(CASES[case])
    if options.pop("name", "sgd") == "adam":
        return torch.optim.Adam(parameters, lr=1.0, **options)
    return torch.optim.SGD(parameters, lr=1.0, **options)


@pytest.mark.parametrize("case", list(CASES))
def test_named_tensors_step_as_pytorch_does(case: str, device: str) -> None:
    """Nine steps with changing rates; the state is rebuilt from copies each time."""
    config = OptimizerConfig(**CASES[case])
    start = {"w": torch.randn(7, 5, device=device), "b": torch.randn(5, device=device)}
    ours: Tensors = copies(start) | {"buffer": torch.ones(2)}
    parameters = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    theirs = reference(case, list(parameters.values()))
    state: dict[str, Tensors] = {}
    for step in range(9):
        lr = 0.1 / (1 + step)
        gradients = {name: torch.randn_like(tensor) for name, tensor in start.items()}
        theirs.param_groups[0]["lr"] = lr
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        theirs.step()
        state = {key: copies(members) for key, members in state.items()}
        apply_gradients(ours, gradients, state, config, lr)
        for name, parameter in parameters.items():
            assert torch.equal(ours[name], parameter), (step, name)
            assert ours[name].grad is None
    assert state.keys() == GROUPS[case]
    assert torch.equal(ours["buffer"], torch.ones(2))
    if STEP in state:
        assert {int(step) for step in state[STEP].values()} == {9}
        assert state[STEP]["w"].shape == ()


@pytest.mark.parametrize("case", ["momentum", "adam"])
def test_the_state_of_a_module_survives_a_checkpoint(case: str, tmp_path: Path) -> None:
    config, batches = OptimizerConfig(**CASES[case]), torch.randn(6, 8, 6)
    results, start = [], nn.Linear(6, 4).state_dict()
    for stopped in (False, True):
        half = ServerHalf(nn.Linear(6, 4), config, 1)
        half.load(start, {})
        for step, batch in enumerate(batches):
            half.step([batch], [torch.arange(8) % 4], lr=0.1, seed=0)
            if stopped and step == 2:
                tensors, state = half.state()
                checkpoint.write(tmp_path, grouped(state), {"round": 1})
                loaded, _ = checkpoint.read(tmp_path)
                half = ServerHalf(nn.Linear(6, 4), config, 1)
                half.load(tensors, {key: group(loaded, key) for key in config.states})
        results.append(copies(half.module.state_dict()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("case", ["nesterov", "adam, decay"])
def test_a_local_network_trains_as_a_module_does(case: str) -> None:
    config, batches = OptimizerConfig(**CASES[case]), torch.randn(5, 8, 6)
    module, labels = nn.Linear(6, 4), torch.randint(0, 4, (8,))
    network = LocalNetwork(module, copies(tensors_of(module)), {}, 1)
    theirs = nn.Linear(6, 4)
    theirs.load_state_dict(module.state_dict())
    optimizer = reference(case, list(theirs.parameters()))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr = 0.1 * (step + 1)
        loss = functional.cross_entropy(theirs(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert network.train(batch, labels, config, lr=lr, seed=0) == loss.item()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(network.tensors[name], tensor)
    assert network.optimizer_state.keys() == GROUPS[case]


def test_a_loss_that_is_not_finite_is_no_step() -> None:
    module = nn.Linear(6, 4)
    network = LocalNetwork(module, copies(tensors_of(module)), {}, 1)
    images, labels = torch.full((2, 6), torch.inf), torch.zeros(2, dtype=torch.int64)
    loss = network.train(images, labels, OptimizerConfig(), lr=1.0, seed=0)
    assert not math.isfinite(loss)
    for name, tensor in module.state_dict().items():
        assert torch.equal(network.tensors[name], tensor)


def test_a_global_model_keeps_the_state_of_its_optimiser() -> None:
    config = OptimizerConfig(**CASES["adam"])
    one, other = (GlobalModel({"w": torch.ones(3)}, ["w"]) for _ in range(2))
    gradients = [{"w": torch.randn(3)} for _ in range(4)]
    for gradient in gradients[:2]:
        one.step(dict(gradient), config, 0.1)
    other.load(grouped(one.state()), one.version)
    assert other.optimizer_state.keys() == GROUPS["adam"]
    for gradient in gradients[2:]:
        one.step(dict(gradient), config, 0.1)
        other.step(dict(gradient), config, 0.1)
    assert torch.equal(one.tensors["w"], other.tensors["w"])
    assert one.version == other.version == 4


@pytest.mark.parametrize("number", [2, 3, 5, 8, 64])
def test_equal_models_average_to_themselves(number: int) -> None:
    model = {"w": torch.randn(1000), "n": torch.tensor(7)}
    mean = average([model] * number, [13] * number, torch.float64)
    assert torch.equal(mean["w"], model["w"]) and mean["w"].dtype == torch.float32
    assert int(mean["n"]) == 7


# --- split learning with Adam ---------------------------------------------------------

ADAM = (
    *("optimizer.name=adam", "optimizer.lr=0.002", "optimizer.weight_decay=0"),
    *("clients=3", "dataset.limit=130", "dataset.test_limit=40"),
)


@pytest.mark.parametrize(
    "sync",
    ["round", *(pytest.param(s, marks=pytest.mark.slow) for s in ("step", "never"))],
)
def test_split_learning_with_adam_is_resumed(sync: str, tmp_path: Path) -> None:
    overrides = (*ADAM, "rounds=4", f"client_sync={sync}")
    expected = run(tmp_path / "whole", *overrides)
    run_until(tmp_path / "first", 1, *overrides)
    names = {key.split("/")[0] for key in checkpoint.read(tmp_path / "first")[0]}
    kept = {"server", *(f"server.{name}" for name in GROUPS["adam"])}
    if sync == "step":
        kept |= {"model", *(f"model.{name}" for name in GROUPS["adam"])}
    else:
        own = [*GROUPS["adam"], *(["model"] if sync == "never" else [])]
        kept |= {f"client.{number}.{name}" for number in range(3) for name in own}
        kept |= {"model"} if sync == "round" else set()
    assert names == kept
    resume = f"resume={tmp_path}/first"
    assert run(tmp_path / "second", *overrides, resume) == expected
    if sync == "round":
        rows, _ = run(tmp_path / "ray", *overrides, "engine=ray", "engine.hosts=1")
        assert rows == expected[0]


def test_split_learning_with_adam_learns() -> None:
    training = train(*ADAM, "rounds=6", "dataset.limit=600", "dataset.test_limit=200")
    assert training.rows[-1]["top1"] > 0.85
    assert training.rows[-1]["loss"] < training.rows[0]["loss"] / 3
    plain = settings_of(*ADAM)
    assert plain["optimizer.betas"] == "[0.9, 0.999]"
    other = train(*ADAM, "rounds=1", "optimizer.betas=[0.5,0.9]")
    assert untimed(other.rows)[0]["loss"] != training.rows[0]["loss"]
