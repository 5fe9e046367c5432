"""How does the K/V of one sequence get to another worker? While its prompt is computed, layer by layer.

Who moves a hand-over on (prefill_worker/worker.py has the real one):

    started      the grant is asked for; what is cached here may travel as soon as it comes
    step_begun   its chunk's layers become available one after the other
    step_ended   the last layer has become available
    granted      a flow on the link is opened; pages that the receiver caches are not sent
    token_made   what is left is the tail; then the commit
    sent         the last byte is on its way; one latency later the receiver has all, two later the sender knows

Bytes are those of whole pages and, with the last chunk, of the state that no length changes (recurrent layers).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.simulator.shaped_link import Flow


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a sequence's cache weighs, and in how many pieces it is computed."""

    bytes_per_token: float
    state_bytes: float = 0.0
    num_layers: int = 32


@dataclass(frozen=True, slots=True)
class HandOverCost:
    """What a hand-over cost, as a sender reports it."""

    num_bytes: int
    tail_bytes: int  # not sent yet when the token was made
    transfer_s: float  # grant to acknowledgement
    exposed_s: float  # token to acknowledgement


class HandOver:
    """The bytes of one hand-over, from its first step to the last byte. Pages are the sender's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shape: KvShape,
        page_size: int,
        num_tokens: int,
        num_cached: int,
    ) -> None:
        """``num_cached``: leading tokens, in whole pages, that the sender found in its prefix cache."""
        self._loop = loop
        self._shape = shape
        self._page_size = page_size
        self._num_tokens = num_tokens
        self._flow: Flow | None = None
        self._skipped = 0  # leading tokens that the receiver caches
        self._stored = num_cached  # leading tokens whose pages are complete
        self._step: tuple[int, float, float] | None = None  # of this step: tokens stored after it, its begin and end
        self._timer: asyncio.TimerHandle | None = None
        self._all_stored = False
        self._granted_at: float | None = None
        self._committed_at: float | None = None
        self._sent_at_commit = 0.0

    @property
    def num_bytes(self) -> float:
        """Bytes that were sent, or will have been."""
        return self._bytes_of(self._num_tokens, last=True) if self._flow is not None else 0.0

    def cost(self, now: float) -> HandOverCost:
        """What it cost, acknowledged now."""
        assert self._granted_at is not None, "a hand-over is acknowledged after its grant"
        assert self._committed_at is not None, "a hand-over is acknowledged after its commit"
        num_bytes = self.num_bytes
        tail_bytes = max(0.0, num_bytes - self._sent_at_commit)
        return HandOverCost(round(num_bytes), round(tail_bytes), now - self._granted_at, now - self._committed_at)

    def step_begun(self, end: int, samples: bool, begins_at: float, ends_at: float) -> None:
        """A chunk that ends with token ``end`` is computed; ``samples``: it is the prompt's last."""
        stored = self._num_tokens if samples else end // self._page_size * self._page_size
        self._step = (stored, begins_at, ends_at)
        self._all_stored = samples
        self._start_source()

    def granted(self, flow: Flow, num_cached: int) -> None:
        """The receiver has pages for all but the first ``num_cached`` tokens, which it caches."""
        self._skipped = num_cached
        self._flow = flow
        self._granted_at = self._loop.time()
        available = self._bytes_of(self._stored, last=False)
        if self._step is not None:  # between two layers of a chunk
            _, begins_at, ends_at = self._step
            layers = int((self._loop.time() - begins_at) / (ends_at - begins_at) * self._shape.num_layers + 1e-6)
            available += self._step_bytes() * min(layers, self._shape.num_layers - 1) / self._shape.num_layers
        if self._all_stored and self._step is None:
            available = self.num_bytes
        if available > 0:
            flow.add(available)
        self._start_source()
        if self._committed_at is not None:
            flow.finish()

    def token_made(self) -> None:
        """The prompt's last chunk has ended."""
        self._committed_at = self._loop.time()
        if self._flow is not None:
            self._sent_at_commit = self._flow.sent
            self._flow.finish()

    def step_ended(self) -> None:
        """The chunk is computed, in all layers."""
        self._cancel_timer()
        if self._step is None:
            return
        available = self._bytes_of(self._step[0], self._all_stored)
        self._stored = self._step[0]
        self._step = None
        if self._flow is not None:
            self._flow.stop_source(available)

    def cancel(self) -> None:
        """Send nothing more."""
        self._cancel_timer()
        if self._flow is not None:
            self._flow.cancel()

    # ---- inside ----

    def _bytes_of(self, num_tokens: int, last: bool) -> float:
        """Bytes to be sent of the first ``num_tokens`` tokens, in whole pages."""
        in_pages = -(-num_tokens // self._page_size) * self._page_size
        return max(0, in_pages - self._skipped) * self._shape.bytes_per_token + (
            self._shape.state_bytes if last else 0.0
        )

    def _step_bytes(self) -> float:
        """What the present step makes available."""
        assert self._step is not None, "a step is being computed"
        return self._bytes_of(self._step[0], self._all_stored) - self._bytes_of(self._stored, last=False)

    def _start_source(self) -> None:
        """After its first layer the chunk's bytes come evenly; the last layer's come when the step ends."""
        if self._flow is None or self._step is None or self._shape.num_layers < 2:
            return
        _, begins_at, ends_at = self._step
        now = self._loop.time()
        first_at = begins_at + (ends_at - begins_at) / self._shape.num_layers
        if now < first_at:
            self._timer = self._loop.call_at(first_at, self._start_source)
            return
        rate = self._step_bytes() / (ends_at - begins_at)
        if rate > 0 and now < ends_at:
            self._flow.start_source(rate)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
