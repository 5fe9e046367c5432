"""What must each end of an arm be able to do?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

MOVE_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Moved:
    """One repetition, as the end that moved the bytes saw it."""

    seconds: float
    num_bytes: int  # that arrived: of the pool, whatever a codec made of them on the way
    path: str  # what carried them


class End(Protocol):
    """One end of one arm."""

    def greet(self) -> Any:
        """What the other end needs to reach this one; picklable."""
        ...

    def meet(self, greeting: Any) -> None:
        """The other end's greeting."""
        ...

    def expect(self, session: str, pages: tuple[int, ...]) -> Any:
        """Prepare to take ``pages``; what the other end's ``move`` is to be told."""
        ...

    def move(self, session: str, pages: tuple[int, ...], offer: Any) -> Moved:
        """Move ``pages`` to what the other end expects."""
        ...

    def close(self) -> None: ...
