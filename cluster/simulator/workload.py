"""Who asks what, and when? Traces and made-up lengths, as conversations of simulated clients.

    what     a trace of any form that workload_traces.py reads, or lengths drawn from a distribution
    when     the trace's own instants, or those stretched to a rate; or a Poisson process, or one with gamma gaps:
             burstiness is the gamma's shape, as in ``vllm bench serve``: 1 is Poisson, less comes in bursts; or a
             number of users, each with one conversation at a time (a closed loop)
    then     a conversation's next turn comes when the last one was answered and its client has thought

A turn's prompt begins with what the last one's prompt and answer were, where the trace's blocks say so: the part of it
that stands where the answer stood is the answer, so what decoding wrote is found in the caches.

Everything is drawn from one seed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from cluster.simulator.answers import Answer
from cluster.simulator.conversation import Conversation, Prompt, Turn
from cluster.workload_traces import TraceRequest
from core.errors import InvalidConfig
from core.request import NO_SLO, Slo

TRACE, POISSON, GAMMA, USERS = "trace", "poisson", "gamma", "users"
ARRIVALS = (TRACE, POISSON, GAMMA, USERS)

Draw = Callable[[Random], tuple[int, int]]  # lengths of a prompt and of its answer
_Sessions = list[tuple[float | None, tuple[Turn, ...]]]  # when each begins, if that is told


@dataclass(frozen=True)
class ArrivalPlan:
    """When conversations begin.

    process: ``trace``: at the trace's instants; ``poisson`` and ``gamma``: at ``rate_rps``; ``users``: whenever one of
        ``num_users`` has nothing else to do.
    rate_rps: requests/s; of conversations so many less that their turns make this rate. Of ``trace``: None leaves the
        instants as they are, a rate stretches them.
    burstiness: shape of the gamma distribution of gaps; below 1 in bursts, above 1 evenly.
    num_users: of ``users``.
    spread_s: instants of a trace that lie on a grid are moved by up to so many seconds, at random.
    """

    process: str = TRACE
    rate_rps: float | None = None
    burstiness: float = 1.0
    num_users: int = 1
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        _require(self.process in ARRIVALS, "process", f"must be one of {', '.join(ARRIVALS)}", self.process)
        rate = self.rate_rps
        _require(rate is None or 0 < rate < math.inf, "rate_rps", "must be above 0 requests/s", rate)
        needed = self.process not in (POISSON, GAMMA) or rate is not None
        _require(needed, "rate_rps", f"is needed by process {self.process}", rate)
        _require(0 < self.burstiness < math.inf, "burstiness", "must be above 0", self.burstiness)
        _require(self.num_users >= 1, "num_users", "must be at least 1", self.num_users)
        _require(self.spread_s >= 0, "spread_s", "must be at least 0 s", self.spread_s)


@dataclass(frozen=True)
class Workload:
    """Conversations in the order in which they begin. ``num_users`` None: at their instants."""

    conversations: Sequence[Conversation]
    num_users: int | None = None

    @property
    def num_requests(self) -> int:
        """Turns of all conversations."""
        return sum(len(conversation.turns) for conversation in self.conversations)


def from_trace(
    requests: Iterable[TraceRequest],
    arrivals: ArrivalPlan,
    *,
    seed: int = 0,
    max_requests: int | None = None,
    max_tokens: int | None = None,
    slo: Slo = NO_SLO,
) -> Workload:
    """The trace's requests as conversations; ``InvalidConfig`` if it lacks what ``arrivals`` needs.

    ``max_requests``: whole conversations until so many requests are reached; ``max_tokens``: requests with more tokens,
    prompt and answer together, are left out, and what comes after them in their conversation.
    """
    names = _Numbers()
    sessions: _Sessions = []
    num_requests = 0
    for turns in _sessions(requests):
        fitting = _fitting(turns, max_tokens)
        if not fitting:
            continue
        if max_requests is not None and num_requests >= max_requests:
            break
        first = fitting[0].arrival_s if not _starts_apart(turns) else None
        sessions.append((first, tuple(_turns(fitting, names, num_requests, slo))))
        num_requests += len(fitting)
    if not sessions:
        raise InvalidConfig("trace", "holds no request that fits")
    return _timed(sessions, arrivals, Random(seed))


def from_lengths(
    draw: Draw,
    num_requests: int,
    arrivals: ArrivalPlan,
    *,
    seed: int = 0,
    slo: Slo = NO_SLO,
) -> Workload:
    """``num_requests`` prompts that share nothing, of lengths (prompt, answer) that ``draw`` gives."""
    random, names = Random(seed), _Numbers()
    sessions: _Sessions = []
    for number in range(num_requests):
        prompt, output = draw(random)
        turn = Turn(number, Prompt(prompt, names.new()), max(1, output), Answer(names.new()), slo=slo)
        sessions.append((None, (turn,)))
    return _timed(sessions, arrivals, random)


def log_normal(mu: float, sigma: float, minimum: int, maximum: int, output_tokens: int) -> Draw:
    """Prompts of exp(Normal(mu, sigma)) tokens, drawn again until they are within the limits; a fixed answer."""

    def draw(random: Random) -> tuple[int, int]:
        while True:
            tokens = random.lognormvariate(mu, sigma)
            if minimum <= tokens <= maximum:
                return max(1, round(tokens)), output_tokens

    return draw


def empirical(pairs: Sequence[tuple[int, int]]) -> Draw:
    """Pairs of a prompt's and an answer's length, each as likely as any other."""
    return lambda random: pairs[random.randrange(len(pairs))]


# ---- when ----


def _timed(sessions: _Sessions, arrivals: ArrivalPlan, random: Random) -> Workload:
    if arrivals.process == USERS:
        return Workload([Conversation(0.0, turns) for _, turns in sessions], arrivals.num_users)
    if arrivals.process == TRACE:
        return Workload(_at_their_instants(sessions, arrivals, random))
    assert arrivals.rate_rps is not None, "checked when the plan was made"
    turns_each = sum(len(turns) for _, turns in sessions) / len(sessions)
    mean_gap_s = turns_each / arrivals.rate_rps
    shape = arrivals.burstiness if arrivals.process == GAMMA else 1.0
    at = 0.0
    conversations = []
    for _, turns in sessions:
        at += random.gammavariate(shape, mean_gap_s / shape)
        conversations.append(Conversation(at, turns))
    return Workload(conversations)


def _at_their_instants(sessions: _Sessions, arrivals: ArrivalPlan, random: Random) -> list[Conversation]:
    told = [(at, turns) for at, turns in sessions if at is not None]
    if len(told) < len(sessions):
        message = "tells no instants, or each session's apart: choose poisson, gamma or users"
        raise InvalidConfig("trace", message)
    instants = [at for at, _ in told]
    began_at = min(instants)
    stretch = 1.0
    if arrivals.rate_rps is not None:
        span, num_turns = max(instants) - began_at, sum(len(turns) for _, turns in sessions)
        if span <= 0:
            raise InvalidConfig("rate_rps", "stretches nothing: all requests of the trace come at one instant")
        stretch = num_turns / arrivals.rate_rps / span
    moved = [(at - began_at + random.uniform(0.0, arrivals.spread_s), turns) for at, turns in told]
    return [Conversation(at * stretch, turns) for at, turns in sorted(moved, key=lambda pair: pair[0])]


# ---- what ----


class _Numbers:
    """Small numbers for blocks, tails and answers: tokens of their own."""

    def __init__(self) -> None:
        self._next = count(1)
        self._known: dict[str, int] = {}

    def new(self) -> int:
        return next(self._next)

    def of(self, name: str) -> int:
        number = self._known.get(name)
        if number is None:
            number = self._known[name] = next(self._next)
        return number


def _sessions(requests: Iterable[TraceRequest]) -> Iterator[list[TraceRequest]]:
    """Each session's turns in order; a request without a session is one of its own. In order of first turns."""
    sessions: dict[str, list[TraceRequest]] = {}
    for number, request in enumerate(requests):
        sessions.setdefault(request.session_id or f"\0{number}", []).append(request)
    for turns in sessions.values():
        yield sorted(turns, key=lambda request: request.turn)


