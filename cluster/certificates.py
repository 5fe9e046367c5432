"""Where do a service's certificates come from? A private authority makes them: for one run, or for an operator's files.

Invariants:
- An authority signs only certificates of processes, never another authority (path length 0).
- Every certificate serves at both ends of a connection and names ``core.credentials.INTERNAL_NAME``; its common name
  says, for people, which process it belongs to.
- Keys are ECDSA P-256: gRPC (BoringSSL) accepts them, which it does not do for Ed25519, and a handshake spends about
  0.1 ms on each signature, made and checked.
- A private key is written to files of mode 0600 only, never over an existing file, or to memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.credentials import INTERNAL_NAME, Credentials, Pem
from core.errors import InvalidConfig

_E = TypeVar("_E", bound=x509.ExtensionType)

CA_FILE, CA_KEY_FILE, CERT_FILE, KEY_FILE = "ca.pem", "ca-key.pem", "cert.pem", "key.pem"
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365

_CLOCK_SKEW = timedelta(hours=1)  # between the maker's clock and the checkers'
_MAX_NAME = 64  # characters of a common name, X.520
_MAX_DAYS = 36500


class Authority:
    """A service's certificate authority, its key in memory."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, name: str, days: float = AUTHORITY_DAYS) -> Self:
        """A new one, valid for ``days`` days."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(f"prfaas {name}")
        builder = _builder(subject, subject, key, key.public_key(), _now() + _days(days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The one that ``write_files`` wrote there. Raises ``InvalidConfig`` naming the file."""
        ca_file, key_file = directory / CA_FILE, directory / CA_KEY_FILE
        certificate = read_certificates(ca_file)[0]
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidConfig(str(key_file), f"holds no plain private key: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise InvalidConfig(str(key_file), f"is not the key of {ca_file}")
        return cls(certificate, key)

    def issue(self, name: str, days: float = CERTIFICATE_DAYS) -> Pem:
        """A certificate for the process ``name``, with its new key; it does not outlive the authority's own."""
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(_now() + _days(days), self._certificate.not_valid_after_utc)
        builder = _builder(_name(name), self._certificate.subject, self._key, key.public_key(), until)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
        both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(both_ends, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(INTERNAL_NAME)]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pem(ca=_pem(self._certificate), cert=_pem(certificate), key=_key_pem(key))

    @property
    def key_pem(self) -> bytes:
        """The secret that can let others in."""
        return _key_pem(self._key)


@dataclass(frozen=True, slots=True)
class CertificateSummary:
    """What people ask of a certificate."""

    subject: str
    issuer: str
    names: tuple[str, ...]  # DNS names
    is_authority: bool
    valid_from: datetime
    valid_until: datetime
    sha256: str  # fingerprint, hex

    def is_valid(self, at: datetime) -> bool:
        """Do the dates include ``at``?"""
        return self.valid_from <= at <= self.valid_until


def write_files(directory: Path, pem: Pem, authority: Authority | None = None) -> Credentials:
    """``ca.pem``, ``cert.pem`` and ``key.pem`` in ``directory``, and ``authority``'s ``ca-key.pem`` if it is given.

    Raises ``InvalidConfig``, and writes nothing, if one of them exists or the directory cannot be written.
    """
    files = {CA_FILE: pem.ca, CERT_FILE: pem.cert, KEY_FILE: pem.key}
    if authority is not None:
        files[CA_KEY_FILE] = authority.key_pem
    existing = [name for name in sorted(files) if (directory / name).exists()]
    if existing:
        raise InvalidConfig(
            str(directory / existing[0]), "exists, and no key is ever overwritten: choose another folder"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in files.items():
            handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "wb") as file:
                file.write(content)
    except OSError as error:
        raise InvalidConfig(str(directory), f"cannot be written: {error.strerror}") from error
    return Credentials(directory / CA_FILE, directory / CERT_FILE, directory / KEY_FILE)


@contextmanager
def private_files(pem: Pem) -> Iterator[Credentials]:
    """Files for this process alone, gone when the block ends.

    On Linux they are in anonymous memory: no key is on a disk, and none is left when the process is killed. Elsewhere
    they are in a temporary folder that only its user can enter, which a killed process leaves behind.
    """
    with ExitStack() as stack:
        if sys.platform == "linux":
            yield Credentials(*(stack.enter_context(_in_memory(content)) for content in (pem.ca, pem.cert, pem.key)))
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="prfaas-tls-"))  # mode 0700
            yield write_files(Path(directory), pem)


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises ``InvalidConfig`` naming the file."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidConfig(str(path), f"holds no PEM certificate: {error}") from error


def require_grpc_accepts(cert_file: Path) -> None:
    """Raise ``InvalidConfig`` if the certificate's kind of key is one that OpenSSL accepts and BoringSSL does not."""
    if isinstance(read_certificates(cert_file)[0].public_key(), ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        raise InvalidConfig(
            "tls.cert_file", f"{cert_file} has an Edwards-curve key, which gRPC refuses: use ECDSA or RSA"
        )


def summarize(certificate: x509.Certificate) -> CertificateSummary:
    """A certificate as ``prfaas certs show`` prints it."""
    constraints = _extension(certificate, x509.BasicConstraints)
    names = _extension(certificate, x509.SubjectAlternativeName)
    return CertificateSummary(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=tuple(names.get_values_for_type(x509.DNSName)) if names is not None else (),
        is_authority=constraints is not None and constraints.ca,
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )


@contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    with open(os.memfd_create("prfaas-tls"), "wb", buffering=0) as file:
        file.write(content)
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    signing_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    until: datetime,
) -> x509.CertificateBuilder:
    """What every certificate has."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(_now() - _CLOCK_SKEW, until))
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    """A common name, cut to the length that X.520 allows: it is for people."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:_MAX_NAME])])


def _days(days: float) -> timedelta:
    if not -_MAX_DAYS <= days <= _MAX_DAYS:
        raise InvalidConfig("days", f"must be at most {_MAX_DAYS}, got {days!r}")
    return timedelta(days=days)


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
