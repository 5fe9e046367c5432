"""How does a short step with prompts start its kernels without waiting for Python? As graphs between its attentions.

Launching an 8B model layer by layer takes the host 20 to 50 ms, whatever the layers hold, and twice that beside a busy
thread of the same process; a GPU computes 500 tokens in 14. Attention depends on a step's sequences in more ways than
a graph can hold, so the step's own ``StepAttention`` launches it as ever. What lies between two attentions is a
*piece*, one CUDA graph, captured for some numbers of tokens.

A step of n tokens runs in the smallest size that holds it. Rows behind the n-th are computed and read by nobody:
attention and pages get the first n. All rows must be computed independently of each other, which products, norms and
routers do, and quantised products that choose one scale for all rows do not (``runner_setup`` leaves those out).

Pieces read and write memory that stays where it is: numbers of tokens, and query, key, value and output of the
attention that follows, which all layers of one shape share. What they keep within is shared by all sizes. So one step
at a time runs here; another that is run between two layers of it is launched layer by layer.

``record`` off, the same rows are computed without graphs, on any device.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import Progress

from engine.attention import AttentionBackend, AttentionOptions, StepAttention
from engine.step_packing import PackedStep, fill_pending
from engine.uploads import upload

logger = logging.getLogger(__name__)


class Forward(Protocol):
    """Runs the model."""

    def __call__(
        self,
        token_ids: torch.Tensor,  # [1, n]
        positions: torch.Tensor,  # [1, n]
        wanted: torch.Tensor,  # [m]
        attention: StepAttention,
        on_layer_stored: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Logits [m, vocab]."""
        ...


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Ascending: every 32 tokens up to 512, every 64 up to 2,048, every 256 beyond. The last is ``max_tokens``."""
    sizes = [*range(32, 512, 32), *range(512, 2048, 64), *range(2048, max_tokens, 256)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)


class PromptGraphs:
    """Graphs for steps of up to ``sizes[-1]`` tokens in up to ``max_batch_size`` sequences."""

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        sizes: Sequence[int],
        max_batch_size: int,
        *,
        record: bool = True,
    ) -> None:
        """Capture them all. Nothing is written to pages."""
        self.sizes = tuple(sorted(sizes))
        self._forward = forward
        self._device = device
        self._max_batch_size = max_batch_size
        self._is_running = False
        self._rows = _Rows(self.sizes[-1], device)
        self._logits: torch.Tensor | None = None  # of most sequences; others write to its first rows
        self._memory = torch.cuda.graph_pool_handle() if record else None
        self._steps: dict[int, _Step] = {}
        self._stream = _own_stream(device) if record else None  # one for all: cuBLAS keeps memory for each
        free_before = torch.cuda.mem_get_info(device)[0] if record else 0
        with Progress(disable=not sys.stderr.isatty(), transient=True) as progress, torch.inference_mode():
            task = progress.add_task("CUDA graphs for prompts", total=len(self.sizes))
            for size in reversed(self.sizes):  # the largest first: the others fit the memory that it took
                step = self._steps[size] = _Step(size, min(size, max_batch_size), device)
                if record or self._logits is None:  # it compiles and loads kernels, which a capture must not
                    self._compute(step, _Recorder(self._rows, None))
                if record:
                    self._capture(step)
                progress.advance(task)
        if record:
            taken = free_before - torch.cuda.mem_get_info(device)[0]
            logger.info("graphs for prompts of %d sizes took %.2f GiB", len(self.sizes), taken / (1 << 30))

    def run(
        self,
        packed: PackedStep,
        previous: torch.Tensor | None,
        backend: AttentionBackend,
        on_layer_stored: Callable[[int], None] | None,
    ) -> torch.Tensor | None:
        """Logits of the wanted rows; None if no size holds the step, or a step is running here. They are overwritten by
        the next step."""
        count, num_wanted = len(packed.token_ids), len(packed.wanted)
        size = next((size for size in self.sizes if size >= count), None)
        if self._is_running or size is None or num_wanted > min(size, self._max_batch_size):
            return None
        step = self._steps[size]
        step.fill(packed, previous)
        attention = backend.prepare(packed.segments)
        self._is_running = True
        try:
            if step.pieces:
                self._replay(step, count, attention, on_layer_stored)
            else:
                self._compute(step, _FirstRows(attention, count, self._rows), on_layer_stored)
        finally:
            self._is_running = False
        assert self._logits is not None, "made by the first"
        return self._logits[:num_wanted]

    def _replay(
        self,
        step: _Step,
        count: int,
        attention: StepAttention,
        on_layer_stored: Callable[[int], None] | None,
    ) -> None:
        *between, last = step.pieces
        for piece, call in zip(between, step.calls, strict=True):
            piece.replay()
            attention.store(call.index, call.key[:count], call.value[:count])
            if on_layer_stored is not None:
                on_layer_stored(call.index)
            call.output[:count].copy_(attention.attend(call.index, call.query[:count], call.options))
        last.replay()

    def _compute(
        self, step: _Step, attention: StepAttention, on_layer_stored: Callable[[int], None] | None = None
    ) -> None:
        logits = self._forward(step.token_ids, step.positions, step.wanted, attention, on_layer_stored)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits[: len(logits)].copy_(logits)

    def _capture(self, step: _Step) -> None:
        recorder = _Recorder(self._rows, self._memory)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            recorder.begin()
            try:
                self._compute(step, recorder)
            except BaseException:
                with suppress(RuntimeError):  # that the capture is void is known
                    recorder.end()
                raise
            recorder.end()
        step.pieces, step.calls = tuple(recorder.pieces), tuple(recorder.calls)


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which steps are computed, whose priority a graph keeps; another one where that is the default stream,
    on which nothing can be captured. ``torch.cuda.graph``, which has one, cannot end in the middle of a model."""
    current = torch.cuda.current_stream(device)
    return torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current


