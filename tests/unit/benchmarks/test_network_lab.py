"""The laboratory joins two namespaces by the path that was asked for, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from benchmarks.network_lab import Namespace, NetworkLab, NetworkPath, remove_leftovers, why_unavailable

NUM_BYTES = 16 << 20

# Prints the seconds that a connection took, then those of NUM_BYTES to be taken by the other end.
SEND = f"""
import json, socket, sys, time
began = time.perf_counter()
link = socket.create_connection((sys.argv[1], 9999), timeout=30)
connected = time.perf_counter()
link.sendall(bytes({NUM_BYTES}))
link.shutdown(socket.SHUT_WR)
link.recv(1)
print(json.dumps([connected - began, time.perf_counter() - connected]))
"""
RECEIVE = f"""
import socket
server = socket.create_server(("", 9999))
print("up", flush=True)
link, _ = server.accept()
count = 0
while data := link.recv(1 << 20):
    count += len(data)
assert count == {NUM_BYTES}
link.sendall(b"k")
"""


def lab_or_skip(path: NetworkPath) -> NetworkLab:
    reason = why_unavailable(path)
    if reason is not None:
        pytest.skip(reason)
    return NetworkLab(path)


def send_through(lab: NetworkLab) -> tuple[float, float]:
    """Seconds to connect and seconds to move NUM_BYTES from left to right."""
    receiver = subprocess.Popen(lab.right.command([sys.executable, "-c", RECEIVE]), stdout=subprocess.PIPE, text=True)
    with receiver:
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "up\n"
            command = lab.left.command([sys.executable, "-c", SEND, lab.right.address])
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        finally:
            receiver.kill()
    connect_s, transfer_s = json.loads(done.stdout)
    return connect_s, transfer_s


def answers(side: Namespace, address: str) -> bool:
    """Does a host with that address say anything, seen from one side? A port that is closed is an answer."""
    ask = "import socket, sys; sys.exit(socket.socket().connect_ex((sys.argv[1], 9)) != 111)"
    command = side.command([sys.executable, "-c", f"import socket; socket.setdefaulttimeout(1.0); {ask}", address])
    return subprocess.run(command, timeout=30).returncode == 0


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_shaped_pair_passes_bytes_no_faster_than_its_rate() -> None:
    with lab_or_skip(NetworkPath(rate_gbps=1.0)) as lab:
        _, transfer_s = send_through(lab)

    assert 0.9 * NUM_BYTES * 8 / 1e9 < transfer_s < 10


def test_a_switched_path_is_narrowed_cut_and_mended_while_it_stands() -> None:
    with lab_or_skip(NetworkPath(rate_gbps=10.0, switched=True)) as lab:
        lab.reshape(1.0)
        _, transfer_s = send_through(lab)
        lab.cut()
        across, own = answers(lab.left, lab.right.address), answers(lab.right, lab.right.address)
        lab.mend()
        send_through(lab)

    assert 0.9 * NUM_BYTES * 8 / 1e9 < transfer_s < 10
    assert not across
    assert own, "the address of a side is its own, whatever happens between them"
    assert not any(line.startswith(f"prfaas-lab-{os.getpid()}-") for line in namespaces().splitlines())


def test_a_long_path_delays_both_ways() -> None:
    with lab_or_skip(NetworkPath(rate_gbps=1.0, delay_s=0.015)) as lab:
        connect_s, transfer_s = send_through(lab)

    assert 0.030 <= connect_s < 5
    assert 0.9 * NUM_BYTES * 8 / 1e9 + 0.030 < transfer_s < 20


def test_nothing_is_left_after_an_error() -> None:
    lab = lab_or_skip(NetworkPath(rate_gbps=1.0, delay_s=0.001))
    seen = ""

    with suppress(KeyboardInterrupt), lab:
        seen = namespaces()
        raise KeyboardInterrupt

    assert lab.left.name in seen

    assert lab.left.name not in namespaces()
    assert lab.right.name not in namespaces()
    assert lab.left.device not in subprocess.run(["ip", "link"], stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_lab_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_or_skip(NetworkPath(rate_gbps=1.0, mtu=1))  # no kernel takes it

    with pytest.raises(RuntimeError, match="mtu 1 "), lab:
        pytest.fail("entered")

    assert lab.left.name not in namespaces()


def test_what_a_killed_process_left_is_removed() -> None:
    if (reason := why_unavailable(NetworkPath())) is not None:
        pytest.skip(reason)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f"prfaas-lab-{ended.pid}-0-a"
    subprocess.run(["ip", "netns", "add", name], check=True)

    remove_leftovers()

    assert name not in namespaces()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rate_gbps": 0.0}, "rate_gbps"),
        ({"delay_s": -1.0}, "delay_s"),
        ({"loss": 0.1}, "loss"),
        ({"loss": 1.0}, "loss"),
    ],
)
def test_a_path_that_cannot_be_is_refused_by_name(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        NetworkPath(**settings)  # type: ignore[arg-type]


def test_headers_take_their_share_of_the_rate() -> None:
    assert NetworkPath().payload_share == pytest.approx(1448 / 1514)
    assert NetworkPath(delay_s=0.015).payload_share == pytest.approx(1448 / 1500)
    assert NetworkPath(mtu=9000).payload_share == pytest.approx(8948 / 9014)
