"""Configuration: what is refused and how, and that its copies agree."""

import re
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from masksl import compress, config, dataset, model
from masksl.config import ConfigError
from masksl.engine.options import ENGINES
from masksl.methods import METHODS
from masksl.settings import SLOTS, flatten, options, parse
from tests.conftest import ROOT, settings_of

CONF = ROOT / "conf"


def stems(group: str) -> set[str]:
    found = {path.stem for path in (CONF / group).glob("*.yaml")}
    return {stem for stem in found if not stem.startswith("_")}


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0: must be a whole number from 1 on"),
        ("rounds=1.5", "rounds=1.5: must be a whole number"),
        ("clients=-3", "clients=-3: must be a whole number from 1 to 1000000"),
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
        ("+cutting=4", "cutting=4: must be a known name, near ones: cut"),
        ("+nonsense=4", "nonsense=4: must be one of rounds, evaluations, "),
        ("+method.nonsense=4", "method.nonsense=4: must be one of method.name"),
        ("+engine.hosts=4", "engine.hosts=4: must be one of engine.name"),
        ("method.name=x", "method.name='x': must be one of split"),
        ("rounds=true", "rounds=true: must be a whole number from 1 on"),
        ("fraction=true", "fraction=true: must be a number greater than 0"),
        ("compute.compile=1", "compute.compile=1: must be true or false"),
        ("plugins=[3]", "plugins=[3]: must be a list of modules"),
        ("client_device=tpu", "client_device='tpu': must be auto, cpu, cuda or cuda:N"),
        ("threads.server=0", "threads.server=0: must be"),
        ("optimizer.lr=-1", "optimizer.lr=-1: must be a number greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a number greater than 0"),
        ("optimizer.momentum=1", "optimizer.momentum=1: must be a number from 0 to"),
        ("optimizer.name=lion", "optimizer.name='lion': must be one of sgd, adam"),
        ("optimizer.eps=0", "optimizer.eps=0: must be a number greater than 0"),
        (
            "optimizer.betas=[0.9,1]",
            "optimizer.betas=[0.9, 1]: must be a list of two numbers from 0 to less",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of two"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list of two numbers"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas=[0.9, 'x']: must be a list of"),
        ("optimizer.betas=[nan,0]", "optimizer.betas=[nan, 0]: must be a list of two"),
        ("optimizer.betas=[true,0]", "optimizer.betas=[true, 0]: must be a list of"),
        ("schedule.name=linear", "schedule.name='linear': must be one of constant"),
        ("schedule.milestones=[9,3]", "schedule.milestones=[9, 3]: must be a list of"),
        ("link.up_mbps=0", "link.up_mbps=0: must be a number from 1e-9 to 1e12"),
        ("model=vgg19", "model.name='vgg19': must be a network for 8x8 images"),
        ("model=mnist_net", "model.name='mnist_net': must be a network for 8x8 images"),
        (
            "model.stem_stride=2",
            "model.stem_stride=2: must be 1, or 2 with model.name=r",
        ),
        (
            "model.stem_stride=0",
            "model.stem_stride=0: must be 1, or 2 with model.name=",
        ),
        (
            "model.stem_stride=true",
            "model.stem_stride=true: must be 1, or 2 with model",
        ),
        ("dataset.partition=odd", "dataset.partition='odd': must be one of iid"),
        ("dataset.limit=0", "dataset.limit=0: must be null or a whole number"),
        ("dataset.limit=4", "clients=10: must be at most 4, the training samples"),
        ("dataset.download=maybe", "dataset.download='maybe': must be true or false"),
        ("plugins=x", "plugins='x': must be a list of modules that can be imported"),
        ("plugins=[no.such]", "plugins=['no.such']: must be a list of modules"),
        ("plugins=['']", "plugins=['']: must be a list of modules"),
        ("plugins=[.x]", "plugins=['.x']: must be a list of modules"),
        ("device=cuda:01", "device='cuda:01': must be auto, cpu, cuda or cuda:N"),
        ("+x={1: 2}", "x.1=2: must be one of rounds, "),
        ("engine=null", "engine=null: must be one of flower, local, ray"),
        (
            "seed=${nope}",
            "seed: must be a value that can be resolved (Interpolation key",
        ),
        ("~compressor", "compressor.name=null: must be one of none, qu, qq"),
        ("seed=x", "seed='x': must be a whole number from 0 on"),
        ("seed=9223372036854775808", "seed=9223372036854775808: must be at most 9223"),
        ("rounds=null", "rounds=null: must be a whole number from 1 on"),
        ("method.name=null", "method.name=null: must be one of split"),
        ("rounds={}", "rounds='{}': must be a whole number from 1 on"),
        ("rounds={a: 1}", "rounds={a: 1}: must be a whole number from 1 on"),
        ("rounds=-0", "rounds=0: must be a whole number from 1 on"),
        ("rounds=[1]", "rounds='[1]': must be a whole number from 1 on"),
        ("~rounds", "rounds: is missing, must be a whole number from 1 on"),
        ("+a={}", "a='{}': must be one of rounds, "),
        ("compressor.sparsity={}", "compressor.sparsity='{}': must be at least 0"),
        ("+optimizer.lrr=3", "optimizer.lrr=3: must be a known name, near ones: opt"),
        ("clients=1000001", "clients=1000001: must be a whole number from 1 to 10"),
        ("evaluations=1000001", "evaluations=1000001: must be a whole number from 1"),
        ("threads.server=100000", "threads.server=100000: must be a whole number from"),
        ("threads.client=257", "threads.client=257: must be a whole number from 1 to"),
        ("optimizer.weight_decay=1e300", "optimizer.weight_decay=1e+300: must be a"),
        ("optimizer.eps=1e31", "optimizer.eps=1e+31: must be a number greater than 0"),
        ("link.up_mbps=1e-320", "link.up_mbps=1e-320: must be a number from 1e-9"),
        ("link.down_mbps=1e13", "link.down_mbps=10000000000000.0: must be a number"),
        ("link.latency_ms=1e308", "link.latency_ms=1e+308: must be a number from 0"),
        ("schedule.milestones='[1,2'", "schedule.milestones='[1,2': must be a list"),
        ("schedule.milestones=[-1]", "schedule.milestones=[-1]: must be a list of"),
        ("schedule.milestones=[1,2", "'schedule.milestones=[1,2': must be KEY=VALUE"),
        ("dataset.root=[x", "'dataset.root=[x': must be KEY=VALUE, "),
        ("dataset.root=''", "dataset.root='': must be text that is not empty"),
        ("resume=''", "resume='': must be null, auto or the path of a run folder"),
        ("client_device=cuda:300", "client_device='cuda:300': must be auto or cpu"),
        ("device=cuda:999", "device='cuda:999': must be auto or cpu: "),
        ("plugins=[this.x]", "plugins=['this.x']: must be a list of modules that can"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "data"),
    [
        *(("resnet18", "cifar100"), ("resnet18", "tinyimagenet")),
        *(("mnist_net", "mnist"), ("mnist_net", "emnist")),
    ],
)
def test_networks_take_the_images_that_they_name(network: str, data: str) -> None:
    settings = settings_of(f"model={network}", f"dataset={data}", "cut=deep")
    assert (settings["model.name"], settings["dataset.name"]) == (network, data)


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
            "optimizer.nesterov=true: must be false without momentum",
        ),
        (
            ("optimizer.nesterov=true", "optimizer.name=adam"),
            "optimizer.nesterov=true: must be false with optimizer.name adam",
        ),
        (
            (
                *("compressor=sp", "gradient_positions=kept"),
                *("gradient_compressor=ms", "gradient_compressor.scope=sample"),
            ),
            "gradient_compressor.scope='sample': must be tensor with gradient_posit",
        ),
        (
            ("model=resnet8", "dataset=cifar10", "model.stem_stride=3"),
            "model.stem_stride=3: must be 1, or 2 with model.name=resnet8",
        ),
        (
            ("model=resnet18", "dataset=cifar10", "model.stem_stride=2"),
            "model.stem_stride=2: must be 1, or 2 with model.name=resnet8",
        ),
        (
            ("model_compressor=ec_unbiased",),
            "model_compressor.rounding='stochastic': must be nearest with method=split",
        ),
        (
            ("model_compressor=qsgd", "client_sync=step"),
            "model_compressor.name='qsgd': must be another one than qsgd with method",
        ),
        (
            ("model_compressor=qu",),
            "model_compressor.bits=3: must be at least 4 with method=split, where what",
        ),
        (
            ("model_compressor=sign",),
            "model_compressor.magnitude='none': must be mean with method=split, where",
        ),
        (
            ("compressor=ec", "compressor.deadzone=1.2"),
            "compressor.deadzone=1.2: must be a number from 0.5 to 1",
        ),
        *(
            (
                (f"method={name}", "traffic=compact"),
                f"traffic='compact': must be left out with method={name}, which",
            )
            for name in ("fedavg", "fedpm", "flash", "sasg")
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


def test_a_file_of_a_network_may_set_the_stride(tmp_path: Path) -> None:
    """It precedes the default, and the command line precedes it; it may leave it
    out."""
    (tmp_path / "model").mkdir()
    for name, text in (("strided", "stem_stride: 2\n"), ("plain", "")):
        path = tmp_path / f"model/{name}.yaml"
        path.write_text(f"name: resnet8\n{text}", encoding="utf-8")
    job = (f"hydra.searchpath=[file://{tmp_path}]", "dataset=cifar10")
    for overrides, stride in (
        (("model=strided",), 2),
        (("model=strided", "model.stem_stride=1"), 1),
        (("model=plain",), 1),
        (("model=resnet8", "model.stem_stride=2"), 2),
    ):
        settings = settings_of(*job, *overrides)
        assert settings["model.stem_stride"] == stride
        assert settings["model.name"] == "resnet8"


def test_runs_from_before_a_key_are_resumed_with_what_held_then() -> None:
    job = ("model=resnet8", "dataset=cifar10")
    settings = settings_of(*job)
    earlier = {k: v for k, v in settings.items() if k != "model.stem_stride"}
    config.check_resume(settings, earlier, 1)
    strided = settings_of(*job, "model.stem_stride=2")
    for saved in (earlier, settings):
        with pytest.raises(ConfigError, match="model.stem_stride .1 there, 2 here"):
            config.check_resume(strided, saved, 1)


def test_runs_from_before_an_option_are_resumed_with_its_default() -> None:
    settings = settings_of("compressor=ec", "compressor.step=4.0")
    earlier = {k: v for k, v in settings.items() if k != "compressor.rounding"}
    config.check_resume(settings, earlier, 1)
    stochastic = settings | {"compressor.rounding": "stochastic"}
    with pytest.raises(ConfigError, match="compressor.rounding .'nearest' there, 'st"):
        config.check_resume(stochastic, earlier, 1)


def test_an_option_that_is_left_out_has_its_default() -> None:
    whole = settings_of("traffic=compact")
    shorter = {k: v for k, v in whole.items() if k != "model_compressor.rounding"}
    assert shorter != whole
    config.check(shorter)
    for here, there in product((whole, shorter), repeat=2):
        config.check_resume(here, there, 1)


def test_the_name_of_a_preset_does_not_matter_to_a_resumed_run() -> None:
    settings = settings_of("traffic=paper")
    config.check_resume(settings, settings | {"traffic": "null"}, 1)
    with pytest.raises(ConfigError, match="model_compressor.name .'none' there, 'ec'"):
        config.check_resume(settings_of("traffic=compact"), settings, 1)


def test_rough_halves_are_named_where_they_travel_once_a_round() -> None:
    (line,) = config.warnings(settings_of("traffic=compact", "client_sync=round"))
    assert line.startswith("client_sync=round: halves travel once a round; with model_")
    for better in ("client_sync=step", "model_compressor.error=0.05"):
        job = ("traffic=compact", "client_sync=round", better)
        assert not config.warnings(settings_of(*job)), better
    assert not config.warnings(settings_of("traffic=paper", "client_sync=round"))


def test_missing_keys_are_named() -> None:
    settings = settings_of()
    del settings["rounds"]
    with pytest.raises(ConfigError, match="rounds: is missing, must be a whole number"):
        config.check(settings)


def test_the_first_error_is_the_only_one() -> None:
    with pytest.raises(ConfigError, match=r"^rounds=0: .* from 1 on$"):
        settings_of("rounds=0", "clients=0", "optimizer.lr=-1")


def test_every_key_is_declared_once_and_used() -> None:
    """The keys of conf/ are those of the sections, with the same defaults."""
    groups = tuple(f"{group}." for group in SLOTS)
    for engine in ENGINES:
        settings = settings_of(f"engine={engine}")
        keys = {key for key in settings if not key.startswith(groups)}
        declared = list(config.known_keys(settings))
        assert keys == set(declared)
        assert len(declared) == len(keys), "a key is declared twice"
    for method, registered in METHODS.items():
        every = config.SECTIONS | {"method": registered.config}
        every |= {"engine": ENGINES["ray"]}
        settings = settings_of("engine=ray", f"method={method}")
        own = registered.config.fixed.keys() | OVERRIDDEN.get(method, set())
        for prefix, section in every.items():
            for name, field in section.model_fields.items():
                key = config.key_of(section, name, prefix)
                if field.is_required() or key in OVERRIDDEN["every"] | own:
                    continue
                assert parse(settings[key], field.annotation) == field.default, key


# What the default job, or the file of a method, sets.
OVERRIDDEN = {
    "every": {"optimizer.lr"},
    "flash": {"optimizer.momentum", "optimizer.weight_decay", "batch_size"},
    "fedpm": {"optimizer.name", "optimizer.weight_decay", "model.name"},
}


def test_every_field_says_what_is_allowed() -> None:
    sections = [*config.SECTIONS.values(), *ENGINES.values()]
    for section in (*sections, *(method.config for method in METHODS.values())):
        assert section.model_config["frozen"] and section.model_config["strict"]
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["allow_inf_nan"] is False
        for name, field in section.model_fields.items():
            assert field.description, (section, name)
            assert name == "name" or name in str(section.__doc__), (section, name)


def test_the_method_precedes_groups_and_the_command_line_follows(
    tmp_path: Path,
) -> None:
    """Precedence: base < traffic < method < federation < experiment < command line."""
    own = "method: {name: split}\ncut: 2\nclient_sync: step\n"
    own += "gradient_positions: all\n"
    # by group: rounds, the compressor that it chooses, and more
    files = {
        "traffic": (1, "sp", "traffic: paper\n"),
        "method": (2, "rt", own),
        "federation": (3, "", ""),
        "experiment": (4, "fp", ""),
    }
    for group, (value, compressor, more) in files.items():
        override = f"defaults:\n  - override /compressor: {compressor}\n"
        text = f"# @package _global_\n{override if compressor else ''}"
        text += f"rounds: {value}\n{more}"
        (tmp_path / group).mkdir()
        (tmp_path / group / "other.yaml").write_text(text, encoding="utf-8")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    layers: list[str] = []
    expected = ["sp", "rt", "rt", "fp"]
    for number, group in enumerate(files):
        layers.append(f"{group}=other")
        settings = settings_of(path, *reversed(layers))
        assert settings["rounds"] == number + 1
        assert settings["compressor.name"] == expected[number]
    settings = settings_of(path, *layers, "compressor=qu", "rounds=5")
    assert (settings["compressor.name"], settings["rounds"]) == ("qu", 5)


def test_traffic_sets_all_compressors_and_the_command_line_wins() -> None:
    def names(*overrides: str) -> list[Any]:
        settings = settings_of(*overrides)
        return [settings["traffic"], *(settings[f"{slot}.name"] for slot in SLOTS)]

    assert names("method=split") == ["compact", "ec", "ec", "ec"]
    assert names("traffic=paper") == ["paper", "ms", "none", "none"]
    assert names("traffic=compact") == ["compact", "ec", "ec", "ec"]
    assert names("traffic=compact", "model_compressor=none", "compressor=qu") == [
        *("compact", "qu", "ec", "none"),
    ]


def test_overrides_are_the_only_key_under_flwr_run() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        app = tomllib.load(file)["tool"]["flwr"]["app"]
    assert app["config"] == {"overrides": ""}
    text = "rounds=1 compressor=qu 'dataset.root=/my data'"
    overrides = config.split_overrides({"overrides": text})
    assert overrides == ["rounds=1", "compressor=qu", "dataset.root=/my data"]
    settings = config.compose(overrides)
    assert settings["compressor.name"] == "qu"
    for wrong, message in (
        ({"overrides": "rounds='3"}, 'overrides="rounds=\'3": must be overrides of'),
        ({"rounds": 3}, "rounds=3: the run config has the key overrides"),
    ):
        with pytest.raises(ConfigError) as caught:
            config.split_overrides(wrong)
        assert str(caught.value).startswith(message)
    for override, message in (
        ("nonsense=4", "nonsense=4: must be one of "),
        ("rounds=[", "'rounds=[': must be KEY=VALUE"),
        ("compressor=zip", "compressor=zip: must be one of drive, "),
    ):
        with pytest.raises(ConfigError) as caught:
            config.compose([override])
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_text_is_read_by_the_type_of_its_field() -> None:
    assert settings_of("dataset.root='[x]'")["dataset.root"] == "[x]"
    assert parse("null", str | None) is None
    with pytest.raises(ConfigError, match="dataset.root=null: must be text"):
        settings_of("dataset.root=null")
    assert parse("[1, 2]", tuple[int, ...] | None) == (1, 2)
    assert parse("[1", tuple[int, ...]) == "[1"


def test_files_of_groups_agree_with_the_code() -> None:
    for slot in SLOTS:
        assert stems(slot) == stems("compressor")
    variants = {"ec_fine", "ec_unbiased", "ms_context", "sp_auto", "topk"}
    floating = set(compress.COMPRESSORS) - {"mask"}  # nothing sends masks yet
    assert stems("compressor") == floating | variants
    for name in floating:
        given = content(CONF / f"compressor/{name}.yaml")
        assert given.pop("name") == name
        made = compress.make(name)
        assert given == {key: getattr(made, key) for key in compress.options_of(name)}
    assert stems("model") == set(model.ARCHITECTURES) - {"plain_cnn"}
    assert stems("dataset") == set(dataset.DATASETS) - {"toy"}
    assert stems("engine") == set(ENGINES)
    assert stems("method") == set(METHODS)
    for group in ("model", "dataset", "engine"):
        for name in stems(group):
            assert content(CONF / f"{group}/{name}.yaml")["name"] == name


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
    assert resnet["schedule.milestones"] == "[60, 120, 160]"
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
    types = {"b": int | None, "c": tuple[float, ...], "d": str}
    assert options(flat, "a", types) == {"b": None, "c": (1, 2.5), "d": "x"}


def test_no_host_is_named_in_the_lock_files() -> None:
    for name in ("poetry.lock", "requirements-poetry.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"(?m)^description = .*$", "", text)  # a package names its page
        assert not re.search(r"https?://|file:|index-url|find-links", text), name


def test_a_value_of_any_length_is_shown_in_a_short_line() -> None:
    for override in ("cut=" + "x" * 10_000, "model=" + "x" * 10_000, "y" * 10_000):
        with pytest.raises(ConfigError) as caught:
            settings_of(override)
        assert "characters]" in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("pins", ["[a 0-99999999999]", "[a 0-4,b 5-99999999999999999]"])
@pytest.mark.parametrize("clients", ["10", "100000000000"])
def test_pins_are_checked_without_being_listed(pins: str, clients: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of("engine=ray", f"engine.pin={pins}", f"clients={clients}")
    key = "engine.pin" if clients == "10" else "clients"
    assert str(caught.value).startswith(f"{key}=")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys\nsys.exit(3)", "broken.py, line 2: SystemExit: 3)"),
        ("raise KeyboardInterrupt_", "line 1: NameError: name 'KeyboardInterrupt_'"),
        ("def", "SyntaxError: invalid syntax)"),
        ("import no_such_module", "No module named 'no_such_module')"),
    ],
)
def test_a_broken_plugin_is_named(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        settings_of("plugins=[broken]")
    assert str(caught.value).startswith("plugins=['broken']: must be a list of modules")
    assert reason in str(caught.value)
