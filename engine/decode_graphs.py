"""How does a decode step start all its kernels at once? As a CUDA graph for each of some batch sizes.

They are captured at the start. A step of n sequences runs in the smallest graph that holds them. The places that are
left repeat the first sequence (the shortest): they compute the same token at the same position and write the same bytes
to the same slot, so no page has to be kept for them, and no backend needs to know of padding.

Graphs read their inputs from memory that stays where it is: token ids, positions, wanted rows and what the backend's
``StaticAttention`` holds. ``record`` off, the same steps are computed without a graph, on any device.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from engine.attention import AttentionBackend, Segment, StaticAttention, StepAttention
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
        self._graphs: dict[int, _Graph] = {}
        sizes = batch_buckets(max_batch_size)
        with Progress(disable=not sys.stderr.isatty(), transient=True) as progress, torch.inference_mode():
            task = progress.add_task("CUDA graphs for decode", total=len(sizes))
            for size in reversed(sizes):  # the largest first: the others fit the memory that it took
                attention = backend.allocate(size, max_tokens)
                if attention is None:
                    break
                self._graphs[size] = self._make(size, attention, scratch_page)
                progress.advance(task)
        self.buckets = tuple(sorted(self._graphs))

    def run(self, packed: PackedStep, previous: torch.Tensor | None) -> torch.Tensor | None:
        """Logits of the wanted rows; None if no graph holds the step. They are overwritten by the next step."""
        num_sequences = len(packed.segments)
        if not packed.is_decode or not self.buckets or num_sequences > self.buckets[-1]:
            return None
        graph = self._graphs[next(size for size in self.buckets if size >= num_sequences)]
        graph.fill(packed, previous)
        if graph.recorded is None:
            self._compute(graph)
        else:
            graph.recorded.replay()
        assert self._logits is not None, "made by the first"
        return self._logits[: len(packed.wanted)]

    def _make(self, size: int, attention: StaticAttention, scratch_page: int) -> _Graph:
        graph = _Graph(size, attention, self._device)
        graph.attention.fill([Segment(0, 1, (scratch_page,))] * size)
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

    def __init__(self, size: int, attention: StaticAttention, device: torch.device) -> None:
        self.size = size
        self.attention = attention
        # One memory for all three: each copy between two graphs is time in which the GPU does little.
        self._numbers = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.wanted = self._numbers[:1], self._numbers[1:2], self._numbers[2]
        self.recorded: torch.cuda.CUDAGraph | None = None

    def fill(self, packed: PackedStep, previous: torch.Tensor | None) -> None:
        numbers = np.stack([_padded(row, self.size) for row in (packed.token_ids, packed.positions, packed.wanted)])
        self._numbers.copy_(upload(numbers, torch.int64, self._numbers.device, keep=True), non_blocking=True)
        fill_pending(self._numbers[0], packed, previous)
        if len(packed.pending) and self.size > len(packed.segments):
            self._numbers[0, len(packed.segments) :] = self._numbers[0, 0]  # which may have been pending
        self.attention.fill(_repeated(packed.segments, self.size))


def _padded(row: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """``row``, then its first number again; an empty one becomes zeros."""
    out = np.full(size, row[0] if len(row) else 0, np.int64)
    out[: len(row)] = row
    return out


def _repeated(segments: Sequence[Segment], size: int) -> tuple[Segment, ...]:
    return (*segments, *(segments[0],) * (size - len(segments)))
