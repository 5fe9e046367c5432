"""Who calls the engine? One thread: it computes steps while there is work and runs what others submit in between.

    any thread ──submit(fn)──> queue ──between steps──> fn(engine) ──> Future
    engine thread: [fn fn] step [fn] step step ... (nothing to do: asleep until the next submit or stop)

With ``engine.prefill_order: slack`` calls are also run between two layers of a step, and prompts that cannot wait for
its end are computed there. With ``engine.colocated_mode: layered`` or ``partitioned`` decoding goes on there.

Workers that share cores compute in turns (turns.py): then each step waits for its turn, and what is submitted does not.

Invariants:
- The engine is touched by this thread only, so it needs no locks. It is made by this thread too: OpenMP keeps a pool of
  threads for each thread that ever computed, and once there are more of them than cores it stops to spin at barriers
  and sleeps instead (libgomp), which cost a decode step of one token 54 ms instead of 33 on two cores.
- What is submitted runs in the order in which it came, and before the next step, at the latest.
- The thread never ends silently. What a model can do wrong, the engine itself turns into failures; if ``step`` raises
  nevertheless, the engine's books are wrong: the thread logs it, fails what is submitted and calls ``on_death``, so
  that the process can end and be started anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from core.errors import SequenceFailed
from engine.engine import Engine, StepOutput
from engine.turns import NoTurns, Turns

logger = logging.getLogger(__name__)

T = TypeVar("T")

TURN_POLL_S = 0.001  # steps on shared cores take tens of milliseconds


class EngineThread:
    """Makes an engine and runs it. ``on_output`` gets every step's output that is not empty, on the engine's thread.

    ``on_death`` is called at most once, on that thread or on that of ``abandon``, with what ended it.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_output: Callable[[StepOutput], None],
        on_death: Callable[[Exception], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._made: Future[Engine] = Future()
        self._make_engine = make_engine
        self._on_output = on_output
        self._on_death = on_death
        self._turns = turns or NoTurns()
        self._condition = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._ended: SequenceFailed | None = None  # why nothing can be submitted any more
        self._death_told = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """True between ``start`` and the end of the thread."""
        return self._thread.is_alive()

    def start(self) -> Engine:
        """Make the engine, which may take a while, and begin to compute. Once only; raises what making it raised."""
        self._thread.start()
        return self._made.result()

    def stop(self, timeout_s: float | None = None) -> bool:
        """End after the step under way, whatever is queued; False if that took longer than ``timeout_s``.

        Calls that did not run, and later ones, fail with ``SequenceFailed``. Must not be called by the thread itself.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        else:
            self._end("the engine was stopped before it started")
        return not self._thread.is_alive()

    def abandon(self, error: Exception) -> None:
        """What the engine computes with is gone, and its thread may wait for that for ever: as if the thread had died.

        ``start`` raises ``error`` if the engine is not made yet; else ``on_death`` is called. From any thread.
        """
        self._end(f"the engine was given up: {error}")
        if not self._settle_made(None, error):
            self._die(error)

    def submit(self, fn: Callable[[Engine], T]) -> Future[T]:
        """Run ``fn(engine)`` between two steps. The future holds its result, its exception, or ``SequenceFailed``
        (retryable) if the engine has ended; cancelling the future before its turn skips the call."""
        future: Future[T] = Future()
        with self._condition:
            if self._ended is not None:
                future.set_exception(self._ended)
                return future
            self._calls.append(lambda: self._settle(future, fn))
            self._condition.notify()
        return future

    def _settle(self, future: Future[T], fn: Callable[[Engine], T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self._ended is not None:
            future.set_exception(self._ended)
            return
        try:
            result = fn(self._made.result())
        except Exception as error:  # it belongs to whoever submitted
            future.set_exception(error)
        else:
            future.set_result(result)

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except Exception as error:  # it belongs to whoever started the thread
            self._end(f"the engine was not made: {error}")
            self._settle_made(None, error)
            return
        engine.between_layers = lambda: self._between_layers(engine)
        engine.wake = self._look_again
        if self._settle_made(engine, None):
            self._compute(engine)

    def _settle_made(self, engine: Engine | None, error: Exception | None) -> bool:
        """What ``start`` returns or raises; False: it has done so."""
        with self._condition:
            if self._made.done():
                return False
            if engine is not None:
                self._made.set_result(engine)
            else:
                self._made.set_exception(error)
            return True

    def _die(self, error: Exception) -> None:
        with self._condition:
            told, self._death_told = self._death_told, True
        if not told and self._on_death is not None:
            self._on_death(error)

    def _compute(self, engine: Engine) -> None:
        try:
            while self._wait_for_work(engine):
                self._run_calls()
                if engine.has_work:
                    self._step_in_turn(engine)
            self._end("the engine has stopped")
        except Exception as error:  # a bug of ours: see the module's last rule
            logger.critical("the engine thread died", exc_info=error)
            self._end(f"the engine died: {type(error).__name__}: {error}")
            self._die(error)

    def _step_in_turn(self, engine: Engine) -> None:
        """One step, when it is this worker's turn; until then calls are served as they come."""
        try:
            while not self._turns.try_take():
                if self._stopping or not engine.has_work:
                    return
                with self._condition:
                    self._condition.wait_for(lambda: self._stopping or self._calls, timeout=TURN_POLL_S)
                self._run_calls()
            output = engine.step()
        finally:
            self._turns.give_back()
        self._publish(output)

    def _look_again(self) -> None:
        """The engine may have work now."""
        with self._condition:
            self._condition.notify()

    def _between_layers(self, engine: Engine) -> None:
        """Whoever came meanwhile may be urgent, and decoding may be due."""
        if self._calls:
            self._run_calls()
        self._publish(engine.step_between())

    def _wait_for_work(self, engine: Engine) -> bool:
        """Block until there is something to do; False: it is time to end."""
        with self._condition:
            self._condition.wait_for(lambda: self._stopping or self._calls or engine.has_work)
            return not self._stopping

    def _run_calls(self) -> None:
        with self._condition:
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()

    def _publish(self, output: StepOutput) -> None:
        if not output.chunks and not output.failures:
            return
        try:
            self._on_output(output)
        except Exception:
            # The step is booked already; its tokens are lost to the listener, other sequences need not be.
            logger.exception("the listener failed on %d chunks", len(output.chunks))

    def _end(self, reason: str) -> None:
        """Fail every call that waits, and every later one."""
        with self._condition:
            self._ended = self._ended or SequenceFailed(reason, retryable=True)
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()
