import logging
import os
import shutil
import socket
import ssl
import threading
from pathlib import Path

import pytest

from cluster.certificates import CERT_FILE, KEY_FILE, Authority, write_files
from core.credentials import Credentials, Reloaded
from core.errors import InvalidConfig

AUTHORITY = Authority.create("service")
TIMEOUT_S = 10.0


def credentials(
    directory: Path, name: str = "worker", authority: Authority = AUTHORITY, days: float = 1.0
) -> Credentials:
    return write_files(directory, authority.issue(name, days))


def replace_certificate(held: Credentials, name: str, authority: Authority = AUTHORITY) -> None:
    """What an operator's rotation does: new files, moved over the old ones."""
    new = credentials(held.ca_file.parent / f"new-{name}", name, authority)
    os.replace(new.ca_file, held.ca_file)
    os.replace(new.cert_file, held.cert_file)
    os.replace(new.key_file, held.key_file)


def talk(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str, str]:
    """One exchange over sockets; the common names that the (client, server) ends saw. Raises what either raised."""
    errors: list[Exception] = []
    seen: list[str] = []
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(TIMEOUT_S)

    def serve() -> None:
        try:
            with server.wrap_socket(ends[1], server_side=True) as tls:
                assert tls.recv(5) == b"hello"
                tls.sendall(b"world")
                seen.append(common_name(tls))
        except Exception as error:
            errors.append(error)
        finally:
            ends[1].close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ends[0]) as tls:
            assert tls.version() == "TLSv1.3"
            tls.sendall(b"hello")
            if tls.recv(5) != b"world":
                raise ssl.SSLEOFError("the server ended the connection")
            mine = common_name(tls)
    except Exception as error:
        errors.append(error)
    finally:
        ends[0].close()
        thread.join()
    if errors:
        raise errors[0]
    return mine, seen[0]


def common_name(connection: ssl.SSLSocket) -> str:
    found = connection.getpeercert()
    assert found is not None
    return str(dict(pair for part in found["subject"] for pair in part)["commonName"])  # type: ignore[misc]


def test_two_processes_of_one_authority_see_each_others_names(tmp_path: Path) -> None:
    one, other = credentials(tmp_path / "a", "prefill-0"), credentials(tmp_path / "b", "decode-0")

    assert talk(one.server_context(), other.client_context()) == ("prefill-0", "decode-0")


@pytest.mark.parametrize("bad_end", ["server", "client"])
@pytest.mark.parametrize("fault", ["foreign authority", "expired"])
def test_neither_end_accepts_a_certificate_that_is_foreign_or_expired(tmp_path: Path, bad_end: str, fault: str) -> None:
    good = credentials(tmp_path / "good")
    if fault == "expired":
        bad = credentials(tmp_path / "bad", days=-0.001)
    else:
        foreign = credentials(tmp_path / "foreign", authority=Authority.create("other"))
        bad = Credentials(good.ca_file, foreign.cert_file, foreign.key_file)  # trusts us, is not trusted
    server, client = (bad, good) if bad_end == "server" else (good, bad)

    with pytest.raises(ssl.SSLError):
        talk(server.server_context(), client.client_context())


def test_a_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    held = credentials(tmp_path / "a")
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(held.ca_file)

    with pytest.raises(ssl.SSLError):
        talk(held.server_context(), bare)


def test_old_tls_is_refused(tmp_path: Path) -> None:
    held = credentials(tmp_path / "a")
    old = held.client_context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(ssl.SSLError):
        talk(held.server_context(), old)


@pytest.mark.parametrize(
    ("file", "content", "key"),
    [
        ("ca_file", None, "tls.ca_file"),
        ("cert_file", None, "tls.cert_file"),
        ("key_file", None, "tls.key_file"),
        ("ca_file", b"not a certificate", "tls.ca_file"),
        ("cert_file", b"not a certificate", "tls.cert_file"),
        ("key_file", AUTHORITY.issue("another").key, "tls.key_file"),
    ],
)
def test_unusable_files_are_named_at_the_start(tmp_path: Path, file: str, content: bytes | None, key: str) -> None:
    held = credentials(tmp_path / "a")
    path: Path = getattr(held, file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    for make in (Credentials.server_context, Credentials.client_context, Credentials.pem, Credentials.check):
        with pytest.raises(InvalidConfig) as raised:
            Reloaded(held, make)
        assert raised.value.key == key
        assert str(path) in raised.value.message


def test_check_finds_a_certificate_that_the_authority_did_not_sign(tmp_path: Path) -> None:
    held, foreign = credentials(tmp_path / "a"), credentials(tmp_path / "b", authority=Authority.create("other"))
    held.check()

    with pytest.raises(InvalidConfig, match=r"tls\.cert_file") as raised:
        Credentials(held.ca_file, foreign.cert_file, foreign.key_file).check()
    assert str(foreign.cert_file) in str(raised.value)


def test_check_finds_an_expired_certificate(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="expired"):
        credentials(tmp_path / "a", days=-0.001).check()


def test_pem_is_what_the_files_hold(tmp_path: Path) -> None:
    issued = AUTHORITY.issue("worker")
    held = write_files(tmp_path / "a", issued)

    assert held.pem() == issued
    assert issued.key.decode() not in repr(issued)


def test_a_context_is_kept_while_the_files_stay_and_made_anew_when_they_change(tmp_path: Path) -> None:
    held, peer = credentials(tmp_path / "a", "before"), credentials(tmp_path / "b")
    contexts = Reloaded(held, Credentials.server_context)
    first = contexts.current()
    assert contexts.current() is first

    replace_certificate(held, "after")

    assert talk(contexts.current(), peer.client_context())[0] == "after"
    assert talk(first, peer.client_context())[0] == "before"


@pytest.mark.parametrize("broken", ["half a rotation", "missing", "nonsense", "foreign"])
def test_files_that_cannot_be_used_replace_nothing(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    held, peer = credentials(tmp_path / "a", "before"), credentials(tmp_path / "b")
    contexts = Reloaded(held, Credentials.server_context)
    first = contexts.current()
    foreign = credentials(tmp_path / "c", authority=Authority.create("other"))
    if broken == "half a rotation":
        shutil.copy(credentials(tmp_path / "d", "after").cert_file, held.cert_file)
    elif broken == "missing":
        held.key_file.unlink()
    elif broken == "nonsense":
        held.cert_file.write_text("-----BEGIN CERTIFICATE-----\n")
    else:
        shutil.copy(foreign.cert_file, held.cert_file)
        shutil.copy(foreign.key_file, held.key_file)

    with caplog.at_level(logging.WARNING):
        assert contexts.current() is first
        assert contexts.current() is first

    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once, not at every connection"
    assert talk(first, peer.client_context())[0] == "before"

    for name in (CERT_FILE, KEY_FILE):
        (held.ca_file.parent / name).unlink(missing_ok=True)
    replace_certificate(held, "repaired")
    assert talk(contexts.current(), peer.client_context())[0] == "repaired"
