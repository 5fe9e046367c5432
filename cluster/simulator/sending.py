"""The prefill half of a simulated worker: queued, computed, shipped, as in prefill_worker/worker.py.

prefill()     queued; nothing is held at the receiver
step_begun()  its first step: a grant is asked for; then its bytes become available while it is computed
step_ended()  the one token: to the gateway, and what is left of the bytes is the tail
acknowledged  the receiver has everything: the pages go back, the gateway hears what the hand-over cost
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TypeVarTuple

from cluster.simulator.hand_over import HandOver
from cluster.simulator.host import Host, Publish, num_known_tokens
from cluster.simulator.receiving import GrantQuery, ReceivingHalf
from cluster.worker_client import WorkerDescription
from core.errors import InvalidRequest
from core.request import PullReport, Role, SequenceFailure, SequenceId, SequenceSpec, SessionId, StageStats, TokenChunk
from engine.step_plan import StepItem, StepPlan

_Ts = TypeVarTuple("_Ts")

_PROBE_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class _Prompt:
    """One sequence that is prefilled here for another worker."""

    spec: SequenceSpec
    publish: Publish
    session_id: SessionId
    receiver: ReceivingHalf | None  # None: nobody is at the address
    hand_over: HandOver | None = None  # None: not started
    stats: StageStats | None = None  # None: no token yet
    pulling: asyncio.Task[None] | None = None
    pull: PullReport | None = None
    ended: bool = False


class SendingHalf:
    """What of a worker prefills and sends."""

    def __init__(self, host: Host, pages_freed: Callable[[], None]) -> None:
        """``pages_freed`` is called between two steps, when the other half may reserve some."""
        self._host = host
        self._pages_freed = pages_freed
        self._engine = host.engine
        self._prompts: dict[SequenceId, _Prompt] = {}
        self._computing: list[HandOver] = []  # of the present step
        self._alive = True
        self.bytes_sent = 0.0

    @property
    def num_sessions(self) -> int:
        """Hand-overs queued or under way."""
        return len(self._prompts)

    # ---- the gateway ----

    def prefill(
        self,
        spec: SequenceSpec,
        publish: Publish,
        session_id: SessionId,
        receiver: ReceivingHalf | None,
        pull: Coroutine[None, None, PullReport] | None = None,
    ) -> None:
        """Queue ``spec`` (``hold_kv``) after ``pull``, its K/V to be sent to ``receiver``."""
        prompt = _Prompt(spec, publish, session_id, receiver)
        self._prompts[spec.sequence_id] = prompt
        if pull is None:
            self._join(prompt)
        else:
            prompt.pulling = self._host.loop.create_task(self._pull_and_queue(prompt, pull))

    def abort(self, sequence_id: SequenceId) -> None:
        """Give a sequence up in any state, quietly; unknown ones are ignored."""
        prompt = self._prompts.get(sequence_id)
        if prompt is not None:
            if prompt.pulling is not None:
                prompt.pulling.cancel()
            self._engine.submit(lambda: self._end(prompt))

    def abort_all(self, publish: Publish) -> None:
        """Give up whatever a gateway sent, which is gone."""
        for prompt in [p for p in self._prompts.values() if p.publish == publish]:
            self.abort(prompt.spec.sequence_id)

    def probe(self, receiver: WorkerDescription) -> None:
        """Send a self-test's bytes to that worker, to see what the link carries now."""
        host = self._host
        pair = (host.description.cluster_id, receiver.cluster_id)
        flow = host.network.open_flow(host.description.engine_id, pair, host.kind.send_bytes_per_s, lambda: None)
        if pair[0] != pair[1]:
            host.links.opened(receiver, flow, 2 * host.network.path(*pair).latency_s)
        flow.add(_PROBE_BYTES)
        flow.finish()

    # ---- the engine ----

    def step_begun(self, plan: StepPlan, begins_at: float, ends_at: float) -> None:
        """A step is computed from now on."""
        for started in plan.started:
            prompt = self._prompts.get(started.spec.sequence_id)
            if prompt is not None and prompt.hand_over is None:
                self._start(prompt, started.num_cached_tokens)
        for item in plan.items:
            prompt = self._prompts.get(item.sequence_id)
            if prompt is not None and prompt.hand_over is not None:
                self._compute(prompt.hand_over, item, begins_at, ends_at)

    def step_ended(self) -> None:
        """Every layer of the present step is stored."""
        for hand_over in self._computing:
            hand_over.step_ended()
        self._computing.clear()

    def token_made(self, chunk: TokenChunk) -> bool:
        """The one token of one of ours; False: the sequence is not ours."""
        prompt = self._prompts.get(chunk.sequence_id)
        if prompt is None:
            return False
        assert chunk.stats is not None, "a prompt's one token brings its stats"
        assert prompt.hand_over is not None, "a token was made, so a step began"
        prompt.stats = chunk.stats._replace(
            worker_id=self._host.description.worker_id, role=Role.PREFILL, pull=prompt.pull
        )
        prompt.publish(chunk._replace(stats=prompt.stats))
        if chunk.finish_reason is None:
            prompt.hand_over.token_made()
        else:  # the first token was the last
            self._engine.submit(lambda: self._end(prompt))
        return True

    def die(self) -> None:
        """There is nothing any more; receivers hear that the connection is gone."""
        self._alive = False
        for prompt in self._prompts.values():
            prompt.ended = True
            if prompt.pulling is not None:
                prompt.pulling.cancel()
            if prompt.hand_over is not None:
                prompt.hand_over.cancel()
            self._tell(prompt, partial(_lose_sender, prompt.session_id))

    # ---- inside ----

    async def _pull_and_queue(self, prompt: _Prompt, pull: Coroutine[None, None, PullReport]) -> None:
        prompt.pull = await pull
        prompt.pulling = None
        self._join(prompt)

    def _join(self, prompt: _Prompt) -> None:
        arrived_at = self._host.loop.time()
        self._engine.submit(lambda: self._queue(prompt, arrived_at))

    def _queue(self, prompt: _Prompt, arrived_at: float) -> None:
        if prompt.ended:
            return
        try:
            self._engine.add(prompt.spec, arrived_at)
        except InvalidRequest as error:
            self._fail(prompt, str(error), Role.PREFILL)

    def _compute(self, hand_over: HandOver, item: StepItem, begins_at: float, ends_at: float) -> None:
        hand_over.step_begun(item.start + len(item.token_ids), item.samples, begins_at, ends_at)
        self._computing.append(hand_over)

    def _start(self, prompt: _Prompt, num_cached: int) -> None:
        """Its first step begins: only now is anything asked of the receiver."""
        host = self._host
        page_size, num_tokens = host.kind.engine.page_size, num_known_tokens(prompt.spec)
        hand_over = HandOver(host.loop, host.kind.kv, page_size, num_tokens, num_cached)
        prompt.hand_over = hand_over
        query = GrantQuery(
            prompt.session_id,
            granted=lambda cached: self._answer(prompt, self._granted, prompt, hand_over, cached),
            refused=lambda why: self._answer(prompt, self._fail, prompt, why, Role.DECODE),
            lost=lambda: self._answer(prompt, self._fail, prompt, "the receiver is gone", Role.DECODE),
        )
        if prompt.receiver is None:
            self._fail(prompt, "no worker is at that address", Role.DECODE)
        self._tell(prompt, lambda receiver: receiver.ask_grant(query))

    def _granted(self, prompt: _Prompt, hand_over: HandOver, num_cached: int) -> None:
        if prompt.ended or prompt.receiver is None:
            return
        host, there = self._host, prompt.receiver.description
        pair = (host.description.cluster_id, there.cluster_id)
        flow = host.network.open_flow(
            host.description.engine_id, pair, host.kind.send_bytes_per_s, lambda: self._sent(prompt, hand_over)
        )
        if pair[0] != pair[1]:
            host.links.opened(there, flow, 2 * host.network.path(*pair).latency_s)
        hand_over.granted(flow, num_cached)

    def _sent(self, prompt: _Prompt, hand_over: HandOver) -> None:
        """The last byte has left: it arrives, the receiver commits and answers."""

        def arrive(receiver: ReceivingHalf) -> None:
            if receiver.committed(prompt.session_id, hand_over.num_bytes):
                self._answer(prompt, self._engine.submit, lambda: self._close(prompt, hand_over))
            else:
                self._answer(prompt, self._fail, prompt, "the receiver gave it up", Role.DECODE)

        if not prompt.ended:
            self._tell(prompt, arrive)

    def _close(self, prompt: _Prompt, hand_over: HandOver) -> None:
        """Pages back, then the report of what the hand-over cost."""
        if prompt.ended:
            return
        self._end(prompt)
        cost = hand_over.cost(self._host.loop.time())
        self.bytes_sent += cost.num_bytes
        there = prompt.receiver
        if there is not None and there.description.cluster_id != self._host.description.cluster_id:
            self._host.links.transferred(there.description, cost.tail_bytes, min(cost.exposed_s, cost.transfer_s))
        stats = prompt.stats or StageStats(self._host.description.worker_id, Role.PREFILL)
        stats = stats._replace(
            transfer_s=cost.transfer_s,
            exposed_transfer_s=cost.exposed_s,
            bytes_shipped=cost.num_bytes,
        )
        prompt.publish(TokenChunk(prompt.spec.sequence_id, len(prompt.spec.output_token_ids) + 1, stats=stats))

    def _fail(self, prompt: _Prompt, why: str, fault: Role) -> None:
        """The hand-over is broken: the gateway hears whose fault it was, and tries again."""
        if prompt.ended or not self._alive:
            return
        self._engine.submit(lambda: self._end(prompt))
        message = f"KV hand-over failed: {why}"
        prompt.publish(SequenceFailure(prompt.spec.sequence_id, message, retryable=True, stage=fault))

    def _end(self, prompt: _Prompt) -> None:
        """Between two steps: everything of it goes back."""
        if prompt.ended:
            return
        prompt.ended = True
        self._prompts.pop(prompt.spec.sequence_id, None)
        if prompt.hand_over is not None:
            prompt.hand_over.cancel()
        if not self._engine.release(prompt.spec.sequence_id):
            self._engine.abort(prompt.spec.sequence_id)
        self._pages_freed()

    def _tell(self, prompt: _Prompt, what: Callable[[ReceivingHalf], None]) -> None:
        """Something arrives at the receiver."""
        receiver = prompt.receiver
        if receiver is not None:
            self._host.send(receiver.description, what, receiver)

    def _answer(self, prompt: _Prompt, what: Callable[[*_Ts], None], *args: *_Ts) -> None:
        """Something arrives here from the receiver."""
        receiver = prompt.receiver
        if receiver is not None:
            host = self._host
            host.network.path(receiver.description.cluster_id, host.description.cluster_id).send(what, *args)


def _lose_sender(session_id: SessionId, receiver: ReceivingHalf) -> None:
    receiver.sender_lost(session_id)
