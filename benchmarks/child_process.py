"""How does a benchmark drive a process of its own, perhaps in another network namespace? Calls over a socket pair.

The benchmark sends ``(method, arguments)``, the child answers ``(True, result)`` or ``(False, reason)``. Invariants: a
child ends with its parent, also while it is stopped and however the parent ended; a call that returns nothing in time
fails; what is sent are values of types that both import, never of the child's ``__main__``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.orderly_exit import end_with_parent

Wrap = Callable[[Sequence[str]], list[str]]  # a command |-> the same within a namespace

_ROOT = Path(__file__).resolve().parent.parent


class CallFailed(Exception):
    """The child said why it could not do what it was asked."""


class ChildBroken(CallFailed):
    """The child ended or did not answer; it is of no more use."""


class ChildProcess:
    """``python -m MODULE CONTROL_FD ARGUMENTS...``, inside what ``wrap`` makes of the command."""

    def __init__(
        self,
        wrap: Wrap,
        module: str,
        arguments: Sequence[str] = (),
        *,
        fds: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """``fds`` are inherited; ``variables`` join the environment."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                wrap([sys.executable, "-m", module, str(theirs.fileno()), *arguments]),
                cwd=_ROOT,
                env={**os.environ, **(variables or {})},
                pass_fds=(theirs.fileno(), *fds),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._control = Connection(ours.detach())

    @property
    def process_id(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any, timeout_s: float = 100.0) -> Any:
        """What the method returned. Raises CallFailed with its reason, ChildBroken when none came."""
        try:
            self._control.send((method, arguments))
            if not self._control.poll(timeout_s):
                raise ChildBroken(f"{method} has not returned after {timeout_s:.0f} s")
            ok, result = self._control.recv()
        except (EOFError, OSError) as error:
            raise ChildBroken(f"the process ended in {method}: exit code {self._process.poll()}") from error
        if not ok:
            raise CallFailed(result)
        return result

    def signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


def answer_calls(control_fd: int, target: object) -> None:
    """In the child: call ``target``'s methods until the parent closes the socket."""
    end_with_parent(signal.SIGKILL)
    control = Connection(control_fd)
    while True:
        try:
            method, arguments = control.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = True, getattr(target, method)(*arguments)
        except Exception as error:  # whatever went wrong is the call's result
            answer = False, f"{type(error).__name__}: {error}"
        control.send(answer)
