"""Who asks, and what came of it? Requests at a steady rate through the gRPC door, of prompts of all lengths.

Prompts are random, so no cache helps; lengths are spread evenly over their logarithm, by a sequence of numbers that
covers it as evenly as can be (no luck of the draw in a run of a few dozen requests). Answers are greedy, so that they
can be computed again.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc

from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, leave no gap for long


@dataclass(frozen=True)
class Mix:
    """What is asked for, now."""

    rate_rps: float
    prompt_tokens: tuple[int, int]  # shortest, longest
    output_tokens: int


@dataclass
class Request:
    """One request. Instants are seconds since the load began."""

    number: int
    sent_at: float
    prompt_ids: tuple[int, ...]
    output_tokens: int
    ended_at: float | None = None  # None: it is under way
    output_ids: tuple[int, ...] = ()
    ttft_s: float = 0.0
    prefill_worker: str = ""  # the decode worker's, where that has prefilled
    decode_worker: str = ""
    reason: str = ""
    num_attempts: int = 0
    bytes_shipped: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, object]:
        """What is worth keeping: everything but the tokens."""
        kept = {name: value for name, value in vars(self).items() if name not in ("prompt_ids", "output_ids")}
        return kept | {"prompt_tokens": len(self.prompt_ids)}


@dataclass
class SteadyLoad:
    """Sends requests until it is stopped; ``mix`` may be changed at any time."""

    address: str
    mix: Mix
    vocab_size: int
    began_at: float = field(default_factory=time.perf_counter)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(7)
        self._under_way: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Task[None] | None = None

    @property
    def now(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self.began_at

    @property
    def failed(self) -> list[Request]:
        """Requests that ended with an error."""
        return [request for request in self.requests if request.error]

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def since(self, instant: float) -> list[Request]:
        """Requests sent from then on that have ended well."""
        return [r for r in self.requests if r.sent_at >= instant and r.ended_at is not None and not r.error]

    async def __aenter__(self) -> SteadyLoad:
        self._channel = grpc.aio.insecure_channel(self.address, options=(("grpc.enable_http_proxy", 0),))
        self._stub = rpc.GenerationStub(self._channel)
        self._sending = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._channel.close(None)

    async def stop(self) -> None:
        """Send nothing more."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})

    async def wait_for_all(self, timeout_s: float) -> bool:
        """Have all requests ended by then?"""
        if self._under_way:
            await asyncio.wait(set(self._under_way), timeout=timeout_s)
        return not self._under_way

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Request:
        """One request besides; returns when it has ended."""
        request = self._make(prompt_tokens, output_tokens)
        await self._run(request)
        return request

    def spawn(self, prompt_tokens: int, output_tokens: int) -> None:
        """One request besides."""
        task = asyncio.create_task(self._run(self._make(prompt_tokens, output_tokens)))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def next_length(self, number: int) -> int:
        """Tokens of the prompt with that number."""
        shortest, longest = self.mix.prompt_tokens
        return round(float(shortest * (longest / shortest) ** (number * _GOLDEN % 1.0)))

    async def _send(self) -> None:
        number, due = 0, self.now
        while True:
            number, due = number + 1, due + 1 / self.mix.rate_rps
            await asyncio.sleep(max(0.0, due - self.now))
            self.spawn(self.next_length(number), self.mix.output_tokens)

    def _make(self, prompt_tokens: int, output_tokens: int) -> Request:
        prompt = tuple(self._random.randrange(1, self.vocab_size) for _ in range(prompt_tokens))
        request = Request(len(self.requests), self.now, prompt, output_tokens)
        self.requests.append(request)
        return request

    async def _run(self, request: Request) -> None:
        sampling = pb.SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        message = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=request.prompt_ids), sampling_params=sampling
        )
        try:
            async for response in self._stub.Generate(message):
                if response.WhichOneof("response") == "complete":
                    _note(request, response.complete)
            if not request.output_ids:
                request.error = "the stream ended without an answer"
        except grpc.aio.AioRpcError as error:
            request.error = f"{error.code().name}: {error.details()}"
        request.ended_at = self.now


def _note(request: Request, complete: pb.GenerateComplete) -> None:
    timing = complete.timing
    request.output_ids = tuple(complete.output_ids)
    request.ttft_s = timing.ttft_s
    request.prefill_worker = timing.prefill_worker or timing.decode_worker
    request.decode_worker = timing.decode_worker
    request.reason = timing.route_reason
    request.num_attempts = timing.num_attempts
    request.bytes_shipped = timing.bytes_shipped