class _Step:
    """One size: its inputs, and once they are recorded its pieces and the attentions between them."""

    def __init__(self, size: int, num_wanted: int, device: torch.device) -> None:
        # One memory for all three, as for decode graphs.
        self._numbers = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions = self._numbers[:1], self._numbers[1:2]
        self.wanted = self._numbers[2, :num_wanted]
        self.pieces: tuple[torch.cuda.CUDAGraph, ...] = ()
        self.calls: tuple[_Call, ...] = ()

    def fill(self, packed: PackedStep, previous: torch.Tensor | None) -> None:
        numbers = np.zeros(self._numbers.shape, np.int64)
        for row, values in zip(numbers, (packed.token_ids, packed.positions, packed.wanted), strict=True):
            row[: len(values)] = values
        self._numbers.copy_(upload(numbers, torch.int64, self._numbers.device, keep=True), non_blocking=True)
        fill_pending(self._numbers[0], packed, previous)


@dataclass(frozen=True, slots=True)
class _Call:
    """An attention between two pieces: what it is called with, and where its output is expected. [size, heads, dim]"""

    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    options: AttentionOptions


class _Rows:
    """Memory for rows that pass between pieces and attention, one for each use and shape; all layers share it."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._device = device
        self._tensors: dict[tuple[str, int, int, torch.dtype], torch.Tensor] = {}

    def get(self, use: str, rows: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, heads, dim]; zeros when it is first asked for."""
        key = (use, heads, dim, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(self._num_rows, heads, dim, dtype=dtype, device=self._device)
        return self._tensors[key][:rows]

    def keep(self, use: str, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``values`` [rows, heads, dim] there."""
        rows, heads, dim = values.shape
        return self.get(use, rows, heads, dim, values.dtype).copy_(values)

    def output(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Where the attention of ``query`` is expected."""
        return self.get("output", query.shape[0], query.shape[1], value.shape[2], query.dtype)


class _Recorder:
    """In a step's place while a size is tried and captured: notes each attention, and ends a piece there."""

    def __init__(self, rows: _Rows, memory: Any) -> None:
        """``memory``: torch's handle of a graph pool; None: nothing is captured."""
        self.pieces: list[torch.cuda.CUDAGraph] = []
        self.calls: list[_Call] = []
        self._rows = rows
        self._memory = memory
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self) -> None:
        """A piece."""
        self.pieces.append(torch.cuda.CUDAGraph())
        self.pieces[-1].capture_begin(pool=self._memory)

    def end(self) -> None:
        """The latest piece."""
        self.pieces[-1].capture_end()

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._stored = self._rows.keep("key", key), self._rows.keep("value", value)

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        assert self._stored is not None, "store comes first"
        key, value = self._stored
        output = self._rows.output(query, value)
        self.calls.append(_Call(index, self._rows.keep("query", query), key, value, output, options))
        if self._memory is not None:
            self.end()
            self.begin()
        return output


class _FirstRows:
    """A step's attention, for a model that computes more rows than the step has."""

    def __init__(self, step: StepAttention, count: int, rows: _Rows) -> None:
        self._step = step
        self._count = count
        self._rows = rows
        self._value: torch.Tensor | None = None

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._value = value
        self._step.store(index, key[: self._count], value[: self._count])

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        assert self._value is not None, "store comes first"
        output = self._rows.output(query, self._value)
        output[: self._count].copy_(self._step.attend(index, query[: self._count], options))
        return output
