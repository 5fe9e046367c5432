"""How long will a step take on this engine? Learnt from its own steps, so that a scheduler can plan in seconds.

    seconds = once + (prompted, if it holds prompts) + token * prompt tokens + pair * pairs of them that attend
              + row * decoding sequences + context * their tokens
              and ``launch`` at least, if it holds prompts

The sum's shape is the cost model's (cluster/cost_model.py) for steps that hold prompts and decoding sequences alike;
there one gateway knows many workers, here one engine knows itself, from the first step on (step_trials.py).
``prompted`` is there because decoding alone may run other kernels.

``launch`` is what the host needs to launch a step with prompts, while a GPU computes what was launched before: layer by
layer, or attention by attention (prompt_graphs.py). Decoding alone may be one captured graph. A step that is computed
sooner waits for its host and says no more of the device than that, so it is no sample of the sum: taken for one, it
makes tokens look dear, and chunks are shorter than they need be until longer ones were seen. Only where the sum says
more than that, it is one.

Errors of a machine are relative, so every row is divided by its seconds. Steps of one size (kind and powers of two)
share a sum in which old ones fade: an hour of short prompts does not make it forget what a long one costs. A step that
took many times what was predicted counts less: a pause or a compiler tells nothing.

Invariants: no coefficient is below 0, so a prediction does not fall when a step holds more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from core.compute import StepSample
from engine.launch_pace import shortest_of_late

Floats = NDArray[np.float64]

FADING = 0.97  # of a step, when another one of its size is known
REFIT_AFTER = 16  # steps: solving takes a fraction of a millisecond
_TRUSTED = 3.0  # relative error up to which a step counts in full
_NUM = 6  # coefficients of the sum
# What the steps cannot tell apart is kept small; sooner than anything else what prompts take whatever their length.
_RIDGE = np.array([1e-6, 1e-3, 1e-6, 1e-6, 1e-6, 1e-6])
_NO_LIMIT = 1 << 40  # tokens
_WAITED = 1.1  # times what launching took: steps that took no longer waited for their host


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step. All at least 0."""

    once: float  # that any step takes: weights are read
    prompted: float  # that a step with prompts takes more
    token: float  # for each prompt token
    pair: float  # for each pair of tokens that attend, of prompts
    row: float  # for each decoding sequence
    context: float  # for each token of theirs
    launch: float = 0.0  # that a step with prompts takes at least; 0 where the host is the device

    def decode(self, batch: int, context_tokens: int) -> float:
        """Of a step that makes one token for each of ``batch`` sequences; without any: what every step takes."""
        return self.once + self.row * batch + self.context * context_tokens

    def prompts(self, num_tokens: int, num_pairs: float) -> float:
        """That more prompt tokens add to a step that holds some."""
        return self.token * num_tokens + self.pair * num_pairs

    def left(self, seconds: float, batch: int, context_tokens: int) -> float:
        """For prompts, of a step that is to take ``seconds``, beside decoding. If launching takes longer, a step takes
        that anyway, and so may what it holds."""
        return max(seconds, self.launch) - self.decode(batch, context_tokens) - self.prompted

    def fitting(self, seconds: float, start: int) -> int:
        """Tokens of a prompt, behind ``start`` earlier ones, that add at most ``seconds`` to a step."""
        if seconds <= 0:
            return 0
        each = self.token + self.pair * start
        # token n + pair n (start + n / 2) = seconds, solved so that nothing is lost where pair is tiny
        below = each + math.sqrt(each * each + 2 * self.pair * seconds)
        return min(_NO_LIMIT, int(2 * seconds / below)) if below > 2 * seconds / _NO_LIMIT else _NO_LIMIT


class StepClock:
    """Takes what steps took, says what the next ones will take. For one thread."""

    def __init__(self, samples: Iterable[tuple[StepSample, float]] = ()) -> None:
        """``samples``: what ``observe`` takes, to begin with."""
        self._sums: dict[tuple[int, ...], Floats] = {}  # size |-> [6, 7]: products of rows, and their sums
        self._launch_s = 0.0
        self._seconds: StepSeconds | None = None
        self._num_new = 0
        for sample, launch_s in samples:
            self.observe(sample, launch_s)

    @property
    def seconds(self) -> StepSeconds | None:
        """What is known now; None: no step was seen."""
        if self._num_new and (self._seconds is None or self._num_new >= REFIT_AFTER):
            sums = sum(self._sums.values(), np.zeros((_NUM, _NUM + 1)))
            self._seconds = replace(_solve(sums), launch=self._launch_s)
            self._num_new = 0
        return self._seconds

    def observe(self, step: StepSample, launch_s: float = 0.0) -> None:
        """A step that had the device to itself took so long. ``launch_s``: that the host took for launching it, part of
        it perhaps while the step before was computed; 0: not known, or the host is the device."""
        if not 0 < step.seconds < math.inf:
            return
        self._num_new += 1
        prompts = (float(step.prefill_tokens > 0), float(step.prefill_tokens), step.prefill_pairs)
        features = (1.0, *prompts, float(step.decode_batch), float(step.decode_context))
        known, predicted = self._seconds, 0.0
        if known is not None:
            predicted = known.decode(step.decode_batch, step.decode_context)
            predicted += known.prompted * features[1] + known.prompts(step.prefill_tokens, step.prefill_pairs)
        if step.prefill_tokens:
            if launch_s:
                # Not the mean: where many kernels wait to be computed, launching waits for the device.
                self._launch_s = shortest_of_late(self._launch_s, launch_s)
            if predicted <= step.seconds <= _WAITED * (launch_s or self._launch_s):
                return
        weight = 1.0
        if known is not None:
            weight = min(1.0, _TRUSTED / max(abs(step.seconds / max(predicted, 1e-9) - 1), 1e-9))
        row = np.array(features) / step.seconds
        own = weight * np.column_stack([np.outer(row, row), row])
        size = tuple(math.frexp(feature)[1] for feature in features[1:])
        self._sums[size] = own + FADING * self._sums[size] if size in self._sums else own


def _solve(sums: Floats) -> StepSeconds:
    """Least squares over coefficients >= 0: the best of all sets of zeros, the unbounded one first."""
    products, rights = sums[:, :_NUM], sums[:, _NUM]
    scale = np.sqrt(np.maximum(np.diag(products), 1e-300))
    scaled = products / np.outer(scale, scale) + np.diag(_RIDGE)
    wanted = rights / scale
    best, most = np.zeros(_NUM), 0.0
    for used in product((True, False), repeat=_NUM):
        some = np.array(used)
        if not some.any():
            continue
        tried = np.zeros(_NUM)
        tried[some] = np.linalg.solve(scaled[np.ix_(some, some)], wanted[some])
        gain = float(wanted @ tried)  # what this set explains
        if (tried >= 0).all() and gain > most:
            best, most = tried, gain
            if some.all():
                break  # the bound does not bind
    return StepSeconds(*(float(value) for value in best / scale))
