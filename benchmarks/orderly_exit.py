"""What a benchmark started must end with it, also when somebody ends the benchmark."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def exit_on_sigterm() -> None:
    """From now on SIGTERM (of ``timeout``, of a supervisor) unwinds the main thread, so that ``with`` blocks end."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
