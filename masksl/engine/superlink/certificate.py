"""Certificate of a run: made for it, pinned by its clients, and gone with it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

NAME = "masksl"
"""Name in the certificate of every run, whatever the address of the server."""

_BEFORE = timedelta(days=2)  # clocks of clients may be behind
_AFTER = timedelta(days=400)


@dataclass(frozen=True)
class RunCertificate:
    """A self-signed certificate and its private key, both as PEM.

    Parameters
    ----------
    key : bytes
        The private key. It is nowhere but in this process.
    certificate : bytes
        What the clients of the run accept, and nothing else.
    """

    key: bytes
    certificate: bytes

    @classmethod
    def make(cls) -> "RunCertificate":
        """Make a new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEFORE)
            .not_valid_after(now + _AFTER)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return cls(private, certificate.public_bytes(Encoding.PEM))
