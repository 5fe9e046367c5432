"""Is a prefix that lies in lower tiers to be loaded, how much of it, or is it computed again? Pure; predicted seconds.

    |-- on the device --|---- run of pages in host memory ----|-- run on disk --|-- known nowhere --|
    0               num_known                              (each end is a candidate)            num_tokens

For each candidate end: the seconds until all pages up to there are loaded, behind what is being loaded already, and
those to compute what follows. The least wins; of equal ones the one that computes less. Loading copies, it does not
compute, so a request that loads leaves the device to others meanwhile.

Speeds are measured: a tier's by the loads that it did (and one of its own at the start), the model's by its steps. The
shapes are the gateways' (cluster/cost_model.py), and so is the fit (cost_fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from core.cache_tiers import Tier


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """What loading from one tier takes: ``t0_s + bytes / bytes_per_s``."""

    t0_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of so many bytes; 0 of none."""
        return self.t0_s + num_bytes / self.bytes_per_s if num_bytes > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """What computing a prompt takes: ``step_s`` for each step, ``token_s`` for a token, ``pair_s`` for two tokens that
    attend."""

    step_s: float
    token_s: float
    pair_s: float
    step_tokens: int

    def seconds(self, uncached: int, cached: int) -> float:
        """To compute ``uncached`` tokens behind ``cached`` ones."""
        if uncached <= 0:
            return 0.0
        pairs = uncached * (cached + uncached / 2)
        return self.step_s * math.ceil(uncached / self.step_tokens) + self.token_s * uncached + self.pair_s * pairs


@dataclass(frozen=True, slots=True)
class ReloadView:
    """One prompt of ``num_tokens``, the first ``num_known`` of which are on the device; ``tiers`` of the whole pages
    that follow them, as far as each is in one. ``queued_bytes``: that are to be loaded from a tier before."""

    num_tokens: int
    num_known: int
    tiers: Sequence[Tier]
    page_size: int
    page_bytes: int
    speeds: Mapping[Tier, TierSpeed]
    prefill: PrefillCost
    queued_bytes: Mapping[Tier, int]


@dataclass(frozen=True, slots=True)
class ReloadChoice:
    """Load the first ``num_pages`` of those that were offered; 0: compute all. What that is expected to take."""

    num_pages: int
    load_s: float
    compute_s: float  # what is left to compute after it
    recompute_s: float  # without any load

    @property
    def reason(self) -> str:
        """For the log and the client."""
        kept = f"{self.load_s:.4f} s to load and {self.compute_s:.4f} s to compute the rest"
        against = f"{self.recompute_s:.4f} s to compute all that the device lacks"
        if self.num_pages:
            return f"{kept}, against {against}"
        return f"{against}, which no load would shorten"


def choose_reload(view: ReloadView) -> ReloadChoice:
    """The candidate with the least seconds to the end of the prompt."""
    recompute_s = view.prefill.seconds(view.num_tokens - view.num_known, view.num_known)
    best = ReloadChoice(0, 0.0, recompute_s, recompute_s)
    num_pages = 0
    loaded_bytes = dict(view.queued_bytes)
    for tier, run in groupby(view.tiers):
        length = len(list(run))
        num_pages += length
        # What comes from the disk goes through host memory.
        for passed in (Tier.HOST,) if tier is Tier.HOST else (Tier.DISK, Tier.HOST):
            loaded_bytes[passed] = loaded_bytes.get(passed, 0) + length * view.page_bytes
        load_s = sum(view.speeds[passed].seconds(num_bytes) for passed, num_bytes in loaded_bytes.items())
        known = view.num_known + num_pages * view.page_size
        compute_s = view.prefill.seconds(view.num_tokens - known, known)
        if load_s + compute_s <= best.load_s + best.compute_s:
            best = ReloadChoice(num_pages, load_s, compute_s, recompute_s)
    return best
