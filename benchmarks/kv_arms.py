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
    budget_s: float  # afterwards only what has not run at all is run


SMALL, LARGE = Prompt(2_048), Prompt(32_768)
NIXL_PLAIN = tuple(PlainNixl(tls, operation) for tls in (None, "tcp") for operation in ("READ", "WRITE"))
NIXL_OURS = (Ours(transport="nixl"), Ours(transport="nixl", ucx_tls="tcp"))
DELAY_S = 0.015


def sections(only: str | None = None, quick: bool = False) -> list[Section]:
    """What is run; ``only``: of ``loopback``, ``shaped``, ``delay``. ``quick``: short, for a look."""
    chosen = {"loopback": _loopback(quick), "shaped": _shaped(quick), "delay": _delay(quick)}
    return [section for name, group in chosen.items() if only in (None, name) for section in group]


def _loopback(quick: bool) -> list[Section]:
    stripes = (1, 4) if quick else (1, 2, 4, 8)
    plain = [kind for n in stripes for kind in (Ours(n), Ours(n, "xxh3"), Iperf(n), Sketch(n))]
    tls = [Ours(n, tls=True) for n in stripes] + [Ours(4, "xxh3", tls=True)]
    fp8 = Ours(4, codec="fp8")
    small = Section("loopback", SMALL, None, (*plain, *tls, fp8, *NIXL_PLAIN, *NIXL_OURS), 1 if quick else 5, 45.0)
    if quick:
        return [small]
    arms = (*plain, Ours(4, tls=True), fp8, *NIXL_PLAIN, *NIXL_OURS)
    return [small, Section("loopback", LARGE, None, arms, 3, 150.0)]


def _shaped(quick: bool) -> list[Section]:
    stripes = (4,) if quick else (1, 4)
    arms = (*(kind for n in stripes for kind in (Ours(n), Ours(n, "xxh3"), Iperf(n))), Ours(4, tls=True))
    rounds = 1 if quick else 3
    return [
        Section("1 Gbit/s", SMALL, NetworkPath(rate_gbps=1.0), arms, rounds, 45.0),
        Section("10 Gbit/s", SMALL if quick else LARGE, NetworkPath(rate_gbps=10.0), arms, rounds, 70.0),
    ]


def _delay(quick: bool) -> list[Section]:
    def section(rate: float, prompt: Prompt, stripes: tuple[int, ...], rounds: int) -> Section:
        arms = tuple(kind for n in stripes for kind in (Ours(n, "xxh3"), Iperf(n)))
        path = NetworkPath(rate, delay_s=DELAY_S)
        return Section(f"{rate:g} Gbit/s + 2 x 15 ms", prompt, path, arms, rounds, 40.0)

    if quick:
        return [section(1.0, SMALL, (8,), 1)]
    return [section(1.0, SMALL, (1, 4, 8), 3), section(10.0, LARGE, (8, 16), 2)]


def _ucx(tls: str | None) -> Environment:
    return (("UCX_LOG_LEVEL", "error"), *((("UCX_TLS", tls),) if tls else ()))
