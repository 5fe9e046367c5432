"""The client of the served arms: OpenAI completions over HTTP, streamed, token ids in.

The same client drives our service and vLLM's, so what it costs on a small machine is the same for both. It looks at
a stream only twice, at its first event and at its end, and never parses what lies between.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.measurement import RequestTimes, WaveTimes
from benchmarks.workload import Wave

_TIMEOUT_S = 600.0
_EVENT = b"data: "
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class StreamFailed(Exception):
    """The server refused a request or ended its stream early; the message holds what it said."""


class Refused(StreamFailed):
    """The server has too much to do: it said 429."""


async def run_wave(base_url: str, model: str, wave: Wave) -> WaveTimes:
    """Send every request of ``wave`` at once and wait for all."""
    async with httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, limits=UNLIMITED) as client:
        began_at = time.perf_counter()
        tasks = [stream(client, model, prompt, wave.num_new_tokens) for prompt in wave.prompts]
        requests = await asyncio.gather(*tasks)
        return WaveTimes(time.perf_counter() - began_at, tuple(times for times, _ in requests))


async def stream(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], num_new_tokens: int
) -> tuple[RequestTimes, dict[str, Any]]:
    """One request; its times, and what the stream's events say beside the text: each key as it came last."""
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
    if response.status_code == 429:
        raise Refused(f"429: {received.decode(errors='replace')[-500:]}")
    if response.status_code != 200 or first_at is None:
        raise StreamFailed(f"{response.status_code}: {received.decode(errors='replace')[-500:]}")
    said = _last_words(bytes(received))
    if "usage" not in said:
        raise StreamFailed(f"the stream ended without usage: {received.decode(errors='replace')[-500:]}")
    num_output_tokens = int(said["usage"]["completion_tokens"])
    if num_output_tokens != num_new_tokens:
        raise StreamFailed(f"asked for {num_new_tokens} tokens, got {num_output_tokens}")
    return RequestTimes(first_at - began_at, ended_at - began_at, num_output_tokens), said


def _last_words(received: bytes) -> dict[str, Any]:
    """The keys of all events, each with its last value that says something."""
    said: dict[str, Any] = {}
    for line in received.splitlines():
        if line.startswith(_EVENT + b"{"):
            said |= {key: value for key, value in json.loads(line.removeprefix(_EVENT)).items() if value}
    return said
