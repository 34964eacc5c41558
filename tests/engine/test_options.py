"""Options of the engines: defaults, ranges, pins."""

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from masksl.engine.options import (
    ENGINES,
    FlowerOptions,
    LocalOptions,
    Pin,
    Processes,
    RayOptions,
    SuperlinkOptions,
)
from tests.conftest import ROOT

CONF = ROOT / "conf/engine"


def test_every_engine_has_options_a_module_and_a_file() -> None:
    assert list(ENGINES) == ["flower", "local", "ray", "superlink"]
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == sorted(ENGINES)
    for name in ENGINES:
        assert find_spec(f"masksl.engine.{name}") is not None


@pytest.mark.parametrize("name", ENGINES)
def test_defaults_are_those_of_the_configuration(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    assert ENGINES[name]().model_dump() == yaml.safe_load(text)
    assert list(ENGINES[name].model_fields) == list(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": "flower"}, "name"),
        ({"hosts": 0}, "hosts"),
        ({"hosts": 1025}, "hosts"),
        ({"hosts": True}, "hosts"),
        ({"hosts": 2.0}, "hosts"),
        ({"cpus_per_host": -1}, "cpus_per_host"),
        ({"cpus_per_host": float("inf")}, "cpus_per_host"),
        ({"cpus_per_host": True}, "cpus_per_host"),
        ({"gpu_memory_fraction": 0}, "gpu_memory_fraction"),
        ({"gpu_memory_fraction": 1.1}, "gpu_memory_fraction"),
        ({"clients_in_flight": 0}, "clients_in_flight"),
        ({"address": 6379}, "address"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"pin": "alice 0-4"}, "pin"),
        ({"pin": ("alice",)}, "pin"),
        ({"pin": ("alice 0-4 key",)}, "pin"),
        ({"pin": ("alice 0-4", 5)}, "pin"),
        ({"cpus_per_client": 1.0}, "cpus_per_client"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RayOptions(**options)
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"address": "server"}, "address"),
        ({"address": "https://server:8443"}, "address"),
        ({"address": "::1:8443"}, "address"),
        ({"address": 8443}, "address"),
        ({"address": "server:65536"}, "address"),
        ({"bind": ":8443"}, "bind"),
        ({"bind": "0.0.0.0:123456"}, "bind"),
        ({"patience": 0.0}, "patience"),
        ({"reconnect": float("inf")}, "reconnect"),
        ({"starting": 0}, "starting"),
        ({"max_message_mib": 1025}, "max_message_mib"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"hosts": 0}, "hosts"),
    ],
)
def test_wrong_options_of_streams_are_refused(
    options: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        SuperlinkOptions(**options)
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"address": "192.168.1.10:8443"}, "0.0.0.0:8443"),
        ({"address": "[fe80::1]:8443"}, "0.0.0.0:8443"),
        ({"address": "fl.example.org:443", "bind": "[::]:8443"}, "[::]:8443"),
    ],
)
def test_streams_listen_at_the_port_of_the_address(
    options: dict[str, Any], where: str
) -> None:
    assert SuperlinkOptions(**options).where == where


@pytest.mark.parametrize("cpus", [0, 0.0, -1.0])
def test_clients_of_the_simulation_need_cpus(cpus: float) -> None:
    with pytest.raises(ValidationError):
        FlowerOptions(cpus_per_client=cpus)


def test_whole_numbers_are_numbers() -> None:
    options = RayOptions(cpus_per_host=0, gpus_per_host=1, gpu_memory_fraction=1)
    assert (options.cpus_per_host, options.gpus_per_host) == (0.0, 1.0)


def test_pins_are_parsed() -> None:
    assert Pin.parse("bob 3") == Pin("bob", range(3, 4), {})
    entry = "alice 0-2 dataset-root=/srv/a=b x=1"
    config = {"dataset-root": "/srv/a=b", "x": "1"}
    assert Pin.parse(entry) == Pin("alice", range(3), config)
    with pytest.raises(ValueError, match="'alice': must be RESOURCE FIRST-LAST"):
        Pin.parse("alice")
    assert RayOptions().pins == []


@pytest.mark.parametrize("pin", [None, (), ("a 2-4", "b 0-1"), ("a 0-3", "b 4")])
def test_pins_may_name_each_partition_once(pin: tuple[str, ...] | None) -> None:
    RayOptions(pin=pin).check_pins(5)


@pytest.mark.parametrize("pin", [("a 0-3",), ("a 0-4", "b 4"), ("a 0-5",)])
def test_pins_must_name_each_partition_once(pin: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name each partition from 0 to 4 once"):
        RayOptions(pin=pin).check_pins(5)


def test_processes_of_this_machine_are_counted() -> None:
    assert LocalOptions().processes() is None
    flower = FlowerOptions(cpus_per_client=2.0, gpus_per_client=0.5)
    assert flower.processes() == Processes("client", 1, 2.0, 0.5)
    ray = RayOptions(hosts=3, gpus_per_host=0.25)
    assert ray.processes() == Processes("host", 3, 1.0, 0.25)
    assert RayOptions(address="auto").processes() is None


def test_options_load_neither_flower_nor_ray() -> None:
    script = (
        "import sys, masksl.engine.options\n"
        "loaded = {'flwr', 'ray', 'grpc', 'torch', 'hydra'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
        "ours = {name for name in sys.modules if name.startswith('masksl.')}\n"
        "assert ours == {'masksl.engine', 'masksl.engine.options'}, ours\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_reversed_pin_is_refused() -> None:
    with pytest.raises(ValueError, match="LAST must not be less than FIRST"):
        Pin.parse("alice 3-1")
    with pytest.raises(ValidationError):
        RayOptions(pin=("alice 3-1", "bob 0-9"))


def test_a_huge_pin_is_refused_at_once() -> None:
    options = RayOptions(pin=("alice 0-999999999999",))
    with pytest.raises(ValueError, match="each partition from 0 to 9 once"):
        options.check_pins(10)
