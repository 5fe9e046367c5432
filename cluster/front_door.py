"""What do the front doors need of the gateway behind them? ``Router`` and ``Membership`` are what they get.

The doors (gRPC and HTTP) speak protocols and text; they decide nothing about placement. These Protocols keep them
testable against a scripted router, and are the whole list of what they may call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from enum import StrEnum
from typing import Protocol

from cluster.view import ClusterView, ModelInfo
from core.request import GenerateRequest, OutputChunk, RequestId, Role


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


class ClusterMembership(Protocol):
    """Knows the workers."""

    def view(self) -> ClusterView: ...

    def model(self) -> ModelInfo | None:
        """The served model; None until a worker has registered."""
        ...


def not_ready_reason(membership: ClusterMembership) -> str | None:
    """Why no request can be served now; None when requests can be.

    A prefill worker is not asked for: without one, decode workers prefill for themselves.
    """
    if membership.model() is None:
        return "no worker has registered yet"
    return None if membership.view().ready(Role.DECODE) else "no decode worker is ready"
