"""What do loads and prefills take on this engine? Measured here, fitted as the gateways fit what they are told.

Before a tier has loaded anything it is taken for as fast as it was measured at the start; before a prompt was computed,
the device for one that does what is usual of its kind. Fits are renewed when something was learnt, at most once in
``REFIT_S``, because they cost about a millisecond on the thread that computes.
"""

from __future__ import annotations

from collections.abc import Mapping

from core.cache_tiers import Tier
from core.clock import Clock
from core.compute import ComputeProfile, StepSample
from engine.cost_fit import Samples, fit
from engine.reload_choice import PrefillCost, TierSpeed

REFIT_S = 1.0
ASSUMED_T0_S = 1e-4  # of a load: a thread wakes up, kernels are launched
_FLOPS_PER_S = {"cpu": 2e11, "cuda": 4e14}  # sustained, of a device nothing is known of yet
_BYTES_PER_S = {"cpu": 2e10, "cuda": 2e12}
_LEAST = 1e-15  # a coefficient of 0 would stay 0 whatever is measured


class _Line:
    """Samples of one kind of work, and the coefficients that fit them."""

    def __init__(self, clock: Clock, prior: tuple[float, ...]) -> None:
        self._clock = clock
        self._prior = tuple(max(coefficient, _LEAST) for coefficient in prior)
        self._samples = Samples()
        self._learnt = False
        self._fitted_at = float("-inf")
        self._coefficients = self._prior

    def observe(self, features: tuple[float, ...], seconds: float) -> None:
        if seconds > 0:
            self._samples.add(features, seconds)
            self._learnt = True

    def coefficients(self) -> tuple[float, ...]:
        now = self._clock.now()
        if self._learnt and now - self._fitted_at >= REFIT_S:
            self._coefficients = fit(self._prior, self._samples)
            self._learnt, self._fitted_at = False, now
        return self._coefficients


class ReloadCosts:
    """The speeds of one engine's tiers and of its prefill. One thread."""

    def __init__(
        self, clock: Clock, profile: ComputeProfile, device: str, measured_bytes_per_s: Mapping[Tier, float]
    ) -> None:
        """``device``: torch's type of it. ``measured_bytes_per_s``: of each tier, at the start."""
        flops_per_s, bytes_per_s = _FLOPS_PER_S[device], _BYTES_PER_S[device]
        self._step_tokens = profile.step_tokens or 1 << 30
        prior = (
            profile.weight_bytes / bytes_per_s,
            profile.weight_flops / flops_per_s,
            profile.attention_flops / flops_per_s,
        )
        self._prefill = _Line(clock, prior)
        self._tiers = {tier: _Line(clock, (ASSUMED_T0_S, 1 / speed)) for tier, speed in measured_bytes_per_s.items()}

    def step(self, sample: StepSample) -> None:
        """A step was computed; those that held prompts alone tell something."""
        if sample.is_prefill:
            self._prefill.observe((1.0, float(sample.prefill_tokens), sample.prefill_pairs), sample.seconds)

    def load(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        """So many bytes were loaded from there, with nothing else being loaded."""
        if num_bytes > 0:
            self._tiers[tier].observe((1.0, float(num_bytes)), seconds)

    @property
    def prefill(self) -> PrefillCost:
        step_s, token_s, pair_s = self._prefill.coefficients()
        return PrefillCost(step_s, token_s, pair_s, self._step_tokens)

    @property
    def speeds(self) -> dict[Tier, TierSpeed]:
        """Of each tier."""
        found: dict[Tier, TierSpeed] = {}
        for tier, line in self._tiers.items():
            t0_s, byte_s = line.coefficients()
            found[tier] = TierSpeed(t0_s, 1 / max(byte_s, _LEAST))
        return found
