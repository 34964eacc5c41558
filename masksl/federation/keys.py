"""Keys and certificates of a federation: its CA, its server, its nodes."""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

VALID = timedelta(days=30)
SKEW = timedelta(days=1)  # clocks may be behind
SECRET_BYTES = 32


def write_server_keys(folder: Path, names: Sequence[str]) -> None:
    """Write ``ca.crt``, and ``server.pem`` and ``server.key`` that it has signed.

    The key of the CA is not kept: nothing else will be signed by it.

    Parameters
    ----------
    folder : Path
        Existing folder.
    names : Sequence[str]
        Names and addresses of the server that its clients dial.
    """
    authority = ec.generate_private_key(ec.SECP384R1())
    issuer = _name("masksl federation CA")
    usage = x509.BasicConstraints(ca=True, path_length=0)
    root = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(usage, critical=True)
        .sign(authority, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP384R1())
    own = x509.SubjectAlternativeName([_alternative(name) for name in names])
    server_auth = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
    server = (
        _certificate(_name("superlink"), issuer, key.public_key())
        .add_extension(own, critical=False)
        .add_extension(server_auth, critical=False)
        .sign(authority, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(root.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(Encoding.PEM))
    _write_private(folder / "server.key", _private(key, PrivateFormat.PKCS8))


def write_node_keys(folder: Path, name: str) -> None:
    """Write the key of a node and its public half, ``NAME`` and ``NAME.pub``.

    Both are in the format of OpenSSH, as ``ssh-keygen -t ecdsa -b 384`` makes them.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public + b"\n")
    _write_private(folder / name, _private(key, PrivateFormat.OpenSSH))


def write_secret(path: Path) -> None:
    """Write random bytes to a file that its owner alone can read."""
    _write_private(path, secrets.token_bytes(SECRET_BYTES))


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write_private(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, mode=0o600), "wb") as file:
        file.write(data)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + VALID)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
