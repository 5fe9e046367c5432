"""What a link's numbers promise of the next bytes."""

from __future__ import annotations

import pytest

from core.link import DELIVERY_MARGIN, LinkEstimate, ProbeReport
from core.request import ClusterId, WorkerId


def estimate(**numbers: object) -> LinkEstimate:
    return LinkEstimate(WorkerId("decode-0"), ClusterId("west"), **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "rate"),
    [
        ({}, None),
        ({"delivery_rate": 5.0}, 5.0),
        ({"delivery_rate": 5.0, "fit_beta": 7.0}, 7.0),
        ({"goodput": 9.0, "fit_beta": 7.0}, 9.0),
        ({"goodput": 9.0, "delivery_rate": 8.0, "fit_beta": 7.0}, 9.0),
        ({"goodput": 900.0, "delivery_rate": 8.0}, 8.0 * DELIVERY_MARGIN),
    ],
    ids=["nothing", "kernel", "fit", "goodput", "goodput agrees with the kernel", "a burst into buffers"],
)
def test_rate_of_a_link_is_its_fastest_evidence(known: dict[str, float], rate: float | None) -> None:
    assert estimate(**known).rate == rate


def test_seconds_count_what_is_queued() -> None:
    assert estimate(goodput=100.0, bytes_queued=300, fit_t0_s=0.5).seconds(200) == pytest.approx(5.5)
    assert estimate(rtt_s=0.1, goodput=100.0).seconds(100) == pytest.approx(1.1)
    assert estimate(bytes_queued=300).seconds(200) is None


def test_a_probe_passes_only_if_its_bytes_were_exact() -> None:
    assert ProbeReport("tcp", 8, exact=True, timed_bytes=8, seconds=2.0).rate == 4.0
    assert ProbeReport("tcp", 8, exact=True).passed
    assert not ProbeReport("tcp", 8, exact=False).passed
    assert not ProbeReport("tcp", error="PeerLost", reason="gone").passed
    assert ProbeReport("tcp", error="PeerLost", reason="gone").rate is None
