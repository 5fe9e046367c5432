"""Which log line is about which request? The fields that such a line carries, and the logger of finished ones."""

from __future__ import annotations

import logging

from core.request import RequestId, SequenceId

REQUESTS = logging.getLogger("prfaas.requests")


def about(sequence_id: SequenceId) -> dict[str, str]:
    """``extra`` of a line about a sequence: its name, and the client's name for its request."""
    return {"request_id": request_of(sequence_id), "sequence_id": sequence_id}


def request_of(sequence_id: SequenceId) -> RequestId:
    """The client's name for the request of a sequence that a gateway named: gateway/number/REQUEST/index.attempt."""
    parts = sequence_id.split("/", 2)
    return RequestId(parts[2].rpartition("/")[0] if len(parts) == 3 else sequence_id)
