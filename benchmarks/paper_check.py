"""What is a checked number? Its source, what was printed, what we compute, and whether the two agree.

A printed number stands for every number that rounds to it, so a check's tolerance is 1.5 % or half a unit of the last
printed digit, whichever is more; a check may state another one with its reason. Tolerances are stated with the printed
number, before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 0.015
WITHIN, OUTSIDE, NOT_CHECKED = "within", "outside", "not checked"


@dataclass(frozen=True)
class Check:
    """One number. ``computed`` None: it cannot be checked here, and ``note`` says why."""

    name: str
    source: str  # paper, and table, section or equation
    printed: str  # as the source prints it, without its unit
    computed: float | None
    unit: str = ""
    scale: float = 1.0  # the printed number times this is in the unit of ``computed``
    tolerance: float | None = None
    note: str = ""

    @property
    def expected(self) -> float:
        """The printed number in the unit of ``computed``."""
        return float(self.printed.replace(",", "")) * self.scale

    @property
    def allowed(self) -> float:
        """The largest relative error that agrees."""
        if self.tolerance is not None:
            return self.tolerance
        decimals = len(self.printed.partition(".")[2])
        half_unit = 0.5 * 10.0**-decimals * self.scale
        return max(TOLERANCE, half_unit / abs(self.expected))

    @property
    def relative_error(self) -> float | None:
        """(computed - expected) / expected."""
        return None if self.computed is None else (self.computed - self.expected) / self.expected

    @property
    def verdict(self) -> str:
        """Does it agree?"""
        error = self.relative_error
        if error is None:
            return NOT_CHECKED
        return WITHIN if abs(error) <= self.allowed * (1 + 1e-9) else OUTSIDE
