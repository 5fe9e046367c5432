"""How does a decode step start all its kernels at once? As a CUDA graph for each of some batch sizes.

They are captured at the start. A step of n sequences runs in the smallest graph that holds them. The places that are
left repeat one of the step's sequences, the cheapest (``PackedStep.repeated``): they compute the same token at the same
position and write the same bytes to the same slot, so no page has to be kept for them, and no backend needs to know of
padding.

Graphs read their inputs from memory that stays where it is: token ids, positions, wanted rows and what the backend's
``StaticAttention`` holds. ``record`` off, the same steps are computed without a graph, on any device.

Steps whose sequences share prefixes that are worth reading once run in graphs of their own, as their kernels are others
(``capture_cascade``); every other step runs in the graph that it would run in without those.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from engine.attention import AttentionBackend, CascadeAttention, Segment, StaticAttention, StepAttention
from engine.shared_prefixes import SharedPrefix
from engine.step_packing import PackedStep, fill_pending
from engine.uploads import upload

logger = logging.getLogger(__name__)

# (token ids [1, n], positions [1, n], wanted [n], attention) -> logits [n, vocab]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepAttention], torch.Tensor]

_WARM_UPS = 2  # the first call compiles, loads kernels and makes plans, which a capture must not


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Ascending: 1, 2, 4, then every 8 up to 64, every 16 up to 256, every 64 beyond; the last is the largest batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch_size, 64)]
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


class DecodeGraphs:
    """Graphs for batches of up to ``max_batch_size`` sequences."""

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        device: torch.device,
        max_batch_size: int,
        max_tokens: int,
        scratch_page: int,
        *,
        record: bool = True,
    ) -> None:
        """Capture them all, which writes to ``scratch_page``. Check ``buckets``: empty if the backend has no static
        attention for that many sequences of up to ``max_tokens`` tokens."""
        self._forward = forward
        self._device = device
        self._record = record
        self._logits: torch.Tensor | None = None  # of the largest batch; the others write to its first rows
        self._memory = torch.cuda.graph_pool_handle() if record else None
        self._backend = backend
        self._max_tokens = max_tokens
        self._scratch_page = scratch_page
        self._graphs = self._capture(batch_buckets(max_batch_size), "CUDA graphs for decode", self._plain)
        self._cascade: dict[int, _Graph] = {}
        self.buckets = tuple(sorted(self._graphs))

    def capture_cascade(self) -> bool:
        """Capture graphs for steps that read shared prefixes once, of two sequences and more. False: there are none, as
        the backend does not do that or no batch is so large."""
        sizes = [size for size in self.buckets if size > 1]
        self._cascade = self._capture(sizes, "CUDA graphs for shared prefixes", self._sharing)
        return bool(self._cascade)

    def run(self, packed: PackedStep, previous: torch.Tensor | None) -> torch.Tensor | None:
        """Logits of the wanted rows; None if no graph holds the step. They are overwritten by the next step."""
        num_sequences = len(packed.segments)
        if not packed.is_decode or not self.buckets or num_sequences > self.buckets[-1]:
            return None
        graphs = self._cascade if self.reads_once(packed) else self._graphs
        graph = graphs[self._bucket(num_sequences)]
        graph.fill(packed, previous)
        if graph.recorded is None:
            self._compute(graph)
        else:
            graph.recorded.replay()
        assert self._logits is not None, "made by the first"
        return self._logits[: len(packed.wanted)]

    def reads_once(self, packed: PackedStep) -> bool:
        """Whether ``run`` reads prefixes of this step once that its sequences share."""
        return bool(packed.shared) and self._bucket(len(packed.segments)) in self._cascade

    def _bucket(self, num_sequences: int) -> int:
        return next(size for size in self.buckets if size >= num_sequences)

    def _capture(self, sizes: Sequence[int], what: str, make: Callable[[int], _Graph | None]) -> dict[int, _Graph]:
        """Of each size that ``make`` has something for."""
        graphs: dict[int, _Graph] = {}
        with Progress(disable=not sys.stderr.isatty(), transient=True) as progress, torch.inference_mode():
            task = progress.add_task(what, total=len(sizes))
            for size in sorted(sizes, reverse=True):  # the largest first: the others fit the memory that it took
                graph = make(size)
                if graph is None:
                    break
                graphs[size] = self._captured(graph)
                progress.advance(task)
        return graphs

    def _plain(self, size: int) -> _Graph | None:
        attention = self._backend.allocate(size, self._max_tokens)
        if attention is None:
            return None
        attention.fill(self._scratch(size))
        return _Graph(size, attention, lambda packed: attention.fill(_repeated(packed, size)), self._device)

    def _sharing(self, size: int) -> _Graph | None:
        attention = self._backend.allocate_cascade(size, self._max_tokens)
        if attention is None:
            return None
        attention.fill(self._scratch(size), ())

        def fill(packed: PackedStep) -> None:
            attention.fill(_repeated(packed, size), _stretched(packed, size))

        return _Graph(size, attention, fill, self._device)

    def _scratch(self, size: int) -> Sequence[Segment]:
        return [Segment(0, 1, (self._scratch_page,))] * size

    def _captured(self, graph: _Graph) -> _Graph:
        for _ in range(_WARM_UPS):
            self._compute(graph)
        if self._record:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded, pool=self._memory, stream=_capture_stream()):
                self._compute(graph)
            graph.recorded = recorded
        return graph

    def _compute(self, graph: _Graph) -> None:
        logits = self._forward(graph.token_ids, graph.positions, graph.wanted, graph.attention)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits[: len(logits)].copy_(logits)


def _capture_stream() -> torch.cuda.Stream | None:
    """The one on which steps are computed, whose priority a graph keeps; None: torch's, where that is the default one,
    on which nothing can be captured."""
    current = torch.cuda.current_stream()
    return None if current == torch.cuda.default_stream() else current


class _Graph:
    """One batch size: its inputs, and the graph once it is recorded."""

    def __init__(
        self,
        size: int,
        attention: StaticAttention | CascadeAttention,
        fill_attention: Callable[[PackedStep], None],
        device: torch.device,
    ) -> None:
        self.size = size
        self.attention = attention
        self._fill_attention = fill_attention
        # One memory for all three: each copy between two graphs is time in which the GPU does little.
        self._numbers = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.wanted = self._numbers[:1], self._numbers[1:2], self._numbers[2]
        self.recorded: torch.cuda.CUDAGraph | None = None

    def fill(self, packed: PackedStep, previous: torch.Tensor | None) -> None:
        count, repeated = len(packed.segments), packed.repeated
        rows = (
            _padded(packed.token_ids, self.size, repeated),
            _padded(packed.positions, self.size, repeated),
            _padded(packed.wanted, self.size, 0),  # whichever: nobody reads it
        )
        self._numbers.copy_(upload(np.stack(rows), torch.int64, self._numbers.device, keep=True), non_blocking=True)
        fill_pending(self._numbers[0], packed, previous)
        if len(packed.pending) and self.size > count:
            self._numbers[0, count:] = self._numbers[0, repeated]  # which may have been pending
        self._fill_attention(packed)


def _padded(row: NDArray[np.int64], size: int, repeated: int) -> NDArray[np.int64]:
    """``row``, then its number at ``repeated`` again; an empty one becomes zeros."""
    out = np.full(size, row[repeated] if len(row) else 0, np.int64)
    out[: len(row)] = row
    return out


def _repeated(packed: PackedStep, size: int) -> tuple[Segment, ...]:
    segments = packed.segments
    return (*segments, *(segments[packed.repeated],) * (size - len(segments)))


def _stretched(packed: PackedStep, size: int) -> tuple[SharedPrefix, ...]:
    """The step's groups, the last of which the places that are left belong to."""
    *others, last = packed.shared
    return (*others, replace(last, count=size - last.first))
