from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.shaped_link import Flow, SharedLink
from cluster.simulator.virtual_loop import run, running_loop


def play(rate: float, script: Callable[[SharedLink, Callable[[str], Callable[[], None]]], None]) -> dict[str, float]:
    """When each named flow was sent, in virtual seconds; ``script`` opens flows, with callbacks by name."""

    async def main() -> dict[str, float]:
        loop = running_loop()
        sent: dict[str, float] = {}

        def named(name: str) -> Callable[[], None]:
            return lambda: sent.__setitem__(name, loop.now())

        script(SharedLink(loop, rate), named)
        await asyncio.sleep(1000.0)
        return sent

    return run(main())


def whole(flow: Flow, num_bytes: float) -> None:
    flow.add(num_bytes)
    flow.finish()


def test_flows_share_equally_and_the_shorter_one_leaves_its_part() -> None:
    """100 and 300 bytes at 100 bytes/s: both get 50 until 2.0, then 200 are left at 100 bytes/s."""

    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        whole(link.open(named("short")), 100)
        whole(link.open(named("long")), 300)

    assert play(100.0, script) == {"short": pytest.approx(2.0), "long": pytest.approx(4.0)}


def test_what_a_slow_source_does_not_need_is_others() -> None:
    """A source of 20 bytes/s for 5 s leaves 80 of 100 bytes/s to the other flow: 400 bytes take 5 s."""

    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        slow = link.open(named("slow"))
        slow.start_source(20.0)
        whole(link.open(named("other")), 400)

        def end() -> None:
            slow.stop_source(100.0)
            slow.finish()

        running_loop().call_later(5.0, end)

    assert play(100.0, script) == {"slow": pytest.approx(5.0), "other": pytest.approx(5.0)}


def test_no_flow_gets_more_than_its_worker_sends() -> None:
    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        whole(link.open(named("bound"), most_per_s=10.0), 100)
        whole(link.open(named("free")), 90)

    assert play(100.0, script) == {"free": pytest.approx(1.0), "bound": pytest.approx(10.0)}


def test_a_cut_link_keeps_its_bytes_until_it_is_mended() -> None:
    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        whole(link.open(named("flow")), 100)
        running_loop().call_later(0.5, link.set_rate, 0.0)
        running_loop().call_later(10.0, link.set_rate, 50.0)

    assert play(100.0, script) == {"flow": pytest.approx(11.0)}


def test_a_cancelled_flow_is_never_sent_and_frees_its_share() -> None:
    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        gone = link.open(named("gone"))
        whole(gone, 1000)
        whole(link.open(named("other")), 100)
        running_loop().call_later(1.0, gone.cancel)

    assert play(100.0, script) == {"other": pytest.approx(1.5)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(1, 500)), min_size=1, max_size=8))
def test_a_busy_link_sends_every_byte_at_its_rate(flows: list[tuple[float, float]]) -> None:
    """Whatever comes when: the last byte leaves as if one queue had been served, and no flow before it could."""

    def script(link: SharedLink, named: Callable[[str], Callable[[], None]]) -> None:
        for index, (at, num_bytes) in enumerate(flows):
            running_loop().call_later(at, lambda i=index, n=num_bytes: whole(link.open(named(str(i))), n))

    sent = play(100.0, script)

    busy_until = 0.0
    for at, num_bytes in sorted(flows):
        busy_until = max(busy_until, at) + num_bytes / 100.0
    assert len(sent) == len(flows)
    assert max(sent.values()) == pytest.approx(busy_until, abs=0.02)  # half a byte is none
    for index, (at, num_bytes) in enumerate(flows):
        assert sent[str(index)] >= at + (num_bytes - 0.5) / 100.0 - 1e-9
