"""What is told of requests that have ended, one by one? The latest of them for people to look at, and a log line each.

Bounded, and without prompts and answers: a request is its name, its tenant's label, counts and seconds.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict

from cluster.metrics import RequestRecord
from core.request_log import REQUESTS

MAX_KEPT = 200


class RecentRequests:
    """The latest requests that have ended. One event loop."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=max_kept)

    def observe(self, record: RequestRecord) -> None:
        """A ``RequestWatcher``."""
        self._records.append(record)

    def latest(self, limit: int = 0) -> tuple[RequestRecord, ...]:
        """The latest first; ``limit`` 0: all that are kept."""
        newest_first = tuple(reversed(self._records))
        return newest_first[:limit] if limit else newest_first


class RequestLog:
    """A line for each request that has ended, if ``log_requests`` wants them."""

    def observe(self, record: RequestRecord) -> None:
        """A ``RequestWatcher``."""
        if not REQUESTS.isEnabledFor(logging.INFO):
            return
        ttft = "no token" if record.ttft_s is None else f"first token after {record.ttft_s:.3f} s"
        REQUESTS.info(
            "request %s: %s after %.3f s, %s",
            record.request_id,
            record.outcome,
            record.e2e_s,
            ttft,
            extra=_fields(record),
        )


def _fields(record: RequestRecord) -> dict[str, object]:
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "door": record.door.value,
        "outcome": record.outcome.value,
        "tenant": record.tenant,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "generated_tokens": record.generated_tokens,
        "e2e_s": record.e2e_s,
        "ttft_s": record.ttft_s,
    }
    if record.trace is not None:
        fields["trace_id"] = record.trace.trace_id
    if record.timings:  # of the first continuation: the others' are in the workers' lines
        timing = record.timings[0]
        fields |= {
            "prefill_worker": timing.prefill_worker,
            "decode_worker": timing.decode_worker,
            "route_reason": timing.route_reason,
            "num_attempts": timing.num_attempts,
            "ttft_parts": None if timing.ttft_parts is None else asdict(timing.ttft_parts),
            "ttst_parts": None if timing.ttst_parts is None else asdict(timing.ttst_parts),
        }
    return fields
