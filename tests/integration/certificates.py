"""Authorities and certificates for one test: made here, valid for as long as it says."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "localhost"


@dataclass(frozen=True, slots=True)
class Files:
    """One certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        begin, end = _valid(timedelta(days=1))
        builder = _builder(self._name, self._name, self._key, begin, end)
        signed = builder.add_extension(x509.BasicConstraints(True, None), True).sign(self._key, hashes.SHA256())
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, lasts: timedelta = timedelta(hours=1), file: str = "") -> Files:
        """A certificate for a host or client of that name; one that lasts less than nothing has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        begin, end = _valid(lasts)
        builder = _builder(_named(name), self._name, key, begin, end)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        signed = builder.add_extension(names, False).sign(self._key, hashes.SHA256())
        files = Files(self.folder / f"{file or name}.crt", self.folder / f"{file or name}.key")
        pem = serialization.Encoding.PEM
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for path, content in ((files.key, secret), (files.certificate, signed.public_bytes(pem))):
            new = path.with_suffix(path.suffix + ".new")
            new.write_bytes(content)
            new.rename(path)
        return files


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _valid(lasts: timedelta) -> tuple[datetime, datetime]:
    now = datetime.now(UTC)
    return now - timedelta(days=2), now + lasts


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )
