"""The links of all ranks are told together, and hand-overs that ended teach something of theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from cluster.config import WorkerConfig
from cluster.rank_processes import RankCounts, RankProcesses
from cluster.worker_links import WorkerLinks
from core.clock import VirtualClock
from core.request import ClusterId, Role, WorkerId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.link_monitor import TICK_S
from kv_transfer.transport import LinkStats, PeerIdentity, Transport

MB = 1_000_000
PEER = PeerIdentity(WorkerId("decode-0"), ClusterId("west"))
BUSY = LinkStats(PEER, "tcp", connections=4, rtt_s=0.01, min_rtt_s=0.009)


class Ranks:
    """This rank's transport, and what another rank has told."""

    def __init__(self, *codecs: str) -> None:
        self.own = self.other = BUSY
        kv_transfer = KvTransferConfig(links=(LinkConfig(codecs=("raw", *codecs)),))
        config = WorkerConfig(
            WorkerId("prefill-0"),
            ClusterId("east"),
            Role.PREFILL,
            "tiny",
            "",
            EngineConfig(),
            kv_transfer,
            "127.0.0.1",
            (),
            tensor_parallel=2,
        )
        self.clock = VirtualClock()
        self.links = WorkerLinks(config, cast(Transport, self), cast(RankProcesses, self), self.clock)

    def stats(self) -> tuple[LinkStats, ...]:
        return (self.own,)

    @property
    def counts(self) -> tuple[RankCounts, ...]:
        return (RankCounts((self.other,)),)

    def carry(self, rate: float, num_ticks: int = 40) -> None:
        """Both ranks send at that rate."""
        for _ in range(num_ticks):
            self.links.tick()
            self.clock.advance(TICK_S)
            self.own, self.other = (
                replace(link, bytes_sent=link.bytes_sent + int(rate * TICK_S), busy_s=link.busy_s + TICK_S)
                for link in (self.own, self.other)
            )
        self.links.tick()


def test_links_of_all_ranks_to_a_peer_are_one() -> None:
    ranks = Ranks()

    ranks.carry(100 * MB)

    (estimate,) = ranks.links.estimates()
    assert estimate.bytes_sent == ranks.own.bytes_sent + ranks.other.bytes_sent
    assert ranks.links.speed(PEER) == pytest.approx(200 * MB, rel=0.01)
    assert ranks.links.stats() == (ranks.own, ranks.other)


def test_nothing_is_known_of_a_peer_that_nothing_was_sent_to() -> None:
    assert Ranks().links.speed(PEER) is None


@pytest.mark.parametrize("codecs", [(), ("lossless",)])
def test_a_sender_asks_for_codecs_only_where_one_may_be_used(codecs: tuple[Any, ...]) -> None:
    assert (Ranks(*codecs).links.codec_for is not None) == bool(codecs)


def test_an_estimate_names_the_codec_of_its_link() -> None:
    ranks = Ranks("lossless")

    ranks.carry(100 * MB)

    (estimate,) = ranks.links.estimates()
    assert (estimate.codec, estimate.codec_changes) == ("raw", 0)
