"""Certificates as others see them: OpenSSL (strictly) and people; what is written, and what is not."""

import ssl
import stat
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from cluster.certificates import (
    CERTIFICATE_DAYS,
    Authority,
    private_files,
    read_certificates,
    summarize,
    write_files,
)
from core.credentials import INTERNAL_NAME, Credentials
from core.errors import InvalidConfig


def days_left(until: datetime) -> float:
    return (until - datetime.now(UTC)) / timedelta(days=1)


def test_a_certificate_says_whose_it_is_and_for_how_long(tmp_path):
    held = write_files(tmp_path / "c", Authority.create("east").issue("prefill-0"))
    (certificate,), (authority,) = read_certificates(held.cert_file), read_certificates(held.ca_file)

    shown, signer = summarize(certificate), summarize(authority)

    assert (shown.subject, shown.issuer, signer.subject) == ("CN=prefill-0", "CN=prfaas east", "CN=prfaas east")
    assert shown.names == (INTERNAL_NAME,)
    assert (shown.is_authority, signer.is_authority) == (False, True)
    assert days_left(shown.valid_until) == pytest.approx(CERTIFICATE_DAYS, abs=0.01)
    assert shown.is_valid(datetime.now(UTC) - timedelta(minutes=30)), "clocks of nodes differ a little"
    assert not shown.is_valid(shown.valid_until + timedelta(seconds=1))
    certificate.verify_directly_issued_by(authority)


def test_openssl_accepts_them_at_its_strictest(tmp_path):
    held = write_files(tmp_path / "c", Authority.create("east").issue("prefill-0"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    strict = held.client_context()
    strict.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    strict.check_hostname = True
    client = strict.wrap_bio(to_client, to_server, server_hostname=INTERNAL_NAME)
    server = held.server_context().wrap_bio(to_server, to_client, server_side=True)

    for end in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            end.do_handshake()
    client.do_handshake()
    server.do_handshake()

    assert client.version() == "TLSv1.3"
    context.load_verify_locations(held.ca_file)
    assert [found["subject"] for found in context.get_ca_certs()] == [((("commonName", "prfaas east"),),)]


def test_a_process_cannot_let_others_in(tmp_path):
    """A certificate signed with a process's key is not accepted: its own says that it is no authority."""
    process = Authority.create("east").issue("prefill-0")
    (tmp_path / "ca.pem").write_bytes(process.cert)
    (tmp_path / "ca-key.pem").write_bytes(process.key)
    forged = Authority.load(tmp_path).issue("intruder")
    held = write_files(tmp_path / "forged", forged)
    held.ca_file.write_bytes(process.ca)
    held.cert_file.write_bytes(forged.cert + process.cert)  # with the whole chain

    with pytest.raises(InvalidConfig, match=r"tls\.cert_file"):
        held.check()


def test_a_certificate_does_not_outlive_its_authority(tmp_path):
    authority = Authority.create("east", days=2)
    held = write_files(tmp_path / "c", authority.issue("prefill-0", days=30))

    assert days_left(summarize(read_certificates(held.cert_file)[0]).valid_until) == pytest.approx(2, abs=0.01)


def test_an_authority_that_was_written_signs_again(tmp_path):
    authority = Authority.create("east")
    held = write_files(tmp_path / "a", authority.issue("one"), authority)
    other = write_files(tmp_path / "b", Authority.load(tmp_path / "a").issue("two"))

    Credentials(held.ca_file, other.cert_file, other.key_file).check()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_two_authorities_of_one_name_can_be_trusted_together_while_one_replaces_the_other(tmp_path):
    old, new = (write_files(tmp_path / name, Authority.create("service").issue("w")) for name in ("old", "new"))
    both = tmp_path / "both.pem"
    both.write_bytes(old.ca_file.read_bytes() + new.ca_file.read_bytes())

    for held in (old, new):
        Credentials(both, held.cert_file, held.key_file).check()
    assert len(read_certificates(both)) == 2


def test_long_names_are_cut_to_what_a_certificate_holds(tmp_path):
    held = write_files(tmp_path / "c", Authority.create("c" * 100).issue("w" * 100))

    held.check()
    assert summarize(read_certificates(held.cert_file)[0]).subject == f"CN={'w' * 64}"


def test_keys_are_for_their_owner_and_nothing_is_overwritten(tmp_path):
    authority = Authority.create("east")
    folder = tmp_path / "deep" / "certs"
    write_files(folder, authority.issue("one"), authority)

    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "cert.pem").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InvalidConfig, match=r"ca-key\.pem: exists"):
        write_files(folder, authority.issue("two"), authority)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="cannot be written"):
        write_files(tmp_path / "file" / "certs", Authority.create("east").issue("one"))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_private_files_are_gone_with_their_block(platform, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    pem = Authority.create("east").issue("one")

    with private_files(pem) as held:
        held.check()
        assert held.pem() == pem
        folders = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()]
        assert folders == ([] if platform == "linux" else [0o700])

    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidConfig):
        held.check()


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_without_certificates_is_named(tmp_path: Path, content):
    path = tmp_path / "c.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"c\.pem: holds no PEM certificate"):
        read_certificates(path)


@pytest.mark.parametrize("key", [None, b"nonsense", Authority.create("other").key_pem])
def test_an_authority_without_its_key_is_named(tmp_path: Path, key):
    authority = Authority.create("east")
    write_files(tmp_path / "a", authority.issue("one"), authority)
    (tmp_path / "a/ca-key.pem").unlink()
    if key is not None:
        (tmp_path / "a/ca-key.pem").write_bytes(key)
    with pytest.raises(InvalidConfig, match=r"ca-key\.pem"):
        Authority.load(tmp_path / "a")


def test_every_certificate_has_a_serial_number_of_its_own():
    authority = Authority.create("east")
    serials = {x509.load_pem_x509_certificate(authority.issue("same").cert).serial_number for _ in range(8)}
    assert len(serials) == 8
