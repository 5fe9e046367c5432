"""The client of the served arms: OpenAI completions over HTTP, streamed, token ids in.

The same client drives our service and vLLM's, so what it costs on a small machine is the same for both. It looks at
a stream only twice, at its first event and at its end, and never parses what lies between.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import httpx

from benchmarks.measurement import RequestTimes, WaveTimes
from benchmarks.workload import Wave

_TIMEOUT_S = 600.0
_EVENT = b"data: "


class StreamFailed(Exception):
    """The server refused a request or ended its stream early; the message holds what it said."""


async def run_wave(base_url: str, model: str, wave: Wave) -> WaveTimes:
    """Send every request of ``wave`` at once and wait for all."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, limits=limits) as client:
        began_at = time.perf_counter()
        tasks = [_request(client, model, prompt, wave.num_new_tokens) for prompt in wave.prompts]
        requests = await asyncio.gather(*tasks)
        return WaveTimes(time.perf_counter() - began_at, tuple(requests))


async def _request(client: httpx.AsyncClient, model: str, prompt: Sequence[int], num_new_tokens: int) -> RequestTimes:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_at = time.perf_counter()
    first_at: float | None = None
    received = bytearray()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for piece in response.aiter_raw():
            received += piece
            if first_at is None and _EVENT in received:
                first_at = time.perf_counter()
        ended_at = time.perf_counter()
    if response.status_code != 200 or first_at is None:
        raise StreamFailed(f"{response.status_code}: {received.decode(errors='replace')[-500:]}")
    num_output_tokens = _completion_tokens(bytes(received))
    if num_output_tokens != num_new_tokens:
        raise StreamFailed(f"asked for {num_new_tokens} tokens, got {num_output_tokens}")
    return RequestTimes(first_at - began_at, ended_at - began_at, num_output_tokens)


def _completion_tokens(stream: bytes) -> int:
    """``usage.completion_tokens`` of the last event that has one."""
    for line in reversed(stream.splitlines()):
        if line.startswith(_EVENT + b"{"):
            usage = json.loads(line.removeprefix(_EVENT)).get("usage")
            if usage:
                return int(usage["completion_tokens"])
    raise StreamFailed(f"the stream ended without usage: {stream.decode(errors='replace')[-500:]}")
