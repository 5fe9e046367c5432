"""What did a client see of one request? The numbers from which everything else is computed, one JSON line each.

Every instant is taken on the load generator's own clock. ``due_at`` and ``sent_at`` count from the run's beginning,
``chunk_s`` and ``ended_s`` from the sending. A chunk is one message of the stream that brought output: text, or token
ids; a message that brings neither (a role, usage, the end of a stream) is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from core.errors import InvalidConfig

# Who counted the output tokens: the server, the protocol (it carries ids), the model's tokenizer, or nobody: one token
# for each chunk is assumed.
USAGE, TOKEN_IDS, TOKENIZER, CHUNKS = "usage", "token_ids", "tokenizer", "chunks"

MEASURED, WARM_UP = "measured", "warm-up"


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One request, when it has ended. Seconds and tokens; None is what nobody said."""

    number: int
    conversation: int
    turn: int
    due_at: float  # when the schedule wanted it sent
    sent_at: float
    asked_input_tokens: int
    asked_output_tokens: int
    chunk_s: tuple[float, ...]  # when each chunk came
    ended_s: float  # when the last output came, or the failure
    output_tokens: int
    counted_by: str
    prompt_tokens: int | None = None  # as the server counted
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # kind of the failure: an HTTP status, a gRPC status, or what went wrong
    error_message: str | None = None
    phase: str = MEASURED
    held_s: float = 0.0  # waited at its instant because --max-concurrency requests were under way
    timing: Mapping[str, Any] | None = None  # a prfaas server's own breakdown, of the first continuation

    @property
    def ok(self) -> bool:
        """Did it finish, with output?"""
        return self.error is None

    @property
    def late_s(self) -> float:
        """How long after its instant it was sent, but for what it was held back on purpose."""
        return max(0.0, self.sent_at - self.due_at - self.held_s)

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first chunk."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def ttst_s(self) -> float | None:
        """From the first chunk to the second: a stall between prefill and decode lies here."""
        return self.chunk_s[1] - self.chunk_s[0] if len(self.chunk_s) > 1 else None

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); None of a single token."""
        if not self.ok or not self.chunk_s or self.output_tokens < 2:
            return None
        return (self.ended_s - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """The gaps between chunks; several tokens in one chunk make one gap."""
        return tuple(later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False))

    @property
    def tbt_s(self) -> float | None:
        """Mean of the longest tenth of the gaps, at least one (Mooncake's TBT)."""
        gaps = sorted(self.itl_s, reverse=True)
        longest = gaps[: max(1, len(gaps) // 10)]
        return sum(longest) / len(longest) if longest else None

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last output; None of a failure."""
        return self.ended_s if self.ok else None

    def as_dict(self) -> dict[str, Any]:
        """As a JSON object, with what is computed from it for whoever reads the file without us."""
        computed = {"ttft_s": self.ttft_s, "ttst_s": self.ttst_s, "tpot_s": self.tpot_s, "late_s": self.late_s}
        return asdict(self) | computed

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> ClientRecord:
        """The inverse of ``as_dict``; ``InvalidConfig`` naming ``where`` and the field."""
        known = {field.name for field in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        try:
            kept["chunk_s"] = tuple(map(float, kept["chunk_s"]))
            return cls(**kept)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidConfig(where, f"is no line of --records: {error}") from error
