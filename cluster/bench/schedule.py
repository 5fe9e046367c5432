"""What is sent, and when? The simulator's workloads for a real endpoint: warm-up, sessions, rates. Pure.

Requests come from a trace of any form that workload_traces.py reads, or are drawn: lengths from a distribution,
conversations of so many turns whose clients think in between. When they come is what cluster/simulator/workload.py
knows: the trace's instants, Poisson, gamma, or a number of users (a closed loop).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from cluster.length_distribution import LengthDistribution
from cluster.simulator.conversation import Turn
from cluster.simulator.workload import ArrivalPlan, Workload, from_trace
from cluster.workload_traces import TraceRequest
from core.errors import InvalidConfig

LENGTH_FORMS = "TOKENS, fixed:TOKENS, uniform:MINIMUM,MAXIMUM or log_normal:MU,SIGMA,MINIMUM,MAXIMUM"


@dataclass(frozen=True)
class DrawnRequests:
    """Requests that nobody has sent before.

    turns: requests of each conversation; a later one goes on from the answer of the one before, by a new prompt length.
    think_s: mean of the exponentially distributed time between an answer and the next turn; 0: none.
    """

    inputs: LengthDistribution
    outputs: LengthDistribution
    num_requests: int
    turns: int = 1
    think_s: float = 0.0

    def __post_init__(self) -> None:
        _require(self.num_requests >= 1, "--requests", "must be at least 1", self.num_requests)
        _require(self.turns >= 1, "--turns", "must be at least 1", self.turns)
        _require(0 <= self.think_s < math.inf, "--think", "must be at least 0 s", self.think_s)

    def draw(self, seed: int) -> Iterator[TraceRequest]:
        """The requests, as a trace would tell them."""
        random = Random(seed)
        prompt = 0
        for number in range(self.num_requests):
            conversation, turn = divmod(number, self.turns)
            new, output = (max(1, round(of.quantile(random.random()))) for of in (self.inputs, self.outputs))
            prompt = new if turn == 0 else prompt + new
            think = random.expovariate(1 / self.think_s) if turn and self.think_s else 0.0
            yield TraceRequest(
                input_tokens=prompt,
                output_tokens=output,
                session_id=str(conversation) if self.turns > 1 else None,
                turn=turn,
                think_s=think,
                appended=turn > 0,
            )
            prompt += output


@dataclass(frozen=True)
class Schedule:
    """One run. ``warm_up`` is sent before it, one after the other, and not measured."""

    warm_up: tuple[Turn, ...]
    workload: Workload
    num_left_out: int = 0  # requests that are longer than the model's context

    @property
    def num_requests(self) -> int:
        """Measured ones."""
        return self.workload.num_requests


def make_schedule(
    requests: Sequence[TraceRequest],
    arrivals: ArrivalPlan,
    *,
    speed: float = 1.0,
    seed: int = 0,
    warm_up: int = 0,
    max_requests: int | None = None,
    max_model_len: int | None = None,
) -> Schedule:
    """Conversations of ``requests``; ``InvalidConfig`` if they lack what ``arrivals`` needs, or none fits.

    speed: instants come so many times as fast. max_requests: whole conversations until so many are reached.
    max_model_len: a request with more tokens, its answer included, is left out, and what follows it in its
    conversation.
    """
    _require(0 < speed < math.inf, "--speed", "must be above 0", speed)
    _require(warm_up >= 0, "--warmup", "must be at least 0 requests", warm_up)
    workload = from_trace(requests, arrivals, seed=seed, max_requests=max_requests, max_tokens=max_model_len)
    if speed != 1.0:
        faster = [replace(one, starts_at=one.starts_at / speed) for one in workload.conversations]
        workload = replace(workload, conversations=faster)
    turns = [turn for conversation in workload.conversations for turn in conversation.turns]
    too_long = 0
    if max_model_len is not None:
        too_long = sum(one.input_tokens + max(1, one.output_tokens) > max_model_len for one in requests)
    return Schedule(tuple(turns[:warm_up]), workload, too_long)


def parse_lengths(text: str, option: str) -> LengthDistribution:
    """A distribution of tokens; ``InvalidConfig`` naming ``option``."""
    form, colon, body = text.partition(":")
    try:
        numbers = [float(number) for number in (body if colon else form).split(",")]
    except ValueError:
        numbers = []
    forms: dict[tuple[str, int], Callable[..., LengthDistribution]] = {
        ("fixed", 1): lambda tokens: LengthDistribution.from_sample([tokens]),
        ("uniform", 2): _uniform,
        ("log_normal", 4): LengthDistribution.log_normal,
    }
    make = forms.get((form if colon else "fixed", len(numbers)))
    if make is None:
        raise InvalidConfig(option, f"must be {LENGTH_FORMS}, got {text!r}")
    try:
        return make(*numbers)
    except InvalidConfig as error:
        raise InvalidConfig(option, f"{error.message} ({text!r})") from error


def _uniform(minimum: float, maximum: float) -> LengthDistribution:
    low, high = round(minimum), round(maximum)
    if not 1 <= low <= high:
        raise InvalidConfig("uniform", "needs 1 <= MINIMUM <= MAXIMUM")
    return LengthDistribution.from_sample(list(range(low, high + 1)))


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
