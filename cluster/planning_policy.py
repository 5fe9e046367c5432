"""Which threshold and which roles should the fleet have now? PrfaaS's two loops (section 3.4.3), as one pure function.

    short loop   every call: the threshold. It is the one that serves most of what comes within ``balance_s``, for the
                 current roles, the measured link and the queues as they are; of several that serve all the one that
                 fills the stages evenly (equation 7). With it the bandwidth mode, scarce or abundant.
    long loop    every ``period_s``: the roles. One worker at a time, when the throughput that equations 3 to 6 predict
                 for one more prefill or one more decode worker has been better for long enough, and is worth the price.
                 With it the advice whether to disaggregate at all.

The paper gives no time constants and no marks; those here are ``PlannerSettings``. What keeps the fleet calm: a
threshold moves only for a gain of ``min_threshold_gain``; between the marks the mode stays; a conversion needs a gain
beyond what the measured demand may be wrong by, ``patience`` equal verdicts in a row, none within ``cooldown_s`` of the
last and none while a worker still changes.

Invariants: pure (equal arguments, equal results; the caller keeps the memory); every target has a reason; a target
keeps at least one prefill and one decode worker, if there are two; on constant arguments it settles and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from cluster.colocation import Gain, disaggregation_gain
from cluster.length_distribution import Curve, LengthDistribution
from cluster.throughput_model import (
    OFFLOAD_NOTHING,
    Backlog,
    Fleet,
    Horizon,
    OperatingPoint,
    Polynomial,
    PrfaasCluster,
    operating_point,
    outcome,
    sooner_beyond_tokens,
    threshold_for,
)
from core.errors import InvalidConfig
from core.request import Role

THRESHOLD, MODE, ROLES, ADVICE = "threshold", "mode", "roles", "advice"  # what a target says, and may change
DISAGGREGATE, COLOCATE = "disaggregate", "colocate"


@dataclass(frozen=True, slots=True)
class MeasuredDemand:
    """What has been arriving. ``lengths``: prompt tokens that no cache held; None before the first request."""

    lengths: LengthDistribution | None
    rate_rps: float
    mean_output_tokens: float  # of a request, all its continuations together
    mean_cached_tokens: float = 0.0  # of a prompt, beside those of ``lengths``
    num_requests: float = math.inf  # that all this was measured on; inf: it is known
    relative_error: float = 0.0  # what chance may make of the two means, prompt and answer; 0: they are known


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
    link_queue_s: float = 0.0  # until what is queued on the links has left
    num_queued: int = 0  # requests that wait in the gateway for room on the workers
    decode_step_of: Curve | None = None  # seconds by batch size; None: as for the largest batch
    tpot_s: float | None = None  # the objective that ``max_batch_size`` keeps to; None: there is none
    unknown: str = ""  # why the curves mean nothing yet; empty: they do
    num_draining: int = 0  # of ``num_prefill``: that still decode what they had, and are sent no prompts for so long


@dataclass(frozen=True, slots=True)
class Roles:
    """How many local workers should prefill and decode."""

    num_prefill: int
    num_decode: int


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """How many workers each pool should have, whatever they do; a pool whose size is fixed is not named."""

    sizes: Mapping[Role, int]
    reason: str = ""
    give_back: Role | None = None  # of which role a worker goes, if a pool is to lose one; None: whichever


@dataclass(frozen=True, slots=True)
class FleetTarget:
    """What the fleet should be, why, and the numbers behind it."""

    roles: Roles
    threshold_tokens: float  # uncached tokens beyond which a prompt goes to PrfaaS; inf: none goes
    reason: str
    numbers: Mapping[str, float]
    abundant: bool = False  # bandwidth mode: caches of other clusters may be fetched
    advice: str = ""  # ``disaggregate``, ``colocate``, or empty: nothing is known of it
    gain: Gain | None = None  # what the advice rests on
    causes: Mapping[str, str] = field(default_factory=dict)  # threshold, mode, roles, advice, pools |-> a word for why
    pools: PoolSizes | None = None  # None: all sizes are fixed; set by scaling_policy.py


@dataclass(frozen=True, slots=True)
class PlannerMemory:
    """What the policy remembers from one call to the next; ``FRESH`` at the start."""

    threshold_tokens: float | None = None  # the last one chosen; None: none yet
    looked_at_s: float = -math.inf  # the last call
    usual_bytes_per_s: float = 0.0  # that the links have carried, fading; roles are for that
    judged_at_s: float = -math.inf  # the last look at the roles
    verdict: int = 0  # +1 more prefill, -1 more decode, 0 as it is
    verdicts: int = 0  # equal ones in a row
    converted_at_s: float = -math.inf
    said: str = ""  # of the last look
    judged: Mapping[str, float] = field(default_factory=dict)  # its numbers
    gain: Gain | None = None
    advice: str = ""
    advised: str = ""  # what the last looks would have advised
    advised_times: int = 0  # in a row
    abundant: bool = False
    calm_since_s: float | None = None  # since when bandwidth has been plentiful; None: it is not


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
    """Time constants and marks of the planner's two loops.

    balance_s: time ahead for which the threshold balances both prefill stages and the link, their queues as they are;
        shorter: queues move it more.
    most_full: share of that time up to which a stage counts as able to take what comes; beyond it more prompts are
        sent where they are served than where all would wait alike.
    high_queue_s: queue of a stage that is long; of the link, what exceeds one hand-over.
    min_threshold_gain: relative gain, in prompts served or in how full the fullest stage is, for which the threshold
        moves.
    scarce_utilisation: of the link, in use or predicted for the measured demand; from it on bandwidth is scarce.
    abundant_utilisation: of the link, in use and predicted; up to it bandwidth is abundant again.
    abundant_after_s: how long it must have been so.
    period_s: time between two looks at the roles.
    link_memory_s: what the links carried so long ago counts e times less than what they carry now, for the roles: a
        link that is narrow for a minute converts nobody.
    min_role_gain: relative gain in throughput for which a worker changes its role; what chance may have made of the
        measured demand is added.
    min_requests: measured requests without which no worker changes its role.
    patience: equal verdicts in a row before a conversion while a queue grows; twice as many while none does.
    cooldown_s: shortest time between two conversions.
    conversion_s: time that a worker is lost for while it drains and changes: the price.
    horizon_s: time over which a conversion must pay for itself.
    min_prefill: local prefill workers that are left at least.
    min_decode: decode workers that are left at least.
    max_prefill: local prefill workers at most; null: no limit.
    max_decode: decode workers at most; null: no limit.
    """

    balance_s: float = 20.0
    most_full: float = 0.95
    high_queue_s: float = 1.0
    min_threshold_gain: float = 0.03
    scarce_utilisation: float = 0.6
    abundant_utilisation: float = 0.3
    abundant_after_s: float = 5.0
    period_s: float = 5.0
    link_memory_s: float = 120.0
    min_role_gain: float = 0.1
    min_requests: int = 16
    patience: int = 2
    cooldown_s: float = 30.0
    conversion_s: float = 10.0
    horizon_s: float = 300.0
    min_prefill: int = 1
    min_decode: int = 1
    max_prefill: int | None = None
    max_decode: int | None = None

    def __post_init__(self) -> None:
        _require(
            0 < self.abundant_utilisation < self.scarce_utilisation <= 1,
            "abundant_utilisation",
            "below scarce_utilisation",
        )
        _require(0 < self.most_full <= 1, "most_full", "above 0 and at most 1")
        _require(self.patience >= 1, "patience", "at least 1")
        _require(self.min_requests >= 0, "min_requests", "at least 0")
        for name in (
            "min_threshold_gain",
            "min_role_gain",
            "high_queue_s",
            "balance_s",
            "period_s",
            "link_memory_s",
            "horizon_s",
        ):
            _require(getattr(self, name) > 0, name, "above 0")
        for name in ("abundant_after_s", "cooldown_s", "conversion_s"):
            _require(getattr(self, name) >= 0, name, "at least 0 s")
        for role in ("prefill", "decode"):
            least, most = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            _require(least >= 1, f"min_{role}", "at least 1: no pool is left empty")
            _require(most is None or most >= least, f"max_{role}", f"null or at least min_{role}")

    def allows(self, roles: Roles) -> bool:
        """Are the roles within the least and the most of each?"""
        prefill, decode = roles.num_prefill, roles.num_decode
        enough = prefill >= self.min_prefill and decode >= self.min_decode
        return enough and prefill <= (self.max_prefill or math.inf) and decode <= (self.max_decode or math.inf)


@dataclass(frozen=True)
class StaticPlan:
    """Keeps the roles and one threshold: the reference, and what an operator who knows better may configure."""

    threshold_tokens: float

    def plan(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[FleetTarget, PlannerMemory]:
        """The configured threshold, whatever happens."""
        roles = Roles(view.num_prefill, view.num_decode)
        numbers = _numbers(view, demand)
        reason = "configured: threshold and roles stay"
        causes = dict.fromkeys((THRESHOLD, MODE, ROLES, ADVICE), "configured")
        return FleetTarget(roles, self.threshold_tokens, reason, numbers, causes=causes), memory


@dataclass(frozen=True, slots=True)
class _Why:
    """A reason, as the one word that is counted and as the words that are read."""

    word: str
    text: str


@dataclass(frozen=True)
class DualTimescale:
    """The two loops."""

    settings: PlannerSettings = field(default_factory=PlannerSettings)

    def plan(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[FleetTarget, PlannerMemory]:
        """Roles first: the threshold is for the roles that are aimed at."""
        memory = self._remember_link(view, memory)
        roles, why_roles, memory = self._roles(view, demand, memory)
        fleet = _fleet(view, demand, roles)
        threshold, why_threshold, memory = self._threshold(view, demand, fleet, roles, memory)
        point = None if fleet is None else operating_point(fleet, roles.num_prefill, threshold)
        why_mode, predicted, memory = self._mode(view, demand, fleet, point, memory)
        numbers = {
            **_numbers(view, demand),
            **_point_numbers(point),
            "predicted_utilisation": predicted,
            **memory.judged,
        }
        target = FleetTarget(
            roles=roles,
            threshold_tokens=threshold,
            reason=f"{why_threshold.text}; {why_mode.text}; {why_roles.text}",
            numbers=numbers,
            abundant=memory.abundant,
            advice=memory.advice,
            gain=memory.gain,
            causes={
                THRESHOLD: why_threshold.word,
                MODE: why_mode.word,
                ROLES: why_roles.word,
                ADVICE: "predicted_throughput" if memory.gain is not None else "nothing_known",
            },
        )
        return target, memory

    def _remember_link(self, view: PlanningView, memory: PlannerMemory) -> PlannerMemory:
        kept = math.exp(min(0.0, memory.looked_at_s - view.at_s) / self.settings.link_memory_s)  # 0 at first
        usual = view.link_bytes_per_s + kept * (memory.usual_bytes_per_s - view.link_bytes_per_s)
        return replace(memory, looked_at_s=view.at_s, usual_bytes_per_s=usual)

    # ---- short loop: the threshold ----

    def _threshold(
        self, view: PlanningView, demand: MeasuredDemand, fleet: Fleet | None, roles: Roles, memory: PlannerMemory
    ) -> tuple[float, _Why, PlannerMemory]:
        if not view.num_prfaas:
            why = _Why("no_prfaas", "no PrfaaS worker: nothing is offloaded")
            return OFFLOAD_NOTHING, why, replace(memory, threshold_tokens=None)
        if view.link_bytes_per_s <= 0:
            why = _Why("link_down", "the link to the PrfaaS workers is down: nothing is offloaded")
            return OFFLOAD_NOTHING, why, memory
        if view.unknown:
            return OFFLOAD_NOTHING, _Why("no_costs", f"{view.unknown}: nothing is offloaded"), memory
        if fleet is None:
            threshold = sooner_beyond_tokens(_prfaas_cluster(view), view.local_prefill_s, view.kv_bytes)
            if threshold == OFFLOAD_NOTHING:
                said = "threshold none: no prompt has been measured, and none is sooner there while all is idle"
            else:
                sooner = "no prompt has been measured, longer ones are sooner there while all is idle"
                said = f"threshold {threshold:,.0f} tokens: {sooner}"
            return threshold, _Why("no_demand", said), memory
        last = memory.threshold_tokens
        horizon = self._horizon(view, demand, fleet, last)
        # A worker that has just been told to prefill does so when it has drained.
        num_prefill = min(roles.num_prefill, max(1, view.num_prefill - view.num_draining))
        best = threshold_for(fleet, num_prefill, horizon)
        if last is None:
            why = _Why("balanced", f"threshold {best:,.0f} tokens: balances both prefill stages")
            return best, why, replace(memory, threshold_tokens=best)
        found = outcome(fleet, num_prefill, np.array([last, best]), horizon)
        (served_last, served_best), (full_last, full_best) = found.served, found.fullness
        enough = 1 + self.settings.min_threshold_gain
        if served_best <= served_last * enough and full_best * enough >= full_last:
            least = self.settings.min_threshold_gain
            said = f"threshold {last:,.0f} tokens: kept, another would not be {least:.0%} better"
            return last, _Why("balanced", said), memory
        cause = self._cause(horizon.backlog)
        said = f"threshold {best:,.0f} tokens: moved from {last:,.0f}, {cause.text}"
        return best, _Why(cause.word, said), replace(memory, threshold_tokens=best)

    def _horizon(self, view: PlanningView, demand: MeasuredDemand, fleet: Fleet, threshold: float | None) -> Horizon:
        link_s = 0.0 if threshold is None else max(0.0, _link_wait_s(view, fleet, threshold))
        backlog = Backlog(view.prfaas_queue_s, link_s, view.local_queue_s)
        return Horizon(demand.rate_rps, self.settings.balance_s, backlog, self.settings.most_full)

    def _cause(self, backlog: Backlog) -> _Why:
        """What moves the threshold: a queue that is longer than those of the other side, or none, and then what the
        stages can do, for other demand, links, costs or roles than before."""
        mark = self.settings.high_queue_s
        prfaas_s, link_s, local_s = backlog.prfaas_s, backlog.link_s, backlog.local_s
        if link_s >= max(prfaas_s, local_s) + mark:
            return _Why("link_queue", f"{link_s:.1f} s more than one hand-over are queued on the link")
        if prfaas_s >= local_s + mark:
            return _Why("prfaas_queue", f"the PrfaaS queue is {prfaas_s - local_s:.1f} s longer than the local one")
        if local_s >= max(prfaas_s, link_s) + mark:
            return _Why("local_queue", f"the local queue is {local_s - prfaas_s:.1f} s longer than the PrfaaS one")
        return _Why("capacity", "which balances the stages as they are now")

    # ---- short loop: the bandwidth mode ----

    def _mode(
        self,
        view: PlanningView,
        demand: MeasuredDemand,
        fleet: Fleet | None,
        point: OperatingPoint | None,
        memory: PlannerMemory,
    ) -> tuple[_Why, float, PlannerMemory]:
        """Scarce or abundant, and the share of the link that the measured demand would take at this threshold.

        The larger of the measured and the predicted share counts: a surge is predicted before it is on the link, and
        what else is on the link is measured only. Scarce at once; abundant after a while well below.
        """
        if fleet is None or point is None or not fleet.prfaas:
            return (
                _Why("no_link", "bandwidth is not counted on"),
                0.0,
                replace(memory, abundant=False, calm_since_s=None),
            )
        chosen = self.settings
        kv_bytes = 0.0 if point.l_long_tokens is None else float(fleet.kv_bytes(np.asarray(point.l_long_tokens)))
        predicted = demand.rate_rps * point.offload_fraction * kv_bytes / view.link_bytes_per_s
        share = max(view.link_utilisation, predicted)
        word = "link_busy" if share > predicted else "predicted_egress"
        said = f"link {view.link_utilisation:.0%} in use, {predicted:.0%} predicted"
        wait_s = _link_wait_s(view, fleet, point.threshold_tokens)
        if share >= chosen.scarce_utilisation or wait_s >= chosen.high_queue_s:
            word = word if share >= chosen.scarce_utilisation else "link_queue"
            memory = replace(memory, abundant=False, calm_since_s=None)
            return _Why(word, f"bandwidth is scarce: {said}"), predicted, memory
        if share > chosen.abundant_utilisation:
            memory = replace(memory, calm_since_s=None)
            name = "abundant" if memory.abundant else "scarce"
            return _Why("between_marks", f"bandwidth stays {name}: {said}"), predicted, memory
        since_s = view.at_s if memory.calm_since_s is None else memory.calm_since_s
        abundant = memory.abundant or view.at_s - since_s >= chosen.abundant_after_s
        memory = replace(memory, abundant=abundant, calm_since_s=since_s)
        name = "is abundant" if abundant else "stays scarce for a while"
        return _Why("link_idle", f"bandwidth {name}: {said}"), predicted, memory

    # ---- long loop ----

    def _roles(
        self, view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory
    ) -> tuple[Roles, _Why, PlannerMemory]:
        now = Roles(view.num_prefill, view.num_decode)
        chosen = self.settings
        if view.num_changing:
            return now, _Why("changing", f"roles stay: {view.num_changing} worker(s) still change"), memory
        if view.at_s - memory.judged_at_s < chosen.period_s:
            return now, _Why("judged", memory.said or "roles stay: judged a moment ago"), memory
        memory = replace(memory, judged_at_s=view.at_s)
        usual = replace(view, link_bytes_per_s=memory.usual_bytes_per_s)
        verdict, why, memory = self._verdict(usual, demand, now, memory)
        in_a_row = memory.verdicts + 1 if verdict == memory.verdict else 1
        memory = replace(memory, verdict=verdict, verdicts=in_a_row if verdict else 0)
        if not verdict:
            return self._stay(now, why, memory)
        queue_s = max(view.local_queue_s, view.prfaas_queue_s)
        pressed = view.num_queued > 0 or view.decode_queue > 0 or queue_s >= chosen.high_queue_s
        needed = chosen.patience if pressed else 2 * chosen.patience
        if memory.verdicts < needed:
            return self._stay(now, _Why("patience", f"{why.text}, seen {memory.verdicts} of {needed} times"), memory)
        if view.at_s - memory.converted_at_s < chosen.cooldown_s:
            return self._stay(now, _Why("cooldown", f"{why.text}, but the last conversion is recent"), memory)
        roles = Roles(now.num_prefill + verdict, now.num_decode - verdict)
        change = (
            "one decode worker becomes a prefill worker"
            if verdict > 0
            else "one prefill worker becomes a decode worker"
        )
        said = f"{change}: {why.text}"
        memory = replace(memory, verdict=0, verdicts=0, converted_at_s=view.at_s, said=said)
        return roles, _Why("more_prefill" if verdict > 0 else "more_decode", said), memory

    @staticmethod
    def _stay(now: Roles, why: _Why, memory: PlannerMemory) -> tuple[Roles, _Why, PlannerMemory]:
        said = f"roles stay: {why.text}"
        return now, _Why(why.word, said), replace(memory, said=said)

    def _verdict(
        self, view: PlanningView, demand: MeasuredDemand, now: Roles, memory: PlannerMemory
    ) -> tuple[int, _Why, PlannerMemory]:
        """+1, -1 or 0, by what equations 3 to 6 say of one worker more on either side; and the gain of it all."""
        if view.unknown:
            return 0, _Why("no_costs", view.unknown), replace(memory, judged={}, gain=None, advice="", advised_times=0)
        fleet = _fleet(view, demand, now)
        if fleet is None or demand.mean_output_tokens <= 0:
            return (
                0,
                _Why("no_demand", "no demand has been measured"),
                replace(memory, judged={}, gain=None, advice="", advised_times=0),
            )
        if min(now.num_prefill, now.num_decode) < 1:
            # Whoever runs the service left it empty, or its workers will be back: a planner does not guess which.
            return (
                0,
                _Why("empty_pool", "a pool is empty"),
                replace(memory, judged={}, gain=None, advice="", advised_times=0),
            )
        rates = {step: self._throughput_rps(view, demand, now, step) for step in (0, 1, -1)}
        memory = replace(
            memory,
            judged={
                "judged_throughput_rps": rates[0],
                "throughput_more_prefill_rps": rates[1],
                "throughput_more_decode_rps": rates[-1],
            },
        )
        if demand.num_requests < self.settings.min_requests:
            return 0, _Why("few_requests", f"only {demand.num_requests:.0f} requests have been measured"), memory
        memory = self._advise(view, demand, fleet, now, memory)
        best = max((1, -1), key=lambda step: rates[step])
        gain = rates[best] - rates[0]
        needed = self.settings.min_role_gain + demand.relative_error
        if gain <= needed * rates[0]:
            text = f"one worker either way gives at most {gain:+.3g} req/s, {needed:.0%} of {rates[0]:.3g} are needed"
            return 0, _Why("balanced", text), memory
        # Until it has changed, the worker does nothing: the side that it leaves already has its later rate.
        price = self.settings.conversion_s * rates[0] / (now.num_prefill + now.num_decode)
        if gain * self.settings.horizon_s <= price:
            text = f"{gain:+.3g} req/s over {self.settings.horizon_s:.0f} s do not pay the conversion"
            return 0, _Why("price", text), memory
        word = "more_prefill" if best > 0 else "more_decode"
        return best, _Why(word, f"throughput {rates[0]:.3g} to {rates[best]:.3g} req/s"), memory

    def _throughput_rps(self, view: PlanningView, demand: MeasuredDemand, now: Roles, step: int) -> float:
        roles = Roles(now.num_prefill + step, now.num_decode - step)
        if min(roles.num_prefill, roles.num_decode) < 1 or (step and not self.settings.allows(roles)):
            return 0.0  # no pool is left empty
        fleet = _fleet(view, demand, roles)
        assert fleet is not None, "there is a demand"
        return operating_point(fleet, roles.num_prefill).throughput_rps

    def _advise(
        self, view: PlanningView, demand: MeasuredDemand, fleet: Fleet, now: Roles, memory: PlannerMemory
    ) -> PlannerMemory:
        """Colocation is advised once it would sustain ``min_role_gain`` more, until it would not sustain more; either
        after as many equal looks as a conversion takes while nothing queues."""
        point = operating_point(fleet, now.num_prefill)
        step_of = view.decode_step_of or Polynomial((view.decode_step_s,))
        gain = disaggregation_gain(fleet, point, step_of, demand.rate_rps, view.tpot_s)
        if gain is None:
            return replace(memory, gain=None, advice="", advised_times=0)
        enough = 1.0 if memory.advice == COLOCATE else 1 / (1 + self.settings.min_role_gain)
        advised = COLOCATE if gain.throughput_ratio < enough else DISAGGREGATE
        times = memory.advised_times + 1 if advised == memory.advised else 1
        advice = advised if times >= 2 * self.settings.patience else memory.advice
        return replace(memory, gain=gain, advice=advice, advised=advised, advised_times=times)


def _fleet(view: PlanningView, demand: MeasuredDemand, roles: Roles) -> Fleet | None:
    """The view as the throughput model takes it; None without costs, a demand or two local workers."""
    if view.unknown or demand.lengths is None:
        return None
    if min(roles.num_prefill, roles.num_decode) < 0 or roles.num_prefill + roles.num_decode < 2:
        return None
    linked = view.num_prfaas > 0 and view.link_bytes_per_s > 0
    return Fleet(
        lengths=demand.lengths,
        mean_output_tokens=max(1.0, demand.mean_output_tokens),
        kv_bytes=view.kv_bytes,
        prfaas=(_prfaas_cluster(view),) if linked else (),
        num_local_gpus=roles.num_prefill + roles.num_decode,
        local_prefill_s=view.local_prefill_s,
        local_link_bytes_per_s=math.inf,
        max_batch_size=view.max_batch_size,
        decode_step_s=view.decode_step_s,
    )


def _prfaas_cluster(view: PlanningView) -> PrfaasCluster:
    """All PrfaaS workers behind all links, as one."""
    return PrfaasCluster("prfaas", view.num_prfaas, view.prfaas_prefill_s, view.link_bytes_per_s)


def _link_wait_s(view: PlanningView, fleet: Fleet, threshold_tokens: float) -> float:
    """Seconds on the link beyond those of one mean hand-over: what one prompt alone may queue is no congestion."""
    if not view.link_queue_s:
        return 0.0
    _, l_long, _ = fleet.lengths.split(min(threshold_tokens, float(fleet.lengths.tokens[-1])))
    tokens = np.nan_to_num(l_long, nan=float(fleet.lengths.tokens[-1]))
    return view.link_queue_s - float(fleet.kv_bytes(tokens)) / view.link_bytes_per_s


def _numbers(view: PlanningView, demand: MeasuredDemand) -> dict[str, float]:
    """What was measured; every name says its unit."""
    return {
        "num_prfaas": float(view.num_prfaas),
        "link_bytes_per_s": view.link_bytes_per_s,
        "link_utilisation": view.link_utilisation,
        "link_queue_s": view.link_queue_s,
        "prfaas_queue_s": view.prfaas_queue_s,
        "local_queue_s": view.local_queue_s,
        "decode_queue": float(view.decode_queue),
        "gateway_queue": float(view.num_queued),
        "rate_rps": demand.rate_rps,
        "mean_uncached_tokens": 0.0 if demand.lengths is None else demand.lengths.mean_tokens,
        "mean_cached_tokens": demand.mean_cached_tokens,
        "mean_output_tokens": demand.mean_output_tokens,
    }


def _point_numbers(point: OperatingPoint | None) -> dict[str, float]:
    """What equations 3 to 6 say of the target."""
    if point is None:
        return {}
    return {
        "offload_fraction": point.offload_fraction,
        "theta_prfaas_rps": point.theta_prfaas_rps,
        "theta_prefill_rps": point.theta_prefill_rps,
        "theta_decode_rps": point.theta_decode_rps,
        "throughput_rps": point.throughput_rps,
    }


def _require(ok: bool, key: str, allowed: str) -> None:
    if not ok:
        raise InvalidConfig(key, f"must be {allowed}")
