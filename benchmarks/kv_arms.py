"""Which ways of moving K/V are compared, and on which paths?

An arm is a value: what it is called, the environment that its processes need, and how many connections it has. How it
is carried out is in kv_peer.py (ours), kv_rivals.py (plain NIXL, the bare sketch) and iperf.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kv_prompt import Prompt
from benchmarks.network_lab import NetworkPath
from kv_transfer.transport import LinkStats

Environment = tuple[tuple[str, str], ...]  # variables, sorted


@dataclass(frozen=True)
class Ours:
    """KvSender to KvReceiver over one of our transports."""

    connections: int = 1
    checksum: str = "none"
    tls: bool = False
    codec: str = "raw"
    transport: str = "tcp"
    ucx_tls: str | None = None  # what UCX may use, for ``nixl``; None: its own choice

    @property
    def name(self) -> str:
        parts = [f"ours {self.transport}"]
        if self.transport == "nixl":
            parts.append(f"UCX_TLS={self.ucx_tls or 'any'}")
        parts += [word for word in ("tls" if self.tls else "", self.codec) if word not in ("", "raw")]
        return " ".join([*parts, "" if self.checksum == "none" else self.checksum]).strip()

    @property
    def environment(self) -> Environment:
        return _ucx(self.ucx_tls) if self.transport == "nixl" else ()

    @property
    def lossy(self) -> bool:
        return self.codec in ("int8", "fp8")

    def complaint(self, found: LinkStats | None) -> str | None:
        """What of a link is not as this arm wants it; None: nothing."""
        if found is None:
            return "the transport does not tell what its link is made of"
        if self.transport == "tcp" and found.connections != self.connections:
            return f"{found.connections} connections live where {self.connections} were asked for"
        if self.tls != ("tls" in found.path):
            return f"TLS was {'' if self.tls else 'not '}asked for, and the path is {found.path}"
        if self.codec != "raw" and self.codec not in {use.codec.name.lower() for use in found.encoded if use.raw_bytes}:
            return f"{self.codec} was asked for, and nothing was encoded with it"
        return None


@dataclass(frozen=True)
class PlainNixl:
    """NIXL as connectors use it: one request for every page of every layer, after prefill.

    ``operation``: ``READ`` by the receiving end, as vLLM's connector does, or ``WRITE`` by the sending end.
    """

    ucx_tls: str | None = None
    operation: str = "READ"
    connections: int = 1
    lossy: bool = False

    @property
    def name(self) -> str:
        return f"plain nixl UCX_TLS={self.ucx_tls or 'any'} {self.operation}"

    @property
    def environment(self) -> Environment:
        return _ucx(self.ucx_tls)


@dataclass(frozen=True)
class Sketch:
    """A thread for each connection that sends 1 MiB after 1 MiB of contiguous memory: no pages, frames or messages."""

    connections: int = 1
    lossy: bool = False
    name: str = "bare sockets"
    environment: Environment = ()


@dataclass(frozen=True)
class Iperf:
    """iperf3, whose bytes come from and go to one small buffer."""

    connections: int = 1
    lossy: bool = False
    name: str = "iperf3"
    environment: Environment = ()


Arm = Ours | PlainNixl | Sketch | Iperf


def pair_name(arm: Arm) -> str:
    """Arms of one name share a pair of processes: sockets do, each use of NIXL, with threads that poll, has its own."""
    return arm.name if arm.environment else "sockets"


@dataclass(frozen=True)
class Section:
    """Arms that are measured in turns, on one path, with the same prompt."""

    name: str
    prompt: Prompt
    path: NetworkPath | None  # None: loopback
    arms: tuple[Arm, ...]
    num_rounds: int
    budget_s: float  # no round begins after it


SMALL, LARGE = Prompt(2_048), Prompt(32_768)
STRIPES = (1, 2, 4, 8)
LONG_STRIPES = (1, 4, 8, 16)
NIXL_PLAIN = tuple(PlainNixl(tls, operation) for tls in (None, "tcp") for operation in ("READ", "WRITE"))
NIXL_OURS = (Ours(transport="nixl"), Ours(transport="nixl", ucx_tls="tcp"))


def sections(only: str | None = None, quick: bool = False) -> list[Section]:
    """What is run; ``only``: of ``loopback``, ``shaped``, ``delay``. ``quick``: short, for a look and for tests."""
    stripes = (1, 4) if quick else STRIPES
    rounds = 1 if quick else 5
    chosen = {
        "loopback": _loopback(stripes, rounds, quick),
        "shaped": _shaped((4,) if quick else (1, 4), min(rounds, 3), quick),
        "delay": _delay((8,) if quick else LONG_STRIPES, min(rounds, 3), quick),
    }
    return [section for name, group in chosen.items() if only in (None, name) for section in group]


def _loopback(stripes: tuple[int, ...], rounds: int, quick: bool) -> list[Section]:
    tcp = [
        Ours(n, checksum, tls) for n in stripes for checksum, tls in (("none", False), ("xxh3", False), ("none", True))
    ]
    tcp += [Ours(4, codec="fp8"), Ours(4, "xxh3", tls=True)]
    bare = [kind(n) for n in stripes for kind in (Iperf, Sketch)]
    arms = (*tcp, *bare, *NIXL_PLAIN, *NIXL_OURS)
    sizes = ((SMALL, 60.0),) if quick else ((SMALL, 60.0), (LARGE, 200.0))
    return [Section("loopback", prompt, None, arms, rounds, budget_s) for prompt, budget_s in sizes]


def _shaped(stripes: tuple[int, ...], rounds: int, quick: bool) -> list[Section]:
    arms = tuple(arm for n in stripes for arm in (Ours(n), Ours(n, "xxh3"), Ours(n, tls=True), Iperf(n)))
    paths = {1.0: (SMALL, 60.0), 10.0: (SMALL if quick else LARGE, 90.0)}
    return [
        Section(f"{rate:g} Gbit/s", prompt, NetworkPath(rate_gbps=rate), arms, rounds, budget_s)
        for rate, (prompt, budget_s) in paths.items()
    ]


def _delay(stripes: tuple[int, ...], rounds: int, quick: bool) -> list[Section]:
    arms = tuple(arm for n in stripes for arm in (Ours(n, "xxh3"), Iperf(n)))
    paths = {1.0: (SMALL, 60.0)} if quick else {1.0: (SMALL, 60.0), 10.0: (LARGE, 60.0)}
    return [
        Section(f"{rate:g} Gbit/s + 2 x 15 ms", prompt, NetworkPath(rate, delay_s=0.015), arms, rounds, budget_s)
        for rate, (prompt, budget_s) in paths.items()
    ]


def _ucx(tls: str | None) -> Environment:
    return (("UCX_LOG_LEVEL", "error"), *((("UCX_TLS", tls),) if tls else ()))
