"""What did one simulated request see? The numbers of its client, as a load generator would note them."""

from __future__ import annotations

from dataclasses import dataclass

from core.request import RequestTiming, Slo

OK = "ok"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, when it has ended. Instants are seconds since the workload's beginning."""

    number: int
    arrived_at: float
    input_tokens: int
    output_tokens: int  # that came
    outcome: str  # ``ok`` or the class of the error
    ttft_s: float | None  # None: no token came
    total_s: float
    slo: Slo
    timing: RequestTiming | None  # None: it did not finish

    @property
    def ok(self) -> bool:
        """Did it finish?"""
        return self.outcome == OK

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens after the first; None of a single token, or if it did not finish."""
        if not self.ok or self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.output_tokens - 1)

    def meets(self, ttft_s: float | None, tpot_s: float | None) -> bool:
        """Did it finish within the limits? Its own go before these; None: no limit."""
        limits = (self.slo.ttft_s or ttft_s, self.slo.tpot_s or tpot_s)
        seen = (self.ttft_s, self.tpot_s)
        return self.ok and all(
            limit is None or value is None or value <= limit for limit, value in zip(limits, seen, strict=True)
        )
