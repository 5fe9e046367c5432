"""Where did the time to a continuation's first token go, and where the time from there to the second? Pure.

The first token comes from the worker that prefills, at once (ADR 0002): the hand-over of the K/V is no part of the time
to it, but of the time to the second token. So there are two lists of parts, each of which adds up to its whole:

    arrival ─ receive ─ tokenize ─ admission ─ siblings ─ route ─ retries ─ messages ─ pull ─ prefill_queue ─ prefill ─┐
    token 1 ─ messages ─ first_step ─ decode_queue ─ transfer ─ transfer_wait ─ token 0 ───────────────────────────────┘

A part is measured where it passed, on that process's clock; instants of two processes are never compared. What lies
between what a gateway measures (from the route to the token) and what a worker does (from the sequence's arrival there
to the token) is ``messages``: the calls, the way back and the turns of event loops. It is measured by that difference,
and could be negative only if a worker counted something twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class TtftParts:
    """Seconds between a request's arrival at the gateway and a continuation's first token there, in order."""

    receive_s: float = 0.0  # reading and checking what the client sent
    tokenize_s: float = 0.0
    admission_s: float = 0.0  # waited in the gateway for its turn
    siblings_s: float = 0.0  # of n > 1, all but the first: waited for the first's first token
    route_s: float = 0.0  # choosing workers, and waiting for some to be there
    retries_s: float = 0.0  # tries that failed before this token
    messages_s: float = 0.0  # to the worker and back
    pull_s: float = 0.0  # waited for cached pages of another worker
    prefill_queue_s: float = 0.0  # from its arrival in the worker's queue to its first step
    prefill_s: float = 0.0  # from that step to the token

    @property
    def total_s(self) -> float:
        """The time to the first token."""
        return _sum(self)


@dataclass(frozen=True, slots=True)
class TtstParts:
    """Seconds between a continuation's first and second token at the gateway, in order."""

    transfer_wait_s: float = 0.0  # after the first token: until the decode worker had granted pages
    transfer_s: float = 0.0  # after that: what was left to send, and the commit's acknowledgement
    decode_queue_s: float = 0.0  # from the commit to the first decode step
    first_step_s: float = 0.0  # that step; colocated: everything up to the second token
    retries_s: float = 0.0  # a worker was lost meanwhile: everything, as another computed the second token
    messages_s: float = 0.0  # to the gateway, later than the first token's

    @property
    def total_s(self) -> float:
        """The time from the first token to the second."""
        return _sum(self)


def _sum(parts: TtftParts | TtstParts) -> float:
    return math.fsum(getattr(parts, part.name) for part in fields(parts))


def ttst_parts(
    gap_s: float, *, wait_s: float, exposed_s: float, decode_queue_s: float, first_step_s: float
) -> TtstParts:
    """The parts of a hand-over's ``gap_s`` between two tokens.

    ``exposed_s`` is what the sender saw between its token and the acknowledged commit, ``wait_s`` of it before the
    grant. The acknowledgement's way back, and the first token's way to the gateway, run beside what follows: where the
    parts together are longer than the gap, the earlier ones are shortened, as those are what was hidden.
    """
    left = gap_s
    first_step_s = min(first_step_s, left)
    left -= first_step_s
    decode_queue_s = min(decode_queue_s, left)
    left -= decode_queue_s
    transfer_s = min(max(0.0, exposed_s - wait_s), left)
    left -= transfer_s
    wait_s = min(wait_s, left)
    return TtstParts(wait_s, transfer_s, decode_queue_s, first_step_s, messages_s=left - wait_s)
