"""What a benchmark started must end with it, also when somebody ends the benchmark."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: what the process gets when its parent ends


def exit_on_sigterm() -> None:
    """From now on SIGTERM (of ``timeout``, of a supervisor) unwinds the main thread, so that ``with`` blocks end."""
    signal.signal(signal.SIGTERM, _exit)


def end_with_parent(number: signal.Signals) -> None:
    """From now on this process gets that signal when its parent ends, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _exit(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
