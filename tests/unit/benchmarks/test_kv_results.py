"""Rows and figures say what was measured, and say why where nothing was."""

from __future__ import annotations

import pytest

from benchmarks.kv_arms import Arm, Iperf, Ours, PlainNixl, Prompt, Section, pair_name, sections
from benchmarks.kv_end import Moved
from benchmarks.kv_results import ArmTimes, figures, row
from benchmarks.network_lab import NetworkPath
from benchmarks.report import Cell
from core.request import ClusterId, WorkerId
from kv_transfer.transport import LinkStats, PeerIdentity

PROMPT = Prompt(2_048)
GB = 10**9


def section(name: str, path: NetworkPath | None = None) -> Section:
    return Section(name, PROMPT, path, (), num_rounds=3, budget_s=1.0)


def ran(arm: Arm, *speeds: float, cpu_s: float | None = None) -> ArmTimes:
    """Rounds of ``speeds`` GB/s."""
    times = ArmTimes(arm)
    for speed in speeds:
        times = times.add(Moved(1.0, int(speed * GB), "tcp"), cpu_s)
    return times


def link(connections: int = 1, path: str = "tcp") -> LinkStats:
    return LinkStats(PeerIdentity(WorkerId("right"), ClusterId("bench")), path, connections)


def test_a_row_has_the_median_and_the_spread() -> None:
    cells = row(section("loopback"), ran(Ours(4), 3.0, 1.0, 2.0, cpu_s=0.5))

    assert (cells["gbytes_per_s"], cells["gbytes_per_s_min"], cells["gbytes_per_s_max"]) == (2.0, 1.0, 3.0)
    assert cells["num_rounds"] == 3
    assert cells["cpu_s_per_gb"] == pytest.approx(0.5 / (PROMPT.num_bytes / GB))
    assert "share_of_rate" not in cells


def test_a_row_of_a_shaped_path_has_its_share_and_the_most_that_is_possible() -> None:
    cells = row(section("10 Gbit/s", NetworkPath(rate_gbps=10.0)), ran(Ours(4), 1.0))

    assert cells["share_of_rate"] == pytest.approx(0.8)
    assert cells["payload_share"] == pytest.approx(1448 / 1514)


def test_a_failed_arm_is_a_row_with_its_reason() -> None:
    cells = row(section("loopback"), ArmTimes(Iperf(2), error="there is no iperf3"))

    assert cells["error"] == "there is no iperf3"
    assert cells["num_rounds"] == 0
    assert "gbytes_per_s" not in cells


def test_figures_compare_each_arm_at_its_best() -> None:
    arms = {
        Ours(1): 3.0,
        Ours(4): 4.5,
        Ours(1, "xxh3"): 2.5,
        Ours(4, "xxh3"): 3.6,
        Ours(4, tls=True): 1.8,
        Iperf(1): 3.0,
        Iperf(2): 2.0,
        PlainNixl("tcp", "READ"): 1.2,
        PlainNixl("tcp", "WRITE"): 1.8,
        Ours(transport="nixl"): 5.0,
    }
    rows: list[dict[str, Cell]] = [row(section("loopback"), ran(arm, speed)) for arm, speed in arms.items()]
    shaped = section("10 Gbit/s", NetworkPath(rate_gbps=10.0))
    rows += [row(shaped, ran(Ours(4), 1.0)), row(shaped, ran(Ours(4, "xxh3"), 0.98)), row(shaped, ran(Iperf(4), 1.1))]

    assert figures(rows) == pytest.approx(
        {
            "tcp_raw_over_iperf3": 1.5,
            "tcp_checked_over_iperf3": 1.2,
            "tcp_checked_over_ucx_tcp": 3.0,
            "tcp_checked_over_ucx_tcp_write": 2.0,
            "tls_over_raw": 0.4,
            "shm_gbytes_per_s": 5.0,
            "checksum_cost_10gbit": 0.02,
            "tcp_checked_share_of_10gbit": 0.784,
            "iperf3_share_of_10gbit": 0.88,
        }
    )


def test_what_did_not_run_has_no_figure() -> None:
    rows = [row(section("loopback"), ran(Ours(4), 1.0)), row(section("loopback"), ArmTimes(Iperf(4), error="gone"))]

    assert figures(rows) == {}


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_arms_of_a_section_have_one_name(quick: bool) -> None:
    chosen = sections(quick=quick)

    assert {s.name.split(" + ")[0] for s in chosen} == {"loopback", "1 Gbit/s", "10 Gbit/s"}
    for one in chosen:
        assert len({(arm.name, arm.connections) for arm in one.arms}) == len(one.arms)


def test_only_one_kind_of_path_is_run_when_asked() -> None:
    assert {one.name for one in sections("loopback")} == {"loopback"}
    assert all(one.path is not None and one.path.relayed for one in sections("delay"))


def test_arms_that_poll_have_processes_of_their_own() -> None:
    arms = (Ours(4), Ours(1, tls=True), Ours(transport="nixl"), PlainNixl(), PlainNixl(operation="WRITE"))

    assert len({pair_name(arm) for arm in arms}) == 4


@pytest.mark.parametrize(
    ("arm", "found", "said"),
    [
        (Ours(4), None, "does not tell"),
        (Ours(4), link(3), "3 connections live where 4"),
        (Ours(4, tls=True), link(4), "TLS was asked for"),
        (Ours(4), link(4, "tcp+tls1.3"), "TLS was not asked for"),
        (Ours(4, codec="fp8"), link(4), "nothing was encoded"),
    ],
)
def test_an_arm_complains_of_a_link_that_is_not_what_it_is_about(arm: Ours, found: LinkStats | None, said: str) -> None:
    assert said in (arm.complaint(found) or "")


def test_an_arm_does_not_complain_of_its_own_link() -> None:
    assert Ours(4).complaint(link(4)) is None
    assert Ours(4, tls=True).complaint(link(4, "tcp+tls1.3")) is None
    assert Ours(transport="nixl").complaint(link(0, "ucx:shm")) is None
