"""Configuration: what is refused and how, and that its copies agree."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from masksl import compress, config, dataset, model
from masksl.config import ConfigError
from masksl.engine import ENGINES
from masksl.halves import PRECISIONS, SCHEDULES
from masksl.settings import flatten, section
from tests.conftest import ROOT, settings_of

CONF = ROOT / "conf"


def stems(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def options(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0: must be a whole number from 1 on"),
        ("rounds=1.5", "rounds=1.5: must be a whole number"),
        ("clients=-3", "clients=-3: must be a whole number from 1 on"),
        ("clients=2000", "clients=2000: must be at most 1437, the training samples"),
        ("fraction=0", "fraction=0: must be a number greater than 0 and at most 1"),
        ("cut=9", "cut=9: must be shallow, medium, deep or a whole number from 1 to 3"),
        ("cut=0", "cut=0: must be shallow"),
        ("cut=wide", "cut='wide': must be shallow"),
        ("client_sync=often", "client_sync='often': must be one of step, round, never"),
        (
            "gradient_positions=most",
            "gradient_positions='most': must be one of all, kept",
        ),
        (
            "gradient_positions=kept",
            "gradient_positions='kept': must be all with compressor=ms, kept takes sp",
        ),
        ("compressor.name=zip", "compressor.name='zip': must be one of none, qu, qq"),
        ("compressor.sparsity=1.5", "compressor.sparsity=1.5: must be at least 0"),
        ("compressor.bits=0", "compressor.bits=0: must be a whole number from 1 to 8"),
        ("compressor.rounding=up", "compressor.rounding='up': must be one of nearest"),
        ("gradient_compressor.values=x", "gradient_compressor.values='x': must be one"),
        ("device=cuda:99", "device='cuda:99': must be auto or cpu: "),
        ("device=0", "device=0: must be auto, cpu, cuda or cuda:N"),
        ("optimizer.lr=1e40", "optimizer.lr=1e+40: must be a number greater than 0"),
        ("+cutting=4", "cutting=4: is no key of conf/base.yaml"),
        ("+nonsense=4", "nonsense=4: is no key of conf/base.yaml"),
        ("client_device=tpu", "client_device='tpu': must be auto, cpu, cuda or cuda:N"),
        ("threads.server=0", "threads.server=0: must be"),
        ("optimizer.lr=-1", "optimizer.lr=-1: must be a number greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a number greater than 0"),
        ("optimizer.momentum=1", "optimizer.momentum=1: must be a number from 0 to"),
        ("schedule.name=linear", "schedule.name='linear': must be one of constant"),
        ("schedule.milestones=[9,3]", "schedule.milestones=(9, 3): must be a list of"),
        ("link.up_mbps=0", "link.up_mbps=0: must be a number greater than 0"),
        ("model=vgg19", "model.name='vgg19': must be a network for 8x8 images"),
        ("dataset.partition=odd", "dataset.partition='odd': must be one of iid"),
        ("dataset.limit=0", "dataset.limit=0: must be null or a whole number"),
        ("dataset.limit=4", "clients=10: must be at most 4, the training samples"),
        ("dataset.download=maybe", "dataset.download='maybe': must be true or false"),
        ("plugins=x", "plugins='x': must be a list of modules that can be imported"),
        ("plugins=[no.such]", "plugins=['no.such']: must be a list of modules"),
        ("seed=x", "seed='x': must be a whole number from 0 on"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda': must be auto or cpu: 0 CUDA"):
        settings_of("device=cuda")
    settings_of("device=auto")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optimizer.nesterov=true", "optimizer.momentum=0"),
            "optimizer.nesterov=True: must be false without momentum",
        ),
        (
            (
                *("compressor=sp", "gradient_positions=kept"),
                *("gradient_compressor=ms", "gradient_compressor.scope=sample"),
            ),
            "gradient_compressor.scope='sample': must be tensor with gradient_posit",
        ),
        (
            ("engine=flower", "engine.cpus_per_client=4096"),
            "engine.cpus_per_client=4096.0: must be at most",
        ),
        (
            ("engine=flower", "engine.gpus_per_client=512"),
            "engine.gpus_per_client=512.0: must be at most",
        ),
    ],
)
def test_bad_combinations_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(*overrides)
    assert str(caught.value).startswith(message)


def test_missing_keys_are_named() -> None:
    settings = settings_of()
    del settings["rounds"]
    with pytest.raises(ConfigError, match="rounds=None: must be a whole number"):
        config.check(settings)


def test_every_key_has_a_rule() -> None:
    own = {"cut"}
    groups = tuple(f"{group}." for group in config.COMPRESSOR_GROUPS)
    for engine in ENGINES:
        keys = {k for k in settings_of(f"engine={engine}") if not k.startswith(groups)}
        assert keys - own <= config.RULES.keys()
    every = set().union(*(settings_of(f"engine={engine}") for engine in ENGINES))
    assert config.RULES.keys() <= every


def test_flower_app_has_the_defaults_of_the_base_configuration() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        app = tomllib.load(file)["tool"]["flwr"]["app"]
    assert flatten(app["config"]) == settings_of("engine=ray")


def test_run_config_drops_options_of_the_other_compressor() -> None:
    settings = settings_of() | {"compressor.name": "qu"}
    pruned = config.from_run_config(settings)
    assert section(pruned, "compressor") == {
        "name": "qu",
        "bits": 2,
        "rounding": "nearest",
        "lossless": "none",
    }
    config.check(pruned)


def test_files_of_groups_agree_with_the_code() -> None:
    assert stems("compressor") == stems("gradient_compressor")
    variants = {"ms_context"}
    assert stems("compressor") == set(compress.COMPRESSORS) | variants
    for name in compress.COMPRESSORS:
        given = options(CONF / f"compressor/{name}.yaml")
        assert given.pop("name") == name
        made = compress.make(name)
        assert given == {key: getattr(made, key) for key in compress.options_of(name)}
    assert stems("model") == set(model.ARCHITECTURES) - {"plain_cnn"}
    assert stems("dataset") == set(dataset.DATASETS) - {"toy"}
    assert stems("engine") == set(ENGINES) == set(config.ENGINES)
    assert config.SCHEDULES == SCHEDULES
    assert config.PRECISIONS == PRECISIONS
    for group in ("model", "dataset", "engine"):
        for name in stems(group):
            assert options(CONF / f"{group}/{name}.yaml")["name"] == name


def test_experiments_are_those_of_the_paper() -> None:
    vgg = settings_of("experiment=vgg19_cifar10", "cut=medium")
    expected = {
        "model.name": "vgg19",
        "dataset.name": "cifar10",
        "rounds": 200,
        "clients": 10,
        "batch_size": 26,
        "optimizer.lr": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
        "schedule.name": "cosine",
        "cut": "medium",
        "compressor.sparsity": 0.99,
    }
    assert expected.items() <= vgg.items()
    resnet = settings_of("experiment=resnet18_cifar100", "cut=5")
    assert section(resnet, "schedule")["milestones"] == (60, 120, 160)
    assert (resnet["schedule.gamma"], resnet["rounds"]) == (0.2, 200)
    for name in ("resnet34_imagenet", "resnet34_tinyimagenet"):
        settings = settings_of(f"experiment={name}")
        assert settings["rounds"] == 90
        assert settings["optimizer.weight_decay"] == 1e-4
        assert (settings["schedule.name"], settings["schedule.every"]) == ("step", 30)


def test_settings_survive_their_flat_form() -> None:
    nested = {"a": {"b": None, "c": [1, 2.5], "d": "x"}, "e": True}
    flat = flatten(nested)
    assert all(isinstance(value, (str, int, float, bool)) for value in flat.values())
    assert section(flat, "a") == {"b": None, "c": (1, 2.5), "d": "x"}


def test_no_host_is_named_in_the_lock_files() -> None:
    for name in ("poetry.lock", "requirements-poetry.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|index-url|find-links", text), name
