"""What has been asked of the fleet lately? Lengths, rate and answers of requests, as the router meets and ends them.

    lengths   uncached prompt tokens, in bins of 1/16 octave, each with its own mean: what is planned with
    rate      requests routed per second
    answers   mean tokens of the requests that ended lately, and what those under way have beyond what so many would
              have. An answer that still runs has made tokens and has not ended: a surge of long answers is seen while
              it runs, not when it is over, and a service that only fills up has no longer answers.

Everything fades with ``window_s``, but never below the weight of ``REMEMBERED`` requests: on a quiet service the last
few requests count, however long ago they came. What was routed twice (a retry) was asked once.

Constant memory, constant time for each request; one writer, the router, on the gateway's loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.length_distribution import LengthDistribution
from cluster.planning_policy import MeasuredDemand
from cluster.routing_policy import RouteRequest
from cluster.view import Route
from core.clock import Clock

REMEMBERED = 32.0  # requests that no quiet time makes forgotten

_BINS_PER_OCTAVE = 16
_NUM_BINS = 24 * _BINS_PER_OCTAVE  # up to 16 million tokens
_CHANCE = 1.0  # standard deviations
_NEGLIGIBLE = 1e-6  # share of the requests below which a bin has faded away
_RESCALE_AT = 1e9  # a new request's weight in stored units, when all of them are divided by it


@dataclass(slots=True)
class _Fading:
    """How much a new request weighs, in units in which the old ones stay what they are; their sum fades."""

    window_s: float
    at: float
    unit: float = 1.0
    total: float = 0.0  # stored units

    @property
    def weight(self) -> float:
        """In requests."""
        return self.total / self.unit

    def pass_time(self, now: float) -> None:
        passed_s, self.at = max(0.0, now - self.at), now
        weight = self.weight
        if weight > REMEMBERED:
            faded = max(REMEMBERED, weight * math.exp(-passed_s / self.window_s))
            self.unit *= weight / faded


class DemandMeter:
    """Implements the router's ``RequestObserver``; ``measured`` is the planner's."""

    def __init__(self, clock: Clock, window_s: float) -> None:
        self._clock = clock
        self._window_s = window_s
        self._began_at = now = clock.now()
        self._prompts = _Fading(window_s, now)
        self._bins = [0.0] * _NUM_BINS  # stored units
        self._bin_tokens = [0.0] * _NUM_BINS  # stored units times uncached tokens
        self._cached_tokens = 0.0  # stored units times cached tokens
        self._recent = 0.0  # requests routed, faded without a floor: the rate
        self._recent_at = now
        self._answers = _Fading(window_s, now)  # requests ended
        self._tokens = 0.0  # of them, in the stored units of the answers
        self._squares = 0.0  # likewise, of the squared lengths of ended ones
        self._more_tokens = 0.0  # of answers under way beyond those before, likewise
        self._more_answers = 0.0  # under way beyond those before, likewise
        self._open_tokens = 0  # of answers under way, as of the last ``measured``
        self._num_answering = 0  # answers under way, likewise

    def routed(self, request: RouteRequest, route: Route) -> None:
        """A request's first route was chosen; what it finds in caches, or is fetched, need not be computed."""
        now = self._clock.now()
        fetched = 0 if route.pull is None else route.pull.num_tokens
        cached = max(request.cached_tokens(route.prefill or route.decode), fetched)
        uncached = max(1, request.num_tokens - cached)
        self._prompts.pass_time(now)
        self._recent = self._faded_recent(now) + 1
        self._recent_at = now
        unit = self._prompts.unit
        index = min(_NUM_BINS - 1, int(math.log2(uncached) * _BINS_PER_OCTAVE))
        self._bins[index] += unit
        self._bin_tokens[index] += unit * uncached
        self._cached_tokens += unit * cached
        self._prompts.total += unit
        if unit > _RESCALE_AT:
            self._rescale_prompts()

    def ended(self, output_tokens: int) -> None:
        """A routed request has ended, in whatever way, with so many tokens over all its continuations.

        One that ended without any was no answer: while workers fail, answers do not become short.
        """
        if not output_tokens:
            return
        self._answers.pass_time(self._clock.now())
        self._answers.total += self._answers.unit
        self._tokens += self._answers.unit * output_tokens
        self._squares += self._answers.unit * output_tokens**2
        if self._answers.unit > _RESCALE_AT:
            self._rescale_answers()

    def measured(self, open_tokens: int, num_answering: int) -> MeasuredDemand:
        """The demand now. ``open_tokens``: that the requests in flight have so far (``Router.num_open_tokens``);
        ``num_answering``: how many of them have any."""
        now = self._clock.now()
        self._prompts.pass_time(now)
        self._answers.pass_time(now)
        self._more_tokens += self._answers.unit * (open_tokens - self._open_tokens)
        self._more_answers += self._answers.unit * (num_answering - self._num_answering)
        self._open_tokens, self._num_answering = open_tokens, num_answering
        return MeasuredDemand(
            lengths=self._lengths(),
            rate_rps=self._rate_rps(now),
            mean_output_tokens=self._mean_output_tokens(),
            mean_cached_tokens=self._cached_tokens / self._prompts.total if self._prompts.total else 0.0,
            num_requests=min(self._prompts.weight, self._answers.weight),
            relative_error=self._relative_error(),
        )

    # ---- inside ----

    def _faded_recent(self, now: float) -> float:
        return self._recent * math.exp(-max(0.0, now - self._recent_at) / self._window_s)

    def _rate_rps(self, now: float) -> float:
        """Over the window, or over what there is of it yet."""
        seen_s = self._window_s * -math.expm1(-max(0.0, now - self._began_at) / self._window_s)
        return self._faded_recent(now) / seen_s if seen_s > 0 else 0.0

    def _lengths(self) -> LengthDistribution | None:
        least = _NEGLIGIBLE * self._prompts.total
        kept = [(tokens / w, w) for tokens, w in zip(self._bin_tokens, self._bins, strict=True) if w > least]
        if not kept:
            return None
        # Whole tokens: thresholds are, and a prompt as long as the threshold must not be one beyond it.
        return LengthDistribution.from_counts([round(mean) for mean, _ in kept], [weight for _, weight in kept])

    def _mean_output_tokens(self) -> float:
        """In a steady state an answer under way has E[n^2] / 2 E[n] tokens on average, if answers have n (renewal
        theory: half of an answer if all are alike, a whole mean one if they are as spread as an exponential
        distribution). Tokens of more answers under way than that many would have, and than chance makes, are of answers
        longer than those that ended."""
        if not self._answers.total:  # all began a while ago at most, and are halfway on average
            return 2 * self._open_tokens / self._num_answering if self._num_answering else 0.0
        mean = self._tokens / self._answers.total
        each = self._squares / (2 * self._tokens)
        by_chance = _CHANCE * each * math.sqrt(self._num_answering / 3)  # as if they were spread evenly
        beyond = self._more_tokens - self._more_answers * each - by_chance * self._answers.unit
        return mean + max(0.0, beyond) / self._answers.total

    def _relative_error(self) -> float:
        """Of the two means that roles depend on, prompt and answer: their standard errors, together."""
        if not self._prompts.total or not self._answers.total:
            return math.inf
        mean = sum(self._bin_tokens) / self._prompts.total
        within = (t * t / w for t, w in zip(self._bin_tokens, self._bins, strict=True) if w > 0)
        prompts = max(0.0, sum(within) / self._prompts.total / mean**2 - 1) / self._prompts.weight
        mean = self._mean_output_tokens()
        spread = max(0.0, self._squares / self._answers.total / mean**2 - 1) if mean else math.inf
        return math.sqrt(prompts + spread / self._answers.weight)

    def _rescale_prompts(self) -> None:
        unit, self._prompts.unit = self._prompts.unit, 1.0
        self._bins = [weight / unit for weight in self._bins]
        self._bin_tokens = [tokens / unit for tokens in self._bin_tokens]
        self._cached_tokens /= unit
        self._prompts.total /= unit

    def _rescale_answers(self) -> None:
        unit, self._answers.unit = self._answers.unit, 1.0
        self._tokens /= unit
        self._more_tokens /= unit
        self._more_answers /= unit
        self._squares /= unit
        self._answers.total /= unit
