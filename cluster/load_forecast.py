"""What will the load be when this prompt's prefill ends, and what TTFT and TPOT would the request see? Pure.

A decode worker that looks idle now is not idle when a prompt that starts now has been prefilled: what the prefill
workers compute meanwhile arrives there first. Judging requests by the load as it is now makes it swing between idle
and overloaded, with the prefill time as period (PAPERS.md C.5, Mooncake's early rejection); so it is projected:

    on D at now + h  =  of other gateways (as reported, there or announced, taken to stay)
                     +  of ours that decode there, each times the chance that it lasts h longer
                     +  of ours whose prefill ends within h, each times the chance that it lasts what is left of h

Mooncake gives every decode the same duration; here the chance is read from the durations that were measured last
(of those that lasted as long as it has, how many lasted h longer), which is the same if all are alike.

Seconds come from, in this order: the policy's own forecast of the route, moved from the load that it saw to the load
then; the cost model's view; lines fitted to what this gateway measured of its own requests. What none of them knows is
None, and nothing is held against a request that nothing is known of.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.cost_model import ComputeCost, CostView
from cluster.service_times import ServiceTimes
from cluster.view import Forecast, WorkerView


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of the workers on its route; counts of tokens, and of its n continuations."""

    num_tokens: int  # of the prompt
    uncached_tokens: int  # of them, to be computed by the worker that prefills
    num_sequences: int
    num_output: float  # expected of each continuation
    max_tokens: float  # most of each

    @property
    def growth(self) -> float:
        """Tokens that it adds to what is stored of it."""
        return self.num_sequences * self.num_output


@dataclass(frozen=True, slots=True)
class Released:
    """A request of this gateway that a decode worker has, or will get when its prefill ends."""

    demand: Demand
    decodes_from: float  # on the Clock: when its first token came, or is expected
    decodes: bool  # its first token has come


@dataclass(frozen=True, slots=True)
class ReleasedSum:
    """What some of those add up to. Tokens are whole or halves, so they add up exactly in whatever order."""

    present: int = 0  # sequences of those that decode
    sequences: int = 0  # of all
    growth: float = 0.0  # tokens that all will store yet: of those that decode half of what they generate, on average


class RunningSum:
    """A ``ReleasedSum`` as they come and go."""

    def __init__(self, released: Iterable[Released] = ()) -> None:
        self.present = 0
        self.sequences = 0
        self.growth = 0.0
        for one in released:
            self.add(one)

    def add(self, released: Released) -> None:
        """One comes."""
        self._change(released, 1)

    def subtract(self, released: Released) -> None:
        """One goes."""
        self._change(released, -1)

    def now(self) -> ReleasedSum:
        """What those that are there add up to."""
        return ReleasedSum(self.present, self.sequences, self.growth)

    def _change(self, released: Released, sign: int) -> None:
        demand = released.demand
        size = sign * demand.num_sequences
        growth = size * demand.num_output
        self.sequences += size
        if released.decodes:
            self.present += size
            self.growth += growth / 2
        else:
            self.growth += growth


@dataclass(frozen=True, slots=True)
class Outlook:
    """All that may be known of one route: its two workers and what of this gateway's own is on them."""

    now: float
    prefill: WorkerView  # that computes the prompt; the decode worker itself if the route has no other
    decode: WorkerView
    costs: CostView
    times: ServiceTimes
    expected: Forecast | None = None  # the policy's, from now on; None: it predicts nothing
    released: tuple[Released, ...] = ()  # ours for ``decode``
    foreign: int = 0  # sequences on ``decode``, or announced there, that are not ours
    known_sum: ReleasedSum | None = None  # of ``released``; None: it is added up when it is asked for

    @property
    def sum(self) -> ReleasedSum:
        """What ``released`` adds up to."""
        return RunningSum(self.released).now() if self.known_sum is None else self.known_sum


def waiting_tokens(outlook: Outlook) -> int:
    """Prompt tokens ahead of the request: what the worker reported, and what was sent there since."""
    return outlook.prefill.load.num_waiting_tokens + outlook.prefill.unreported_tokens


def queue_s(outlook: Outlook) -> float | None:
    """Seconds of prefill ahead of the request."""
    tokens = waiting_tokens(outlook)
    if not tokens:
        return 0.0
    cost = _cost(outlook.costs, outlook.prefill)
    if cost is not None:
        step_s, token_s, pair_s = cost.prefill_cost.coefficients
        load = outlook.prefill.load
        prompts = max(1, load.num_running + load.num_waiting + outlook.prefill.num_unreported)
        steps = math.ceil(tokens / cost.step_tokens) if cost.step_tokens < math.inf else 1
        # Lengths are not reported; equal ones attend least. Prompts share steps.
        return step_s * steps + tokens * (token_s + pair_s / 2 * tokens / prompts)
    line = outlook.times.first_token
    return line.slope * tokens if line is not None and line.slope > 0 else None


