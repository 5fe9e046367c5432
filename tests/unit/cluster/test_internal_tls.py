import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from cluster.certificates import Authority, read_certificates, summarize, write_files
from cluster.config import TlsConfig
from cluster.internal_tls import InternalTls, decide_tls, is_loopback
from core.credentials import INTERNAL_NAME, Credentials, Pem
from core.errors import InvalidConfig
from core.request import ClusterId, GatewayId, WorkerId

FILES = {"ca_file": "ca.pem", "cert_file": "cert.pem", "key_file": "key.pem"}
EAST = ClusterId("east")


@pytest.mark.parametrize(
    ("config", "addresses", "decided"),
    [
        (TlsConfig(), ["127.0.0.1", "::1", "localhost"], "off: workers listen on loopback only"),
        (TlsConfig(), ["10.0.0.5"], "on: workers listen on 10.0.0.5, with certificates made for this run"),
        (TlsConfig(), ["127.0.0.1", "0.0.0.0"], "on: workers listen on 0.0.0.0, with certificates made for this run"),
        (TlsConfig(**FILES), ["127.0.0.1"], "on: certificates are given"),
        (TlsConfig(mode="on"), ["127.0.0.1"], "on: tls.mode says so, with certificates made for this run"),
        (TlsConfig(mode="on", **FILES), ["10.0.0.5"], "on: tls.mode says so, with the certificates given"),
        (TlsConfig(mode="off"), ["127.0.0.1"], "off: tls.mode says so; workers listen on loopback only"),
        (TlsConfig(mode="off", **FILES), ["b", "a"], "off: tls.mode says so; workers listen on a, b"),
    ],
)
def test_the_decision_follows_the_mode_and_where_workers_listen_and_says_why(config, addresses, decided):
    assert str(decide_tls(config, addresses)) == decided


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.1.2.3", "fe80::1", "node-7", "localhost.example", "")],
)
def test_only_what_is_surely_loopback_counts_as_such(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("mode", "addresses", "level"),
    [
        ("off", ["127.0.0.1"], logging.INFO),
        ("off", ["127.0.0.1", "10.0.0.5"], logging.WARNING),
        ("on", ["10.0.0.5"], logging.INFO),
    ],
)
def test_a_service_that_others_can_listen_to_is_warned_of(mode, addresses, level, caplog):
    with caplog.at_level(logging.INFO):
        tls = InternalTls(TlsConfig(mode=mode), addresses, EAST)

    (record,) = caplog.records
    assert record.levelno == level
    assert str(tls.decision) in record.getMessage()


def test_off_means_no_certificates(tmp_path):
    tls = InternalTls(TlsConfig(mode="off"), ["10.0.0.5"], EAST)

    assert tls.open(GatewayId("g")) is None
    assert tls.proof_of(WorkerId("w")) is None


def test_a_run_without_files_gives_every_process_a_certificate_of_its_own(tmp_path):
    tls = InternalTls(TlsConfig(mode="on"), ["127.0.0.1"], EAST)

    gateway = tls.open(GatewayId("gateway-1"))
    proof = tls.proof_of(WorkerId("prefill-0"))

    assert isinstance(proof, Pem)
    assert gateway is not None
    gateway.check()
    write_files(tmp_path / "worker", proof).check()
    assert proof.ca == gateway.ca_file.read_bytes()
    names = [
        summarize(read_certificates(file)[0]).subject for file in (gateway.cert_file, tmp_path / "worker/cert.pem")
    ]
    assert names == ["CN=gateway-1", "CN=prefill-0"]
    tls.close()
    with pytest.raises(InvalidConfig):
        gateway.check()


def test_two_runs_do_not_trust_each_other(tmp_path):
    one, other = (InternalTls(TlsConfig(mode="on"), [], EAST).proof_of(WorkerId("w")) for _ in range(2))
    assert isinstance(one, Pem)
    assert isinstance(other, Pem)

    with pytest.raises(InvalidConfig, match=r"tls\.cert_file"):
        write_files(tmp_path / "mixed", Pem(ca=one.ca, cert=other.cert, key=other.key)).check()


def test_a_key_that_openssl_takes_and_grpc_does_not_is_refused_at_the_start(tmp_path: Path):
    key, name = ed25519.Ed25519PrivateKey.generate(), x509.Name([])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(INTERNAL_NAME)]), critical=True)
    pem = builder.sign(key, None).public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    held = write_files(tmp_path / "certs", Pem(ca=pem, cert=pem, key=key_pem))
    held.check()
    given = TlsConfig(ca_file=str(held.ca_file), cert_file=str(held.cert_file), key_file=str(held.key_file))

    with pytest.raises(InvalidConfig, match=r"tls\.cert_file.*ECDSA or RSA"):
        InternalTls(given, ["10.0.0.5"], EAST).open(GatewayId("g"))


def test_given_files_are_checked_here_and_named_to_the_workers(tmp_path: Path):
    held = write_files(tmp_path / "certs", Authority.create("service").issue("node"))
    given = TlsConfig(ca_file=str(held.ca_file), cert_file=str(held.cert_file), key_file=str(held.key_file))
    tls = InternalTls(given, ["10.0.0.5"], EAST)

    assert tls.open(GatewayId("g")) == held
    assert tls.proof_of(WorkerId("w")) == held
    assert isinstance(tls.proof_of(WorkerId("w")), Credentials)
    tls.close()
    assert held.key_file.exists(), "files that were given are not ours to remove"

    held.key_file.unlink()
    with pytest.raises(InvalidConfig, match=r"tls\.key_file"):
        tls.open(GatewayId("g"))
