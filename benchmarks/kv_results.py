"""What is said of the rounds of one arm, and which figures follow from all rows? Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.kv_arms import LARGE, SMALL, Arm, Iperf, Ours, PlainNixl, Section
from benchmarks.kv_end import Moved
from benchmarks.report import Cell

RAW, CHECKED, TLS = Ours().name, Ours(checksum="xxh3").name, Ours(tls=True).name
IPERF = Iperf().name
UCX_READ, UCX_WRITE = (PlainNixl("tcp", operation).name for operation in ("READ", "WRITE"))
SHM = (Ours(transport="nixl").name,)


@dataclass(frozen=True)
class ArmTimes:
    """The rounds of one arm in one section; ``error``: why there are no more."""

    arm: Arm
    rounds: tuple[Moved, ...] = ()
    cpu_s: tuple[float, ...] = ()  # of both processes, where known
    error: str | None = None

    def add(self, moved: Moved, cpu_s: float | None) -> ArmTimes:
        return replace(self, rounds=(*self.rounds, moved), cpu_s=self.cpu_s if cpu_s is None else (*self.cpu_s, cpu_s))


def row(section: Section, times: ArmTimes) -> dict[str, Cell]:
    """The report's row. Rates are in 10^9 bytes of K/V a second, also where a codec sent fewer."""
    cells: dict[str, Cell] = {
        "section": section.name,
        "num_tokens": section.prompt.num_tokens,
        "num_bytes": section.prompt.num_bytes,
        "arm": times.arm.name,
        "connections": times.arm.connections,
        "num_rounds": len(times.rounds),
        "error": times.error,
    }
    if not times.rounds:
        return cells
    speeds = [moved.num_bytes / moved.seconds / 1e9 for moved in times.rounds]
    cells |= {
        "gbytes_per_s": median(speeds),
        "gbytes_per_s_min": min(speeds),
        "gbytes_per_s_max": max(speeds),
        "path": times.rounds[-1].path,
    }
    if times.cpu_s:
        cells["cpu_s_per_gb"] = median(times.cpu_s) / (section.prompt.num_bytes / 1e9)
    if section.path is not None and section.path.rate_gbps is not None:
        cells["share_of_rate"] = median(speeds) * 8 / section.path.rate_gbps
        cells["payload_share"] = section.path.payload_share
    return cells


def figures(rows: Iterable[Mapping[str, Cell]]) -> dict[str, float]:
    """The numbers of issue 3, of those arms that ran.

    Loopback figures are of the longest prompt that was run, each arm at its best number of connections, and so are the
    shares of a shaped rate. ``ucx_tcp`` is a READ of the pages, as the field's connectors do it, ``ucx_tcp_write`` the
    same as a WRITE, which UCX does faster.
    """
    best = _best_speeds(rows)
    lengths = {tokens for section, tokens, _ in best if section == "loopback"}
    longest = max(lengths, default=SMALL.num_tokens)

    def on_loopback(*names: str) -> float | None:
        return max((best[key] for name in names if (key := ("loopback", longest, name)) in best), default=None)

    found = {
        "tcp_raw_over_iperf3": _ratio(on_loopback(RAW), on_loopback(IPERF)),
        "tcp_checked_over_iperf3": _ratio(on_loopback(CHECKED), on_loopback(IPERF)),
        "tcp_checked_over_ucx_tcp": _ratio(on_loopback(CHECKED), on_loopback(UCX_READ)),
        "tcp_checked_over_ucx_tcp_write": _ratio(on_loopback(CHECKED), on_loopback(UCX_WRITE)),
        "tls_over_raw": _ratio(on_loopback(TLS), on_loopback(RAW)),
        "shm_gbytes_per_s": on_loopback(*SHM),
    }
    for tokens in (LARGE.num_tokens, SMALL.num_tokens):
        raw, checked = (best.get(("10 Gbit/s", tokens, name)) for name in (RAW, CHECKED))
        if raw is not None and checked is not None:
            found["checksum_cost_10gbit"] = 1 - checked / raw
            break
    return {name: value for name, value in found.items() if value is not None} | _shares(rows)


def _best_speeds(rows: Iterable[Mapping[str, Cell]]) -> dict[tuple[Cell, int, Cell], float]:
    best: dict[tuple[Cell, int, Cell], float] = {}
    for cells in rows:
        speed = cells.get("gbytes_per_s")
        if isinstance(speed, float):
            key = (cells["section"], int(cells["num_tokens"] or 0), cells["arm"])
            best[key] = max(best.get(key, 0.0), speed)
    return best


def _shares(rows: Iterable[Mapping[str, Cell]]) -> dict[str, float]:
    """``share_of_rate_SECTION`` of checked tcp, the default, and of iperf3 for comparison."""
    shares: dict[str, float] = {}
    for cells in rows:
        share = cells.get("share_of_rate")
        if not isinstance(share, float) or cells["arm"] not in (CHECKED, IPERF):
            continue
        path = str(cells["section"]).replace(" Gbit/s", "gbit").replace(" + 2 x 15 ms", "_30ms")
        name = f"{'tcp_checked' if cells['arm'] == CHECKED else 'iperf3'}_share_of_{path}"
        shares[name] = max(shares.get(name, 0.0), share)
    return shares


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None
