"""Where may the K/V of a known prefix lie, and how does a request get it back from there? The nouns.

    device   pages of the engine's pool: used as they are
    host     pinned memory beside it: loaded into pages of the pool before the prompt is computed
    disk     files of a folder: read into host memory first

A worker tells gateways of each page by the best tier that it has it in, and what loading from there costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """The members are in order: what is in an earlier one is got sooner."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


LOWER_TIERS = (Tier.HOST, Tier.DISK)


class ReloadOutcome(StrEnum):
    """What became of a prefix that goes on in a lower tier, when its request's turn came."""

    LOADED = "loaded"  # all of it that was wanted
    PARTLY = "partly"  # a page of it was damaged, or gone when it was read; from there on it was computed
    SHARED = "shared"  # another request was loading it already; this one waited for that
    COMPUTED = "computed"  # computing was predicted to be no slower
    NO_ROOM = "no_room"  # no pages or no host memory for it at that moment: computed
    FAILED = "failed"  # the copy failed: computed


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """One request's reload, before it was prefilled. The tokens are those that it did not have to compute."""

    outcome: ReloadOutcome
    host_tokens: int = 0
    disk_tokens: int = 0
    seconds: float = 0.0  # that it waited for
    reason: str = ""  # what was predicted

    @property
    def num_tokens(self) -> int:
        """Of all tiers."""
        return self.host_tokens + self.disk_tokens


def joined_reloads(reports: Sequence[ReloadReport]) -> ReloadReport | None:
    """What became of all prefixes of one request (it may run on two workers, or again): the last outcome; None: none
    went on below."""
    if not reports:
        return None
    return ReloadReport(
        reports[-1].outcome,
        sum(report.host_tokens for report in reports),
        sum(report.disk_tokens for report in reports),
        sum(report.seconds for report in reports),
        reports[-1].reason,
    )


@dataclass(frozen=True, slots=True)
class TierState:
    """One lower tier of one engine. Counters run from the engine's start.

    Loading ``n`` bytes from there takes ``load_t0_s + n / load_bytes_per_s`` once those before are done; from the disk
    that is into host memory, and the host's seconds come on top.
    """

    tier: Tier
    pages_total: int
    pages_used: int = 0
    load_bytes_per_s: float = 0.0  # 0: not known
    load_t0_s: float = 0.0
    queued_bytes: int = 0  # to be loaded
    stored_pages: int = 0  # that came in
    loaded_tokens: int = 0  # that went up again
    evicted_pages: int = 0  # for want of room here
    damaged_pages: int = 0  # files that did not hold what they should; not used, deleted
    foreign_pages: int = 0  # files of another model or format; not used, deleted

    def load_s(self, num_bytes: float) -> float:
        """Seconds to load so many bytes when nothing else is being loaded; infinite if the speed is not known."""
        if num_bytes <= 0:
            return 0.0
        return self.load_t0_s + num_bytes / self.load_bytes_per_s if self.load_bytes_per_s > 0 else float("inf")
