"""What a federation of this machine is made of; what it refuses."""

import shlex
import ssl
import stat
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)

from masksl import config
from masksl.federation import __main__ as command
from masksl.federation import keys
from masksl.federation.processes import Federation, FederationError


def test_the_server_proves_who_it_is_by_the_ca(tmp_path: Path) -> None:
    keys.write_server_keys(tmp_path, ("localhost", "127.0.0.1"))
    (root,) = x509.load_pem_x509_certificates((tmp_path / "ca.crt").read_bytes())
    (server,) = x509.load_pem_x509_certificates((tmp_path / "server.pem").read_bytes())
    server.verify_directly_issued_by(root)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    assert len(context.get_ca_certs()) == 1
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        tmp_path / "server.pem", tmp_path / "server.key"
    )
    names_of_files = {path.name for path in tmp_path.iterdir()}
    assert names_of_files == {"ca.crt", "server.pem", "server.key"}, "no key of the CA"


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    keys.write_server_keys(tmp_path, ("localhost",))
    keys.write_node_keys(tmp_path, "node")
    keys.write_secret(tmp_path / "secret")
    for name in ("server.key", "node", "secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    private = load_ssh_private_key((tmp_path / "node").read_bytes(), password=None)
    public = load_ssh_public_key((tmp_path / "node.pub").read_bytes())
    assert private.public_key() == public
    assert len((tmp_path / "secret").read_bytes()) == keys.SECRET_BYTES
    with pytest.raises(FileExistsError):
        keys.write_secret(tmp_path / "secret")


def test_a_folder_that_is_used_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FederationError) as caught:
        Federation(tmp_path, 2).__enter__()  # pylint: disable=unnecessary-dunder-call
    assert str(caught.value) == f"{tmp_path}: must be empty"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("rounds=0",), "masksl: rounds=0: must be a whole number from 1 on"),
        (("nothing=1",), "masksl: nothing=1: must be"),
    ],
)
def test_a_wrong_job_is_refused_before_anything_starts(
    overrides: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["federation", *overrides])
    monkeypatch.setattr(command.signals, "unwind", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_paths_of_a_job_are_those_of_where_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my data (2), Jörg's = ours"
    folder.mkdir()
    monkeypatch.chdir(folder)
    text, clients = command._overrides(["clients=3", "dataset=mnist"])
    assert clients == 3
    first, address, bind, *rest = shlex.split(text)
    assert (first, address[:26]) == ("engine=superlink", "engine.address='127.0.0.1:")
    assert bind == address.replace("address", "bind")
    root = str(folder / "data")
    quoted = root.replace("'", r"\'")
    assert rest == ["clients=3", "dataset=mnist", f"dataset.root='{quoted}'"]
    assert config.compose(shlex.split(text))["dataset.root"] == root
