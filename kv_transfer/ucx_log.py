"""Over what does UCX really carry our bytes? Read back from what UCX says when it chooses.

NIXL has no call that tells. UCX, asked by ``UCX_PROTO_INFO``, writes a table into its log whenever it works out how an
endpoint does one kind of operation, for each range of sizes:

    | 3f2a intra-node cfg#1                                    |      name of the context (our agent), where the peer is
    | remote memory write by ucp_put* from host memory to host |
    | 0..inf | zero-copy   | cma/memory                        |      transport/device

The log goes to a file in memory. UCX reads where it goes once per process, when it is loaded, so there is one log for
all transports of a process; what was loaded before us (or a log that the user wants elsewhere: UCX_LOG_FILE) leaves us
without, and then a path is just ``ucx``.

How sure it is: the table is what UCX will do, not a count of what it did. An endpoint with a configuration that UCX
has seen before prints none; then the newest table of this agent counts, and that is a guess where one agent has peers
that are reached in different ways.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_NOT_BETWEEN_PROCESSES = frozenset({"self", "cuda_copy", "gdr_copy"})
_SHARED_MEMORY = frozenset({"cma", "knem", "posix", "sysv", "xpmem"})
_HEADER = re.compile(r"\| (?P<agent>\S+) (?:self|intra-node|inter-node) cfg#\d+ +\|")
_OPERATION = re.compile(r"\| remote memory write by ucp_put")
_RANGE = re.compile(r"\| +(?P<first>\d+)(?:\.\.(?P<last>\d+|inf))? +\|[^|]*\|(?P<config>[^|]*)\|")
_TRANSPORT = re.compile(r"(?:^|\s)([a-z][a-z0-9_]*)/")


@dataclass(frozen=True, slots=True)
class Choice:
    """How one agent writes into a peer's memory: transports for each range of sizes."""

    agent: str
    ranges: tuple[tuple[int, int | None, frozenset[str]], ...]  # first and last bytes (None: no end), transports

    def transports(self, num_bytes: int) -> frozenset[str]:
        """Those that carry a write of ``num_bytes``."""
        fitting = (t for first, last, t in self.ranges if first <= num_bytes and (last is None or num_bytes <= last))
        return next(fitting, frozenset())


def parse_choices(text: str) -> list[Choice]:
    """The tables of remote writes in UCX's log, oldest first; whatever else is there is skipped."""
    choices: list[Choice] = []
    agent, ours = "", False
    ranges: list[tuple[int, int | None, frozenset[str]]] = []
    for line in [*text.splitlines(), "| end self cfg#0 |"]:
        if header := _HEADER.search(line):
            if ranges:
                choices.append(Choice(agent, tuple(ranges)))
            agent, ours, ranges = header["agent"], False, []
        elif _OPERATION.search(line):
            ours = True
        elif ours and (row := _RANGE.search(line)):
            last = None if row["last"] == "inf" else int(row["last"] or row["first"])
            ranges.append((int(row["first"]), last, frozenset(_TRANSPORT.findall(row["config"]))))
    return choices


def path_of(transports: frozenset[str]) -> str:
    """``ucx:shm``, ``ucx:tcp``, ``ucx:cuda_ipc``, ...; ``ucx`` where it is not known."""
    names = {"shm" if name in _SHARED_MEMORY else name for name in transports}
    return "ucx:" + "+".join(sorted(names)) if names else "ucx"


def fell_to_tcp(path: str, environment: Mapping[str, str]) -> bool:
    """Are bytes carried by TCP although the user did not ask UCX for just that (UCX_TLS)?"""
    asked = {name.strip() for name in environment.get("UCX_TLS", "all").split(",")}
    return "tcp" in path.removeprefix("ucx:").split("+") and not asked - _NOT_BETWEEN_PROCESSES <= {"tcp"}


class UcxLog:
    """What UCX has said in this process."""

    def __init__(self) -> None:
        # Never closed: UCX keeps writing to it for the life of the process.
        self._file = os.memfd_create("ucx-log") if "UCX_LOG_FILE" not in os.environ and not _loaded_ucx() else None

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Load UCX within: it will write to this log."""
        mine = {} if self._file is None else {"UCX_LOG_FILE": f"/proc/self/fd/{self._file}", "UCX_PROTO_INFO": "y"}
        with environment(mine):
            yield

    def size(self) -> int:
        """Bytes said so far."""
        if self._file is None:
            return 0
        for library in _loaded_ucx():  # what it said lies in a buffer of its own
            ctypes.CDLL(library).ucs_log_flush()
        return os.fstat(self._file).st_size

    def transports(self, agent: str, num_bytes: int, since: int) -> frozenset[str]:
        """What carries a write of ``num_bytes`` of ``agent``: as it said behind byte ``since``, else at any time."""
        size = self.size()
        if self._file is None:
            return frozenset()
        for start in (since, 0):
            text = os.pread(self._file, size - start, start).decode(errors="replace")
            choices = [choice for choice in parse_choices(text) if choice.agent == agent]
            if choices:
                return choices[-1].transports(num_bytes)
        return frozenset()


@cache
def ucx_log() -> UcxLog:
    """The process's one log, made before UCX is loaded."""
    return UcxLog()


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a library that is configured by nothing else; what the user has set stays."""
    added = {name: text for name, text in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _loaded_ucx() -> set[str]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return {line.split()[-1] for line in maps.splitlines() if "/libucs-" in line or "/libucs.so" in line}
