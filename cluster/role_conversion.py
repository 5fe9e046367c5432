"""Which worker changes its role, and when has it changed? Pure; planner.py asks the workers.

A worker that is told another role advertises it at once and gets only what is for it from then on. What it had before
goes on to its end there: nothing is reloaded, moved or lost. It has changed when none of that is left, and when it can
be used as what it is: a link to or from it has passed its self-test, where links are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.view import ClusterView, WorkerView
from core.request import EngineId, Role, WorkerId


class Outcome(StrEnum):
    """How a conversion ended."""

    DONE = "done"
    REFUSED = "refused"  # the worker did not take the call
    LOST = "lost"  # it left the view meanwhile
    NO_WORKER = "no_worker"  # every cluster needs those that it has: none began
    GAVE_UP = "gave_up"  # it took too long; the worker keeps its new role, if it advertises it


@dataclass(frozen=True, slots=True)
class Conversion:
    """One worker on its way to another role. ``asked`` False: somebody else told it, it is only watched."""

    worker_id: WorkerId
    engine_id: EngineId
    role: Role  # that it is to have
    began_at: float
    asked: bool = True


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a conversion, with what is to be said of it."""

    outcome: Outcome
    reason: str


def choose(local: Sequence[WorkerView], role: Role) -> WorkerView | None:
    """The worker that loses least by turning to ``role``; None if no cluster can spare one of the other role.

    First who has the fewest sequences, then who caches the fewest pages, then the smaller id. A cluster keeps one.
    """
    others = [worker for worker in local if worker.role is not role]
    counts = {worker.cluster_id: 0 for worker in others}
    for worker in others:
        counts[worker.cluster_id] += 1
    spare = [worker for worker in others if counts[worker.cluster_id] > 1]
    return min(spare, key=lambda w: (_num_sequences(w), w.load.pages_cached, w.worker_id), default=None)


def ending(conversion: Conversion, view: ClusterView, now: float, timeout_s: float, refusal: str) -> Ending | None:
    """How the conversion ended; None: it goes on. ``refusal``: what the worker's answer was, if it was no."""
    worker = next((w for w in view.workers if w.engine_id == conversion.engine_id), None)
    if worker is None:
        return Ending(Outcome.LOST, "it left")
    if refusal:
        return Ending(Outcome.REFUSED, refusal)
    left = what_is_left(conversion, worker, view)
    if not left:
        return Ending(Outcome.DONE, f"changed in {now - conversion.began_at:.1f} s")
    if now - conversion.began_at >= timeout_s:
        return Ending(Outcome.GAVE_UP, f"after {timeout_s:g} s {left}")
    return None


def what_is_left(conversion: Conversion, worker: WorkerView, view: ClusterView) -> str:
    """What the worker's change still waits for; empty: nothing."""
    if worker.role is not conversion.role:
        return f"it still advertises {worker.role}"
    if worker.load.num_other_role:
        return f"{worker.load.num_other_role} of its sequences are of its earlier role"
    untried = _no_usable_link(worker, view)
    return f"no link of it can be used: {untried}" if untried else ""


def _no_usable_link(worker: WorkerView, view: ClusterView) -> str:
    """Why none of its links may be used; empty if one may, or if it has nobody to have a link with."""
    if worker.role is Role.PREFILL:
        pairs = [(worker, other) for other in view.ready(Role.DECODE)]
    else:
        pairs = [(other, worker) for other in view.ready(Role.PREFILL)]
    if not pairs or any(view.can_ship(sender, receiver) for sender, receiver in pairs):
        return ""
    first = view.link(pairs[0][0].worker_id, pairs[0][1].worker_id)
    return "" if first is None else first.reason


def _num_sequences(worker: WorkerView) -> int:
    """What it has, as it says itself or as this gateway knows, whichever is more: its report may be a moment old."""
    return max(worker.load.num_running + worker.load.num_waiting + worker.load.num_sessions, worker.num_assigned)
