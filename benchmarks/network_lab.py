"""How does a transfer behave on a link of a given rate and length? Two network namespaces of this machine, joined.

    with NetworkLab(NetworkPath(rate_gbps=1.0, delay_s=0.015)) as lab:
        subprocess.run(lab.left.command(["ping", "-c", "1", lab.right.address]))

A path without delay is a veth pair. A path with delay is a TUN device in each namespace with a packet_relay.py process
for each direction between them: real packets, real round-trip time, the kernel's own congestion control. A switched
path is two veth pairs and a bridge in a third namespace, where it can be cut: neither end's own interface or address
is touched, packets just stop. ``tc tbf`` shapes what leaves each end; it counts whole frames, so of its rate at most
``payload_share`` can be payload of TCP.

Invariants: everything that was made is gone after the ``with`` block, however it ended; what a killed process left
behind is removed by the next lab of this machine. Needs root, ``ip``, ``tc``: ``why_unavailable`` says what is missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType

_ROOT = Path(__file__).resolve().parent.parent
_PREFIX = "prfaas-lab"
_OURS = re.compile(rf"^{_PREFIX}-(\d+)-")
_ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1: never routed, and alone in their namespaces
_COUNTER = itertools.count()
_BRIDGE, _PORTS = "switch", ("port-a", "port-b")  # in the namespace between the two ends of a switched path

_ETHERNET_BYTES = 14  # what tbf counts of a frame on veth; a TUN device carries bare IP
_TCP_IP_BYTES = 20 + 20 + 12  # with timestamps
_MIN_BURST_BYTES = 128 << 10  # two packets of segmentation offload, which tbf then need not cut up
_QUEUE_S = 0.010
_MIN_QUEUE_BYTES = 1 << 20
_QUEUE_PACKETS = 10_000

_CLONE_NEWNET = 0x40000000  # linux/sched.h

_TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04


@dataclass(frozen=True)
class NetworkPath:
    """What lies between the two namespaces.

    rate_gbps: shaped rate, Gbit/s, counted in whole frames; None: not shaped.
    both_ways: shape right to left too, or only left to right.
    delay_s: seconds by which every packet is held, each way.
    loss: share of packets thrown away, each way; needs a delay above 0, as the relay does it.
    mtu: bytes of the largest IP packet.
    switched: whether it can be cut and mended; without a delay only.
    """

    rate_gbps: float | None = None
    both_ways: bool = True
    delay_s: float = 0.0
    loss: float = 0.0
    mtu: int = 1500
    switched: bool = False

    def __post_init__(self) -> None:
        if self.rate_gbps is not None and self.rate_gbps <= 0:
            raise ValueError(f"rate_gbps must be None or above 0, got {self.rate_gbps!r}")
        if self.delay_s < 0:
            raise ValueError(f"delay_s must be 0 or above, got {self.delay_s!r}")
        if not 0 <= self.loss < 1 or (self.loss and not self.delay_s):
            raise ValueError(f"loss must be in [0, 1) and needs a delay, got {self.loss!r}")
        if self.switched and self.delay_s:
            raise ValueError(f"switched must be false where delay_s is above 0, got {self.delay_s!r}")

    @property
    def relayed(self) -> bool:
        return self.delay_s > 0

    @property
    def payload_share(self) -> float:
        """The most that TCP can carry of the shaped rate: the rest are Ethernet, IP and TCP headers."""
        frame = self.mtu + (0 if self.relayed else _ETHERNET_BYTES)
        return (self.mtu - _TCP_IP_BYTES) / frame

    def shaping(self) -> list[str]:
        """``tc``'s words for the rate. The burst is at least a millisecond and two packets of offload long."""
        assert self.rate_gbps is not None, "only a shaped path has a rate"
        rate = self.rate_gbps * 1e9 / 8
        burst = max(_MIN_BURST_BYTES, int(rate * 0.001))
        limit = burst + max(_MIN_QUEUE_BYTES, int(rate * _QUEUE_S))
        return ["tbf", "rate", f"{int(self.rate_gbps * 1e9)}bit", "burst", f"{burst}b", "limit", f"{limit}b"]


@dataclass(frozen=True)
class Namespace:
    """One side: a network namespace with one address besides loopback."""

    name: str
    address: str
    device: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs ``arguments`` inside."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def enter(self) -> None:
        """Move this thread inside, for good, and with it whatever threads and processes it starts from now on."""
        with open(f"/run/netns/{self.name}", "rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {self.name}")


