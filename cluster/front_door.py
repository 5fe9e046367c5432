"""What do the front doors need of the gateway behind them? ``Router`` and ``Membership`` are what they get.

The doors (gRPC and HTTP) speak protocols and text; they decide nothing about placement. These Protocols keep them
testable against a scripted router, and are the whole list of what they may call.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from enum import StrEnum
from typing import Protocol

from cluster.admission import AdmissionCounters
from cluster.link_tester import PairResult
from cluster.planner import PlannerStatus
from cluster.view import ClusterView, ModelInfo
from core.errors import Overloaded
from core.request import GenerateRequest, OutputChunk, RequestId, Role

_MAX_REASONS = 4  # of many pairs that fail alike, a few say it


class Door(StrEnum):
    """Through which protocol a request came."""

    GRPC = "grpc"
    HTTP = "http"


class Counters(Protocol):
    """The router's counters since its start, as a frozen snapshot."""

    @property
    def num_requests(self) -> int: ...
    @property
    def num_retries(self) -> int: ...
    @property
    def num_resumes(self) -> int: ...
    @property
    def retries_by_reason(self) -> Mapping[str, int]: ...
    @property
    def resumes_by_reason(self) -> Mapping[str, int]: ...
    @property
    def admission(self) -> AdmissionCounters: ...
    @property
    def fallbacks_by_reason(self) -> Mapping[str, int]: ...
    @property
    def routes_by_place(self) -> Mapping[str, int]: ...


class RequestRouter(Protocol):
    """Runs requests on workers."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputChunk, None]:
        """Stream all n continuations. Closing the generator aborts the request on its workers.

        Each index ends with exactly one chunk that has ``finish_reason`` and ``timing``. Raises ``InvalidRequest``
        (``request_id`` already in flight), ``Overloaded``, ``NoRoute``, ``DeadlineExceeded``, ``Cancelled``,
        ``SequenceFailed``.
        """
        ...

    async def stop(self, request_id: RequestId, index: int) -> None:
        """End one continuation as finished; ``generate`` still yields its last chunk. Unknown ones are ignored."""
        ...

    def abort(self, request_id: RequestId) -> bool:
        """End a request; its ``generate`` raises ``Cancelled``. False if it is not in flight."""
        ...

    @property
    def num_inflight(self) -> int: ...

    @property
    def counters(self) -> Counters: ...


class LinkTests(Protocol):
    """Tests links on request."""

    def test_all(self) -> AsyncIterator[PairResult]:
        """Test every pair of a prefill and a decode worker now, and yield each when it has ended."""
        ...


class FleetPlanner(Protocol):
    """Plans thresholds and roles."""

    @property
    def status(self) -> PlannerStatus:
        """What it does now, as a frozen snapshot."""
        ...

    def scale(self, role: Role, size: int | None) -> str:
        """Hold a pool at so many workers; None: let it follow the load again. What was done, in words.

        Raises ``InvalidRequest`` for a pool of a fixed size, or a size beyond its bounds.
        """
        ...


class ClusterMembership(Protocol):
    """Knows the workers."""

    def view(self) -> ClusterView: ...

    def model(self) -> ModelInfo | None:
        """The served model; None until a worker has registered."""
        ...

    @property
    def probes_by_outcome(self) -> Mapping[str, int]:
        """Self-tests of links so far: ``passed``, or the class of the error."""
        ...


def retry_after(error: Overloaded) -> int:
    """Whole seconds, at least one, as HTTP's Retry-After wants them."""
    return max(1, math.ceil(error.retry_after_s))


def not_ready_reason(membership: ClusterMembership) -> str | None:
    """Why no request can be served now; None when requests can be.

    A prefill worker is not asked for: without one, decode workers prefill for themselves. If a cluster has both, one
    link between them must work: a service that silently prefills on its decode workers is not what was asked for.
    Links from other clusters may come and go.
    """
    if membership.model() is None:
        return "no worker has registered yet"
    view = membership.view()
    if not view.ready(Role.DECODE):
        return "no decode worker is ready"
    return no_usable_link_reason(view)


def no_usable_link_reason(view: ClusterView) -> str | None:
    """Why no prefill worker can ship to a decode worker of its cluster; None if one can, or there are no such two."""
    pairs = [
        (prefill, decode)
        for prefill in view.ready(Role.PREFILL)
        for decode in view.ready(Role.DECODE)
        if prefill.cluster_id == decode.cluster_id
    ]
    if not pairs or any(view.can_ship(prefill, decode) for prefill, decode in pairs):
        return None
    links = (view.link(prefill.worker_id, decode.worker_id) for prefill, decode in pairs)
    said = [f"{link.from_worker} to {link.to_worker}: {link.reason}" for link in links if link is not None]
    return f"no link between a prefill and a decode worker can be used: {'; '.join(said[:_MAX_REASONS])}"
