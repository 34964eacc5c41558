"""A Ray that the program starts is closed to others; a cluster needs a token."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from masksl.engine import EngineError, ray_access, ray_session
from tests.conftest import ROOT
from tests.engine.ray_runs import (
    AUTHENTICATION,
    Program,
    argument,
    left_behind,
    listening,
    program,
)

JOIN = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("CPUs", int(ray.cluster_resources()["CPU"]))
"""


@pytest.fixture(name="no_token")
def _no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the user's token away, in variables and in the home folder."""
    ray_session.stop()
    for name in AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    ray_session.stop()


def seen_within() -> dict[str, str | None]:
    """Return the variables in which a Ray would be started now."""
    with ray_access.closed():
        return {name: os.environ.get(name) for name in AUTHENTICATION}


@pytest.fixture(
    name="running",
    scope="module",
    params=["ray", pytest.param("flower", marks=pytest.mark.slow)],
)
def _running(request: pytest.FixtureRequest) -> Iterator[Program]:
    """Run a job on an engine; it ends without a process left."""
    job = ("rounds=500", "clients=3", "dataset.limit=150", "dataset.test_limit=60")
    with program(f"engine={request.param}", *job) as running:
        running.wait_for("round 1/500")
        yield running
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(5) == 130
        assert left_behind(running.folder) == []
        assert "Traceback" not in running.output


def token_of(running: Program) -> str:
    """Return the token in the environment of the program's raylet."""
    (raylet,) = [process for process in running.tree() if process.name() == "raylet"]
    return str(raylet.environ()["RAY_AUTH_TOKEN"])


def test_a_run_listens_on_the_loopback_interface_alone(running: Program) -> None:
    tree = running.tree()
    found = listening(tree)
    names = {process.name() for process in tree if process.pid in found}
    assert {"gcs_server", "raylet"} <= names
    assert len(found) >= 5  # with the agent, the program itself and a worker
    assert {str(ip) for ips in found.values() for ip in ips} <= {"127.0.0.1", "::1"}


def test_a_run_is_joined_with_its_token_alone(running: Program) -> None:
    address = argument(running.tree(), "--gcs-address")
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    # Ray gives up after so many tries, a second each
    environment = os.environ | loopback | {"RAY_NUM_REDIS_GET_RETRIES": "2"}

    def join(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", JOIN, address],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        refused = join(**variables)
        assert refused.returncode != 0
        assert "InvalidAuthToken" in refused.stderr
    joined = join(RAY_AUTH_TOKEN=token_of(running))
    assert joined.stdout.startswith("CPUs "), joined.stderr


def test_the_token_of_a_run_is_in_no_other_place(running: Program) -> None:
    token = token_of(running)
    assert len(token) == 64
    tree = running.tree()
    assert not any(token in " ".join(process.cmdline()) for process in tree)
    # The program itself has given it to Ray only.
    assert "RAY_AUTH_TOKEN" not in tree[0].environ()
    # The folder has the output, the run folder and Ray's logs.
    names = {file.name for file in running.folder.rglob("*") if file.is_file()}
    assert {"output", "config.yaml", "metrics.jsonl", "gcs_server.out"} <= names
    listed = ["grep", "--recursive", "--devices=skip", "--text", "-l", token]
    found = subprocess.run(
        [*listed, str(running.folder)], capture_output=True, text=True, check=False
    )
    assert (found.stdout, found.returncode) == ("", 1)


@pytest.mark.usefixtures("no_token")
def test_every_start_draws_a_token_and_restores_the_environment() -> None:
    before = dict(os.environ)
    first, second = seen_within(), seen_within()
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert os.environ == before


@pytest.mark.usefixtures("no_token")
def test_what_the_user_has_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("in the home folder")
    assert seen_within() == dict.fromkeys(AUTHENTICATION) | {"RAY_AUTH_MODE": "token"}
    file = str(tmp_path / "token")
    Path(file).write_text("in a file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", file)
    assert seen_within() == dict(
        zip(AUTHENTICATION, ("token", None, file), strict=True)
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert seen_within()["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert seen_within()["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert seen_within()["RAY_AUTH_TOKEN"] is None


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RAY_AUTH_MODE", "tokens", "RAY_AUTH_MODE='tokens': must be token or disa"),
        ("RAY_AUTH_TOKEN_PATH", "/no/file", "RAY_AUTH_TOKEN_PATH='/no/file': must be"),
    ],
)
def test_wrong_variables_are_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=message):
        ray_session.start(None, 1)
    assert not ray.is_initialized()


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("token", ["good", pytest.param(None, marks=pytest.mark.slow)])
def test_a_cluster_that_does_not_fit_the_token_is_refused(
    token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as variables:
        variables.setenv("RAY_AUTH_MODE", "token" if token else "disabled")
        variables.setenv("RAY_AUTH_TOKEN", token or "")
        ray_access.reread()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    refused = "the cluster refused to be joined; RAY_AUTH_TOKEN must hold the token"
    cases = [("token", "", "RAY_AUTH_TOKEN must hold the token of the cluster")]
    if token:
        cases += [("token", "bad", refused), ("disabled", "good", refused)]
        joins = ("token", "good")
    else:
        cases += [("token", "any", "the cluster demands no token; it must be started")]
        joins = ("disabled", "")
    try:
        for mode, own, message in cases:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
            monkeypatch.setenv("RAY_AUTH_TOKEN", own)
            with pytest.raises(EngineError, match=message) as caught:
                ray_session.start(cluster.address, 1)
            assert len(str(caught.value).splitlines()) == 1
        monkeypatch.setenv("RAY_AUTH_MODE", joins[0])
        monkeypatch.setenv("RAY_AUTH_TOKEN", joins[1])
        ray_session.start(cluster.address, 1)
        assert ray.cluster_resources()["CPU"] == 1
        ray_session.stop()
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    "sign", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)]
)
def test_an_interrupt_while_ray_starts_leaves_no_process(sign: str) -> None:
    with program("engine=ray", "rounds=500") as starting:
        while sign not in starting.names():
            assert starting.process.poll() is None, starting.output
            time.sleep(0.02)
        starting.process.send_signal(signal.SIGINT)
        assert starting.process.wait(15) == 130
        assert starting.output == "masksl: interrupted\n"
        assert left_behind(starting.folder, 5) == []


FAILING = """
import sys
from masksl.engine import EngineError, ray_session
from ray._private import node

def fail(*_, **__):
    raise Exception("the node timed out")

node.Node.start_ray_processes = fail  # the GCS runs by then
try:
    ray_session.start(None, 1)
except EngineError as error:
    print(error)
    sys.stdin.read()
"""


def test_a_ray_that_does_not_start_leaves_no_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FAILING],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as failing:
        assert failing.stdout is not None
        assert failing.stdout.readline() == "Ray does not start (the node timed out)\n"
        assert Program(failing, ROOT).tree()[1:] == []
        failing.communicate("")


def test_the_recipe_for_two_machines_needs_a_token() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    starts = [line for line in text.splitlines() if "poetry run ray start" in line]
    assert len(starts) == 2
    for start in starts:
        for token, said in (("", ""), ("any", "started\n")):
            script = f"poetry() {{ echo started; }}\n{start}\n"
            done = subprocess.run(
                ["bash", "-c", script],
                env={"PATH": os.environ["PATH"], "RAY_AUTH_TOKEN": token},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.stdout, done.returncode == 0) == (said, bool(token)), start
