"""Which tokens may each sequence of a step be given? Masks of those whose output has to obey a grammar.

What a sequence has matched is determined by its grammar and its output, so nothing has to be told when one begins,
ends, is preempted, or comes from another worker: the matcher that is kept for it is brought up to its output, and one
that is missing is made anew from all of it. That costs a few microseconds a token.

Where the next step is launched before this one's tokens are known to the host (``engine.plan_ahead``), a mask needs the
token that is still being sampled. The step's layers are launched by then, so the device computes them while the host
waits for that token and makes the mask: nobody loses time by it, unless the masks take longer than the layers.

A mask's cost is bounded by fuel (grammar.py). Should one take ``timeout_s`` all the same, its sequence fails and the
step goes on without it; the thread that computes it is left alone, and the grammar is not tried again.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from core.clock import Clock
from core.errors import InvalidRequest
from core.grammar import Grammar
from core.request import SequenceId
from engine.grammar import CompiledGrammar, GrammarCompiler, Matcher
from engine.step_plan import StepItem

_TIMEOUT_S = 1.0
_FEW = 8  # masks that one thread makes sooner than two would
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Masks:
    """``bits`` [len(rows), words]: those of the rows in ``rows``; rows in ``failed`` have none: why not."""

    rows: tuple[int, ...]
    bits: NDArray[np.int32]
    failed: Mapping[int, str]


@dataclass(slots=True)
class _Followed:
    grammar: Grammar
    compiled: CompiledGrammar
    matcher: Matcher


class TokenMasks:
    """Follows the sequences of one engine, on its thread."""

    def __init__(
        self, compiler: GrammarCompiler, num_followed: int, clock: Clock, timeout_s: float = _TIMEOUT_S
    ) -> None:
        """``num_followed``: sequences whose matchers are kept; the batch's size and some that are preempted."""
        self._clock = clock
        self.seconds = 0.0  # spent on masks so far, waits for pending tokens included
        self.compiler = compiler
        self._num_followed = num_followed
        self._timeout_s = timeout_s
        self._followed: OrderedDict[SequenceId, _Followed] = OrderedDict()  # used last, last
        self._workers: list[_Worker] = []
        self.num_timeouts = 0

    def masks(self, items: Sequence[StepItem], pending: Callable[[], Sequence[int]]) -> Masks | None:
        """Those of a step's sampling items; None if no grammar is in it. ``pending``: the tokens of the step before,
        which it waits for; asked only if an item needs one."""
        rows = [row for row, item in enumerate(items) if item.sampling.grammar is not None]
        if not rows:
            return None
        began_at = self._clock.now()
        try:
            return self._masks(items, rows, pending)
        finally:
            self.seconds += self._clock.now() - began_at

    def _masks(self, items: Sequence[StepItem], rows: list[int], pending: Callable[[], Sequence[int]]) -> Masks:
        failed: dict[int, str] = {}
        bits = np.zeros((len(rows), self.compiler.mask_words), np.int32)
        jobs: list[_Job] = []
        for index, row in enumerate(rows):
            item = items[row]
            try:
                followed = self._follow(item)
            except InvalidRequest as error:
                failed[row] = error.message
                continue
            if followed.compiled.too_slow:
                failed[row] = self._slow()
                continue
            output = item.known_token_ids[item.num_prompt_tokens + followed.matcher.num_tokens :].tolist()
            if item.pending_row is not None:
                output.append(pending()[item.pending_row])
            jobs.append(_Job(row, item.sequence_id, followed, output, bits[index]))
        self._run(jobs)
        for job in jobs:
            if not job.done:
                job.followed.compiled.too_slow = True
                self._followed.pop(job.sequence_id, None)  # its matcher is in use, perhaps for ever
                self.num_timeouts += 1
                failed[job.row] = self._slow()
            elif job.followed.matcher.error:
                failed[job.row] = job.followed.matcher.error
        if failed:
            kept = [index for index, row in enumerate(rows) if row not in failed]
            rows, bits = [rows[index] for index in kept], bits[kept]
        return Masks(tuple(rows), bits, failed)

    def _follow(self, item: StepItem) -> _Followed:
        grammar = item.sampling.grammar
        assert grammar is not None, "the caller's condition"
        followed = self._followed.get(item.sequence_id)
        if followed is None or followed.grammar != grammar:
            # Whoever queued the sequence had it compiled and holds it; else this waits.
            compiled = self.compiler.compile(grammar).result()
            followed = self._followed[item.sequence_id] = _Followed(grammar, compiled, compiled.start())
            if len(self._followed) > self._num_followed:
                self._followed.popitem(last=False)
        self._followed.move_to_end(item.sequence_id)
        return followed

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Do them, on as many threads as are worth it, or give up those that take too long."""
        num_threads = max(1, min(len(jobs) // _FEW, os.cpu_count() or 1, _MAX_THREADS))
        while len(self._workers) < num_threads:
            self._workers.append(_Worker())
        shares = [jobs[first::num_threads] for first in range(num_threads)]
        busy = list(zip(self._workers, shares, strict=False))
        for worker, share in busy:
            worker.start(share)
        for worker, share in busy:
            while not worker.wait(self._timeout_s):
                # It is at the first that is not done; the others of its share go to a new thread.
                worker.given_up = True
                self._workers.remove(worker)
                left = [job for job in share if not job.done]
                share = left[1:]
                if not share:
                    break
                worker = _Worker()
                self._workers.append(worker)
                worker.start(share)

    def _slow(self) -> str:
        return f"its grammar took longer than {self._timeout_s:g} s for one token"


@dataclass(slots=True, eq=False)
class _Job:
    """One mask. ``done`` is written last, by the thread that makes it."""

    row: int
    sequence_id: SequenceId
    followed: _Followed
    output: Sequence[int]  # that the matcher has not seen
    bits: NDArray[np.int32]
    done: bool = False

    def run(self) -> None:
        matcher = self.followed.matcher
        try:
            matcher.advance(self.output)
            matcher.fill(self.bits)
        except BaseException as error:  # a panic of llguidance's is no Exception; it is this sequence's affair alone
            matcher.error = f"{type(error).__name__}: {error}"
        self.done = True


class _Worker:
    """A thread that does jobs, until the process ends or it was given up for one that hung."""

    def __init__(self) -> None:
        self.given_up = False
        self._shares: SimpleQueue[Sequence[_Job]] = SimpleQueue()
        self._ready = threading.Semaphore(0)
        threading.Thread(target=self._serve, name="token-masks", daemon=True).start()

    def start(self, share: Sequence[_Job]) -> None:
        self._shares.put(share)

    def wait(self, timeout_s: float) -> bool:
        """False: the share that was started is not done."""
        return self._ready.acquire(timeout=timeout_s)

    def _serve(self) -> None:
        while not self.given_up:
            for job in self._shares.get():
                job.run()
            self._ready.release()
