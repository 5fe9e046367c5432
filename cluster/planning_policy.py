"""Which threshold and which roles should the fleet have now? PrfaaS's two loops (section 3.4.3), as one pure function.

    short loop   every call: the threshold. It is the best one for the current roles and the measured link (equation 7),
                 times a back-off that grows while the link's utilisation or the PrfaaS queue is high and shrinks when
                 both have been low for a while.
    long loop    every ``period_s``: the roles. One worker at a time, when the throughput that equations 3 to 6 predict
                 for one more prefill or one more decode worker has been better for long enough, and is worth the price.

The paper gives no time constants; those here are ``PlannerSettings``. What keeps the fleet calm: a threshold moves only
for a gain of ``min_threshold_gain``; between the low and the high mark the back-off stays; a conversion needs
``patience`` equal verdicts in a row, none within ``cooldown_s`` of the last and none while a worker still changes.

Invariants: pure (equal arguments, equal results; the caller keeps the memory); every target has a reason; a target
keeps at least one prefill and one decode worker, if there are two; on constant arguments it settles and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from cluster.length_distribution import Curve, LengthDistribution
from cluster.throughput_model import (
    OFFLOAD_NOTHING,
    Fleet,
    PrfaasCluster,
    best_threshold_tokens,
    operating_point,
    prefill_capacity_rps,
)
from core.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class MeasuredDemand:
    """What has been arriving. ``lengths``: prompt tokens that no cache held; None before the first request."""

    lengths: LengthDistribution | None
    rate_rps: float
    mean_output_tokens: float


@dataclass(frozen=True, slots=True)
class PlanningView:
    """The fleet as the planner sees it. Curves and steps are predictions of the cost model (cost_model.py)."""

    at_s: float  # on the planner's Clock
    num_prefill: int  # local workers by role; one that is changing counts as what it is becoming
    num_decode: int
    num_changing: int
    num_prfaas: int  # workers of all PrfaaS clusters
    prfaas_prefill_s: Curve
    local_prefill_s: Curve
    kv_bytes: Curve
    max_batch_size: float  # of a decode worker
    decode_step_s: float  # at that batch
    link_bytes_per_s: float  # what the links from PrfaaS clusters carry now; 0: cut
    link_utilisation: float  # share of it in use, 0 to 1
    prfaas_queue_s: float  # seconds of prefill that wait before a PrfaaS worker, on average
    local_queue_s: float  # likewise before a local prefill worker
    decode_queue: int  # sequences that wait for a place in a decode batch


@dataclass(frozen=True, slots=True)
class Roles:
    """How many local workers should prefill and decode."""

    num_prefill: int
    num_decode: int


@dataclass(frozen=True, slots=True)
class FleetTarget:
    """What the fleet should be, why, and the numbers behind it."""

    roles: Roles
    threshold_tokens: float  # uncached tokens beyond which a prompt goes to PrfaaS; inf: none goes
    reason: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PlannerMemory:
    """What the policy remembers from one call to the next; ``FRESH`` at the start."""

    base_tokens: float | None = None  # the threshold before back-off; None: none chosen yet
    back_off: int = 0  # steps taken away from it
    moved_at_s: float = -math.inf  # the last step of the back-off
    judged_at_s: float = -math.inf  # the last look at the roles
    verdict: int = 0  # +1 more prefill, -1 more decode, 0 as it is
    verdicts: int = 0  # equal ones in a row
    converted_at_s: float = -math.inf


FRESH = PlannerMemory()


class PlanningPolicy(Protocol):
    """Sets the threshold and the roles."""

    def plan(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[FleetTarget, PlannerMemory]:
        """The target, and what to remember for the next call. Pure: changes nothing, reads no clock."""
        ...


@dataclass(frozen=True)
class PlannerSettings:
    """Time constants and marks of the planner.

    high_utilisation: of the link; at or above it fewer prompts are sent over it.
    low_utilisation: at or below it more may be sent again.
    high_queue_s: PrfaaS queue, beyond the local one, at or above which fewer prompts are sent there.
    back_off_factor: by how much the threshold grows in one step.
    max_back_off: steps at most.
    raise_after_s: shortest time between two steps up.
    lower_after_s: shortest time before a step down.
    min_threshold_gain: relative gain in prefill capacity for which the threshold moves.
    period_s: time between two looks at the roles.
    min_role_gain: relative gain in throughput for which a worker changes its role.
    patience: equal verdicts in a row before a conversion while a queue grows; twice as many while none does.
    cooldown_s: shortest time between two conversions.
    conversion_s: time that a worker is lost for while it drains and changes: the price.
    horizon_s: time over which a conversion must pay for itself.
    """

    high_utilisation: float = 0.9
    low_utilisation: float = 0.6
    high_queue_s: float = 2.0
    back_off_factor: float = 1.25
    max_back_off: int = 12
    raise_after_s: float = 0.5
    lower_after_s: float = 5.0
    min_threshold_gain: float = 0.03
    period_s: float = 5.0
    min_role_gain: float = 0.1
    patience: int = 2
    cooldown_s: float = 30.0
    conversion_s: float = 10.0
    horizon_s: float = 300.0

    def __post_init__(self) -> None:
        _require(0 < self.low_utilisation < self.high_utilisation <= 1, "low_utilisation", "below high_utilisation")
        _require(self.back_off_factor > 1, "back_off_factor", "above 1")
        _require(self.max_back_off >= 0, "max_back_off", "at least 0")
        _require(self.patience >= 1, "patience", "at least 1")
        for name in ("min_threshold_gain", "min_role_gain", "high_queue_s", "period_s", "horizon_s"):
            _require(getattr(self, name) > 0, name, "above 0")
        for name in ("raise_after_s", "lower_after_s", "cooldown_s", "conversion_s"):
            _require(getattr(self, name) >= 0, name, "at least 0 s")


@dataclass(frozen=True)
class StaticPlan:
    """Keeps the roles and one threshold: the reference, and what an operator who knows better may configure."""

    threshold_tokens: float

    def plan(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[FleetTarget, PlannerMemory]:
        """The configured threshold, whatever happens."""
        roles = Roles(view.num_prefill, view.num_decode)
        return FleetTarget(roles, self.threshold_tokens, "configured: threshold and roles stay", {}), memory


@dataclass(frozen=True)
class DualTimescale:
    """The two loops."""

    settings: PlannerSettings = field(default_factory=PlannerSettings)

    def plan(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[FleetTarget, PlannerMemory]:
        """Roles first: the threshold is for the roles that are aimed at."""
        roles, why_roles, memory, role_numbers = self._roles(view, demand, memory)
        fleet = _fleet(view, demand, roles)
        threshold, why_threshold, memory = self._threshold(view, fleet, roles, memory)
        numbers = {
            "link_utilisation": view.link_utilisation,
            "prfaas_queue_s": view.prfaas_queue_s,
            "local_queue_s": view.local_queue_s,
            "decode_queue": float(view.decode_queue),
            "rate_rps": demand.rate_rps,
            "back_off": float(memory.back_off),
            **role_numbers,
        }
        return FleetTarget(roles, threshold, f"{why_threshold}; {why_roles}", numbers), memory

    # ---- short loop ----

    def _threshold(
        self, view: PlanningView, fleet: Fleet | None, roles: Roles, memory: PlannerMemory
    ) -> tuple[float, str, PlannerMemory]:
        if not view.num_prfaas:
            return OFFLOAD_NOTHING, "no PrfaaS worker: nothing is offloaded", replace(memory, back_off=0)
        if view.link_bytes_per_s <= 0:
            return OFFLOAD_NOTHING, "the link to the PrfaaS workers is down: nothing is offloaded", memory
        if fleet is None:
            return OFFLOAD_NOTHING, "no prompt has been measured: nothing is offloaded yet", memory
        base, why = self._base(fleet, roles, memory)
        memory, why_back_off = self._back_off(view, replace(memory, base_tokens=base))
        threshold = max(base, 1.0) * self.settings.back_off_factor**memory.back_off if memory.back_off else base
        return threshold, f"threshold {threshold:,.0f} tokens: {why}{why_back_off}", memory

    def _base(self, fleet: Fleet, roles: Roles, memory: PlannerMemory) -> tuple[float, str]:
        best = best_threshold_tokens(fleet, roles.num_prefill)
        if memory.base_tokens is None:
            return best, "balances both prefill stages"
        old, new = (
            float(rate) for rate in prefill_capacity_rps(fleet, roles.num_prefill, np.array([memory.base_tokens, best]))
        )
        if new > old * (1 + self.settings.min_threshold_gain):
            return best, f"moved from {memory.base_tokens:,.0f}, prefill capacity {old:.3g} to {new:.3g} req/s"
        return memory.base_tokens, f"kept, another would not give {self.settings.min_threshold_gain:.0%} more"

    def _back_off(self, view: PlanningView, memory: PlannerMemory) -> tuple[PlannerMemory, str]:
        """One step up or down, or none, and why."""
        chosen = self.settings
        queue_s = view.prfaas_queue_s - view.local_queue_s
        since_s = view.at_s - memory.moved_at_s
        busy = view.link_utilisation >= chosen.high_utilisation
        if busy or queue_s >= chosen.high_queue_s:
            cause = (
                f"link {view.link_utilisation:.0%} in use"
                if busy
                else f"PrfaaS queue {queue_s:.1f} s longer than the local one"
            )
            if memory.back_off < chosen.max_back_off and since_s >= chosen.raise_after_s:
                raised = replace(memory, back_off=memory.back_off + 1, moved_at_s=view.at_s)
                return raised, f", raised to step {raised.back_off}: {cause}"
            return memory, f", held at step {memory.back_off}: {cause}"
        if not memory.back_off:
            return memory, ""
        calm = view.link_utilisation <= chosen.low_utilisation and queue_s < chosen.high_queue_s / 2
        if calm and since_s >= chosen.lower_after_s:
            lowered = replace(memory, back_off=memory.back_off - 1, moved_at_s=view.at_s)
            return lowered, f", lowered to step {lowered.back_off}: link {view.link_utilisation:.0%} in use"
        return memory, f", held at step {memory.back_off}: link {view.link_utilisation:.0%} in use"

    # ---- long loop ----

    def _roles(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[Roles, str, PlannerMemory, dict[str, float]]:
        now = Roles(view.num_prefill, view.num_decode)
        chosen = self.settings
        if view.num_changing:
            return now, f"roles stay: {view.num_changing} worker(s) still change", memory, {}
        if view.at_s - memory.judged_at_s < chosen.period_s:
            return now, "roles stay: judged a moment ago", memory, {}
        memory = replace(memory, judged_at_s=view.at_s)
        verdict, why, numbers = self._verdict(view, demand, now)
        in_a_row = memory.verdicts + 1 if verdict == memory.verdict else 1
        memory = replace(memory, verdict=verdict, verdicts=in_a_row if verdict else 0)
        if not verdict:
            return now, f"roles stay: {why}", memory, numbers
        pressed = view.decode_queue > 0 or max(view.local_queue_s, view.prfaas_queue_s) >= chosen.high_queue_s
        needed = chosen.patience if pressed else 2 * chosen.patience
        if memory.verdicts < needed:
            return now, f"roles stay: {why}, seen {memory.verdicts} of {needed} times", memory, numbers
        if view.at_s - memory.converted_at_s < chosen.cooldown_s:
            return now, f"roles stay: {why}, but the last conversion is recent", memory, numbers
        roles = Roles(now.num_prefill + verdict, now.num_decode - verdict)
        change = (
            "one decode worker becomes a prefill worker"
            if verdict > 0
            else "one prefill worker becomes a decode worker"
        )
        memory = replace(memory, verdict=0, verdicts=0, converted_at_s=view.at_s)
        return roles, f"{change}: {why}", memory, numbers

    def _verdict(self, view: PlanningView, demand: MeasuredDemand, now: Roles) -> tuple[int, str, dict[str, float]]:
        """+1, -1 or 0, by what equations 3 to 6 say of one worker more on either side."""
        if _fleet(view, demand, now) is None:
            return 0, "no demand has been measured", {}
        rates = {step: self._throughput_rps(view, demand, now, step) for step in (0, 1, -1)}
        numbers = {
            "throughput_rps": rates[0],
            "throughput_more_prefill_rps": rates[1],
            "throughput_more_decode_rps": rates[-1],
        }
        best = max((1, -1), key=lambda step: rates[step])
        gain = rates[best] - rates[0]
        if gain <= self.settings.min_role_gain * rates[0]:
            return 0, f"one worker either way gives at most {gain:+.3g} req/s", numbers
        # Until it has changed, the worker does nothing: the side that it leaves already has its later rate.
        price = self.settings.conversion_s * rates[0] / (now.num_prefill + now.num_decode)
        if gain * self.settings.horizon_s <= price:
            return 0, f"{gain:+.3g} req/s over {self.settings.horizon_s:.0f} s do not pay the conversion", numbers
        return best, f"throughput {rates[0]:.3g} to {rates[best]:.3g} req/s", numbers

    @staticmethod
    def _throughput_rps(view: PlanningView, demand: MeasuredDemand, now: Roles, step: int) -> float:
        roles = Roles(now.num_prefill + step, now.num_decode - step)
        if min(roles.num_prefill, roles.num_decode) < 1:
            return 0.0  # no pool is left empty
        fleet = _fleet(view, demand, roles)
        assert fleet is not None, "there is a demand"
        return operating_point(fleet, roles.num_prefill).throughput_rps


def _fleet(view: PlanningView, demand: MeasuredDemand, roles: Roles) -> Fleet | None:
    """The view as the throughput model takes it; None without a demand or without two local workers."""
    if demand.lengths is None or demand.mean_output_tokens <= 0 or min(roles.num_prefill, roles.num_decode) < 0:
        return None
    if roles.num_prefill + roles.num_decode < 2:
        return None
    linked = view.num_prfaas > 0 and view.link_bytes_per_s > 0
    cluster = PrfaasCluster("prfaas", view.num_prfaas, view.prfaas_prefill_s, view.link_bytes_per_s)
    return Fleet(
        lengths=demand.lengths,
        mean_output_tokens=demand.mean_output_tokens,
        kv_bytes=view.kv_bytes,
        prfaas=(cluster,) if linked else (),
        num_local_gpus=roles.num_prefill + roles.num_decode,
        local_prefill_s=view.local_prefill_s,
        local_link_bytes_per_s=math.inf,
        max_batch_size=view.max_batch_size,
        decode_step_s=view.decode_step_s,
    )


def _require(ok: bool, key: str, allowed: str) -> None:
    if not ok:
        raise InvalidConfig(key, f"must be {allowed}")