def _starts_apart(turns: Sequence[TraceRequest]) -> bool:
    """Does each session of this trace count its seconds from its own beginning?"""
    return len(turns) > 1 and turns[0].arrival_s == 0.0 and turns[1].arrival_s is not None


def _fitting(turns: list[TraceRequest], max_tokens: int | None) -> list[TraceRequest]:
    if max_tokens is None:
        return turns
    for index, request in enumerate(turns):
        if request.input_tokens + max(1, request.output_tokens) > max_tokens:
            return turns[:index]
    return turns


def _turns(requests: Sequence[TraceRequest], names: _Numbers, first: int, slo: Slo) -> Iterator[Turn]:
    """The session's requests with tokens. Where a turn continues the one before it, what stands in the place of the
    answer is the answer."""
    prompts = _prompts(requests, names)
    for index, request in enumerate(requests):
        prompt, output = prompts[index], max(1, request.output_tokens)
        answer = Answer(names.new())
        following = prompts[index + 1] if index + 1 < len(prompts) else None
        if following is not None and _continues(prompt, following):
            covered = _num_full(prompt) * prompt.block_tokens
            own = following.tokens(covered, covered + 1) or (prompt.tail,)
            prompt = replace(prompt, tail=own[0], blocks=prompt.blocks[: _num_full(prompt)])
            answer = replace(answer, token_ids=following.tokens(prompt.num_tokens, prompt.num_tokens + output))
        yield Turn(first + index, prompt, output, answer, request.think_s, slo)


def _prompts(requests: Sequence[TraceRequest], names: _Numbers) -> list[Prompt]:
    made: list[Prompt] = []
    for request in requests:
        if request.appended and made:  # blocks of one token: what is appended begins anywhere
            new = request.input_tokens - made[-1].num_tokens
            blocks = array("q", made[-1].tokens()) + array("q", [names.new()]) * new
            made.append(Prompt(request.input_tokens, names.new(), blocks, 1))
        else:
            blocks = array("q", map(names.of, request.prefix_blocks))
            made.append(Prompt(request.input_tokens, names.new(), blocks, request.block_tokens))
    return made


def _num_full(prompt: Prompt) -> int:
    """Blocks that are full of the prompt: the last one may reach beyond it."""
    return min(len(prompt.blocks), prompt.num_tokens // prompt.block_tokens) if prompt.block_tokens else 0


def _continues(prompt: Prompt, following: Prompt) -> bool:
    """Does the next prompt begin with all of this one, as far as blocks say?"""
    known = _num_full(prompt)
    return (
        known > 0
        and following.num_tokens > prompt.num_tokens
        and following.block_tokens == prompt.block_tokens
        and following.blocks[:known] == prompt.blocks[:known]
    )


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