class NetworkLab:
    """Two namespaces and the path between them; a context manager."""

    def __init__(self, path: NetworkPath) -> None:
        """Nothing is made before ``with``. Entering raises RuntimeError naming the command that failed."""
        self.path = path
        *names, self._middle = [f"{_PREFIX}-{os.getpid()}-{next(_COUNTER)}-{side}" for side in "abm"]
        # Interface names have 15 characters and live for a moment in this process's own namespace: hence the pid.
        devices = [f"pl{os.getpid()}{side}{next(_COUNTER) % 1000}" for side in "ab"]
        self.left, self.right = (Namespace(*parts) for parts in zip(names, _ADDRESSES, devices, strict=True))
        self._cleanup = ExitStack()
        self._cut = False

    def __enter__(self) -> NetworkLab:
        reason = why_unavailable(self.path)
        if reason is not None:
            raise RuntimeError(f"no network laboratory here: {reason}")
        with ExitStack() as cleanup:
            remove_leftovers()
            for side in (self.left, self.right):
                cleanup.callback(_ip_quietly, "netns", "delete", side.name)
                _ip("netns", "add", side.name)
            if self.path.relayed:
                self._join_by_relay(cleanup)
            elif self.path.switched:
                self._join_by_bridge(cleanup)
            else:
                self._join_by_veth()
            self._bring_up()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _join_by_veth(self) -> None:
        left, right = self.left, self.right
        _ip("link", "add", left.device, "netns", left.name, "type", "veth", "peer", right.device, "netns", right.name)

    def reshape(self, rate_gbps: float) -> None:
        """From now on the path carries so much; what is queued is kept. Only of a path that has a rate."""
        self.path = replace(self.path, rate_gbps=rate_gbps)
        for side in self._shaped():
            _run("tc", "-n", side.name, "qdisc", "change", "dev", side.device, "root", *self.path.shaping())

    @property
    def rate_now(self) -> float:
        """Bytes/s that the path lets through, in whole frames; 0: it is cut, inf: it is not shaped."""
        if self._cut:
            return 0.0
        return math.inf if self.path.rate_gbps is None else self.path.rate_gbps * 1e9 / 8

    def cut(self) -> None:
        """Let no packet pass, silently, until ``mend``. Only of a switched path."""
        self._set_port("down")
        self._cut = True

    def mend(self) -> None:
        """Let packets pass again."""
        self._set_port("up")
        self._cut = False

    def _set_port(self, state: str) -> None:
        assert self.path.switched, "only a switched path can be cut"
        _ip("-n", self._middle, "link", "set", _PORTS[1], state)

    def _shaped(self) -> tuple[Namespace, ...]:
        return (self.left, self.right) if self.path.both_ways else (self.left,)

    def _join_by_bridge(self, cleanup: ExitStack) -> None:
        cleanup.callback(_ip_quietly, "netns", "delete", self._middle)
        _ip("netns", "add", self._middle)
        _ip("-n", self._middle, "link", "add", _BRIDGE, "type", "bridge")
        _ip("-n", self._middle, "link", "set", _BRIDGE, "up")
        for side, port in zip((self.left, self.right), _PORTS, strict=True):
            ends = ["link", "add", side.device, "netns", side.name, "type", "veth"]
            _ip(*ends, "peer", "name", port, "netns", self._middle)
            _ip("-n", self._middle, "link", "set", port, "master", _BRIDGE, "up")

    def _join_by_relay(self, cleanup: ExitStack) -> None:
        # Made here and moved: an open TUN device stays with its file descriptor wherever it goes.
        offload = not self.path.loss  # a lost packet should be one segment, not forty
        descriptors = [_open_tun(side.device, offload) for side in (self.left, self.right)]
        for descriptor in descriptors:
            cleanup.callback(os.close, descriptor)
        for side in (self.left, self.right):
            _ip("link", "set", side.device, "netns", side.name)
        for source, target in (descriptors, descriptors[::-1]):
            relay = _start_relay(source, target, self.path)
            cleanup.callback(_stop, relay)

    def _bring_up(self) -> None:
        for side in (self.left, self.right):
            _ip("-n", side.name, "link", "set", "lo", "up")
            settings = ["mtu", str(self.path.mtu), "txqueuelen", str(_QUEUE_PACKETS), "up"]
            _ip("-n", side.name, "link", "set", side.device, *settings)
            _ip("-n", side.name, "address", "add", f"{side.address}/24", "dev", side.device)
        if self.path.rate_gbps is not None:
            for side in self._shaped():
                _run("tc", "-n", side.name, "qdisc", "add", "dev", side.device, "root", *self.path.shaping())


@cache
def why_unavailable(path: NetworkPath) -> str | None:
    """Why this process cannot make a lab with ``path``; None: it can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` command (Debian package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if path.relayed and not os.access(_TUN, os.R_OK | os.W_OK):
        return f"{_TUN} is missing"
    return _why_not_permitted()


def _why_not_permitted() -> str | None:
    """Containers may be root and yet not be allowed to make namespaces."""
    name = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
    except RuntimeError as error:
        return str(error)
    _ip_quietly("netns", "delete", name)
    return None


def remove_leftovers() -> None:
    """Remove the namespaces of labs whose process is gone."""
    for line in _run("ip", "netns", "list").splitlines():
        ours = _OURS.match(line)
        if ours and not Path(f"/proc/{ours[1]}").exists():
            _ip_quietly("netns", "delete", line.split()[0])


def _open_tun(name: str, offload: bool) -> int:
    """A new TUN device whose packets have a virtio_net header; closing the descriptor removes it."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM | (_TUN_F_TSO4 | _TUN_F_TSO6 if offload else 0))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _start_relay(source: int, target: int, path: NetworkPath) -> subprocess.Popen[bytes]:
    words = [str(source), str(target), str(path.delay_s), str(path.loss)]
    command = [sys.executable, "-m", "benchmarks.packet_relay", *words]
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, pass_fds=(source, target))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _ip_quietly(*words: str) -> None:
    with suppress(RuntimeError):  # it was never made, or is gone already
        _ip(*words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