def predict_ttft(outlook: Outlook, demand: Demand) -> float | None:
    """Seconds from release to first token."""
    if outlook.expected is not None:
        return outlook.expected.ttft_s
    cost, ahead_s = _cost(outlook.costs, outlook.prefill), queue_s(outlook)
    if cost is not None and ahead_s is not None:
        return ahead_s + cost.prefill(demand.uncached_tokens, demand.num_tokens - demand.uncached_tokens)
    line = outlook.times.first_token
    return None if line is None else line.at(waiting_tokens(outlook) + demand.uncached_tokens)


def predict_tpot(outlook: Outlook, demand: Demand, horizon_s: float, *, ahead: bool = True) -> float | None:
    """Seconds of each token after the first, if decode begins ``horizon_s`` from now.

    ``ahead`` False judges by the load as it is now, as Mooncake's early rejection without prediction does.
    """
    present = _present(outlook)
    then = load_at(outlook, horizon_s).sequences if ahead else present
    step_now, step_then = (_step_s(outlook, demand, n + demand.num_sequences) for n in (present, then))
    if outlook.expected is None:
        return step_then
    if step_now is None or step_then is None or step_now <= 0:
        return outlook.expected.tpot_s
    return outlook.expected.tpot_s * step_then / step_now


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """What is expected of a decode worker at some moment, one request's own left out."""

    sequences: float
    pages_free: float


def load_at(outlook: Outlook, horizon_s: float | None) -> DecodeLoad:
    """The load ``horizon_s`` from now, when what is there, or will have come by then, has grown to its expected length:
    a page that is free now may be spoken for. None: if all had come and none ended, which is no less at any time."""
    decode = outlook.decode
    sequences, tokens = float(outlook.foreign), float(decode.load.num_announced_tokens + decode.unreported_kv_tokens)
    if horizon_s is None:
        in_all = outlook.sum
        return DecodeLoad(
            sequences + in_all.sequences, decode.load.pages_free - _pages(outlook, tokens + in_all.growth)
        )
    for released in outlook.released:
        demand = released.demand
        stays = _presence(outlook, released, outlook.now + horizon_s)
        sequences += demand.num_sequences * stays
        if released.decodes:
            # Its prompt's pages are taken: what ends gives them back, what stays has half of its growth to come.
            tokens += demand.growth / 2 * stays - demand.num_tokens * (1 - stays)
        else:
            tokens += demand.growth * stays  # its prompt is announced, or has pages already
    return DecodeLoad(sequences, decode.load.pages_free - _pages(outlook, tokens))


def pages_needed(outlook: Outlook, demand: Demand) -> float:
    """Pages that the request will have taken on the decode worker at its end; its continuations share the prompt's."""
    return _pages(outlook, demand.num_tokens + demand.growth)


def lasts(durations: tuple[float, ...], age_s: float, longer_s: float) -> float:
    """The chance that what has lasted ``age_s`` lasts ``longer_s`` more, by ``durations`` (ascending).

    Where nothing was seen to last so long, it is taken to stay: a wrong yes would let too many in.
    """
    as_old = len(durations) - bisect_right(durations, age_s)
    if not as_old:
        return 1.0
    return (len(durations) - bisect_right(durations, age_s + longer_s)) / as_old


def seconds_until_tpot(outlook: Outlook, demand: Demand, allowed_s: float, horizon_s: float) -> float | None:
    """How much later the predicted TPOT is ``allowed_s`` or less if nothing else is released; None: not in sight."""
    longest = outlook.times.decode[-1] if outlook.times.decode else 0.0
    for later in (longest * k / _LOOKS for k in range(1, _LOOKS + 1)):
        tpot_s = predict_tpot(outlook, demand, horizon_s + later)
        if tpot_s is not None and tpot_s <= allowed_s:
            return later
    return None


_LOOKS = 8  # into the future, up to the longest decode that was measured


def _present(outlook: Outlook) -> int:
    """Sequences on the decode worker now."""
    return outlook.foreign + outlook.sum.present


def _presence(outlook: Outlook, released: Released, at: float) -> float:
    """The chance that a released request decodes at ``at``."""
    begins = released.decodes_from if released.decodes else max(outlook.now, released.decodes_from)
    if at < begins:
        return 0.0
    times = outlook.times
    if times.token_s is not None and at - begins >= released.demand.max_tokens * times.token_s:
        return 0.0
    age_s = max(0.0, outlook.now - begins)
    return lasts(times.decode, age_s, at - begins - age_s)


def _step_s(outlook: Outlook, demand: Demand, sequences: float) -> float | None:
    """Seconds of a decode step with so many sequences of the lengths that are there."""
    cost = _cost(outlook.costs, outlook.decode)
    if cost is not None:
        demands = [demand, *(released.demand for released in outlook.released)]
        context = sum(d.num_tokens + d.num_output / 2 for d in demands) / len(demands)  # half of the output, on average
        return cost.decode_step(sequences, sequences * context)
    line = outlook.times.token
    return None if line is None else line.at(sequences)


def _cost(costs: CostView, worker: WorkerView) -> ComputeCost | None:
    return costs.profiles.get(worker.profile)


def _pages(outlook: Outlook, tokens: float) -> float:
    return tokens / outlook.decode.model.fingerprint.page_size
