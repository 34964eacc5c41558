"""A method from outside the package: one Python file, one YAML file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from masksl.engine.options import ENGINES
from masksl.runtime import results
from tests.conftest import ROOT, untimed

MODULE = '''
"""Local training: clients train the whole network, the server averages models."""

import os, signal
from pathlib import Path
from typing import Literal

import torch
from flwr.app import ConfigRecord, RecordDict
from pydantic import Field
from torch import nn

from masksl import dataset, model
from masksl.methods import METHODS, Method
from masksl.methods.base import ServerMethod, State
from masksl.methods.client import ClientMethod, Place, place_of
from masksl.methods.global_model import GlobalModel
from masksl.runtime.messages import METRICS, MODEL, PLACE, model_of, model_record
from masksl.settings import Section
from masksl.training.score import score
from masksl.training.tensors import average, grouped, tensors_of
from masksl.utils import derive_seed


class AverageConfig(Section):
    name: Literal["average"] = Field("average", description="average")
    steps: int = Field(2, ge=1, description="a whole number from 1 on")


class AverageServer(ServerMethod):
    def __init__(self, module, data):
        self.module, self.data, self.visits = module, data, 0
        names = [name for name, _ in module.named_parameters()]
        self.model = GlobalModel(tensors_of(module), names)

    @classmethod
    def build(cls, settings, clients):
        data = dataset.load(dataset.DatasetConfig(name=settings["dataset.name"]))
        seed = derive_seed(settings["seed"], "model")
        units = model.build(settings["model.name"], 10, 1, seed=seed)
        return cls(nn.Sequential(*units), data)

    def steps(self, round_):
        return 1

    def run_step(self, round_, step):
        sent = {}
        for client in round_.clients:
            place = ConfigRecord({"round": round_.number, "step": 0, "lr": round_.lr})
            sent[client.number] = RecordDict({PLACE: place})
            self.model.attach(sent[client.number], client)
        replies = round_.exchange("train.local", sent, step=step)
        models = [model_of(r, self.model.tensors) for r in replies.values()]
        sizes = [round_.manager.clients[n].train_samples for n in replies]
        self.model.replace(average(models, sizes))
        self.visits = sum(r[METRICS]["visits"] for r in replies.values())
        loss = sum(r[METRICS]["loss"] for r in replies.values()) / len(replies)
        round_.add_loss(loss, sum(sizes))
        return loss

    def evaluate(self, round_):
        images, labels = self.data.test_batch(torch.arange(60))
        self.module.load_state_dict(self.model.tensors)
        with torch.no_grad():
            return score(self.module.eval()(images), labels)

    def state(self):
        return State(grouped(self.model.state()), {"version": self.model.version})

    def load(self, state):
        self.model.load(state.tensors, state.facts["version"])

    def client_records(self, client):
        current = client.version == self.model.version
        return {MODEL: self.model.record()} if current else {}

    def metrics(self, round_):
        return {"visits": self.visits}


def train(client, content):
    place = place_of(content)
    order = Path(os.environ.get("MASKSL_TEST_KILL", "none"))
    if order.exists() and (place.round, client.number) == (2, 1):
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    client.receive(content)
    network, config = client.network(), client.setup.config
    for step in range(config.steps):
        images, labels = client.train_batch(Place(place.round, step))
        logits = network.forward(images, seed=0).requires_grad_()
        loss = nn.functional.cross_entropy(logits, labels)
        gradients = network.backward(torch.autograd.grad(loss, logits)[0])
        network.step(gradients, client.setup.optimizer, content[PLACE]["lr"])
    visits = client.state.get("visits", {"n": torch.tensor(0)})["n"] + 1
    client.state["visits"] = {"n": visits}
    reply = RecordDict({MODEL: model_record(network.tensors)})
    reply[METRICS] = client.metrics(visits=int(visits), loss=loss.item())
    return reply


CLIENT = ClientMethod(
    lambda settings, units: nn.Sequential(*units),
    {"train.local": train},
    lambda settings: ["visits"],
)
METHODS["average"] = Method(
    AverageConfig, "averaging:AverageServer", "averaging:CLIENT"
)
'''
YAML = """# @package _global_
defaults:
  - override /compressor: none

method:
  name: average
  steps: 2
"""


def run(
    folder: Path, engine: str, *overrides: str, order: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    environment["MASKSL_TEST_KILL"] = str(order)
    command = [
        *(sys.executable, "-m", "masksl.main", f"engine={engine}"),
        *(f"hydra.searchpath=[file://{folder}/conf]", "plugins=[averaging]"),
        *("method=average", "rounds=3", "clients=3", "dataset.limit=180"),
        *overrides,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    "engine",
    [e if e == "local" else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES],
)
def test_a_method_of_ones_own(engine: str, tmp_path: Path) -> None:
    """It trains on every engine; its client state survives a kill."""
    (tmp_path / "averaging.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/average.yaml").write_text(YAML, encoding="utf-8")
    whole = tmp_path / "whole"
    done = run(tmp_path, engine, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    rows = untimed(results.read_rows(whole))
    assert [row["visits"] for row in rows] == [3, 6, 9]
    assert rows[-1]["loss"] < rows[0]["loss"]
    kinds = {"up": {"model": 3}, "down": {"model": 3}}
    assert rows[-1]["messages"] == {"training": kinds}
    summary = results.read_summary(whole)
    assert (summary["method"], summary["compressor"]) == ("average", "none")
    assert "relative_error" not in summary
    assert "average, none, 3 rounds" in done.stdout

    order = tmp_path / "order"
    order.write_text("kill", encoding="utf-8")
    first = f"hydra.run.dir={tmp_path}/first"
    done = run(tmp_path, engine, first, order=order)
    assert not order.exists(), "nobody was killed"
    folder = tmp_path / "first"
    if engine in ("ray", "superlink"):  # who died is replaced and the run goes on
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        folder = tmp_path / "second"
        resume = (f"resume={tmp_path}/first", f"hydra.run.dir={folder}")
        done = run(tmp_path, engine, *resume)
        assert done.returncode == 0, done.stderr
    assert untimed(results.read_rows(folder)) == rows


def test_keys_of_a_method_are_checked(tmp_path: Path) -> None:
    (tmp_path / "averaging.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/average.yaml").write_text(YAML, encoding="utf-8")
    done = run(tmp_path, "local", "method.steps=0")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "masksl: method.steps=0: must be a whole number from 1 on"
