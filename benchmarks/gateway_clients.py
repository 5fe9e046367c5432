"""Many clients of a gateway in one process, which do as little as can be done with what comes.

    python -m benchmarks.gateway_clients KIND ADDRESS NUM_CLIENTS NUM_TOKENS STEP_US

KIND is grpc (``prfaas.v1.Generation``) or sse (/v1/completions, streamed). Every client sends one request, and all
streams run at once. Prints a line ``running`` when all have their first token, ``ending`` when the first has its last,
and at the end one JSON line: for each client the instant (CLOCK_MONOTONIC) at which each of its tokens came, and how
many messages they came in.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from urllib.parse import urlsplit

import grpc

from benchmarks.orderly_exit import end_with_parent
from benchmarks.stand_in_worker import Emission
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

_CONNECTIONS = 8  # of gRPC: streams of one connection share its flow control


class Arrivals:
    """What has come. ``num_messages``: of all clients."""

    def __init__(self, num_clients: int, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.at: list[list[float]] = [[] for _ in range(num_clients)]
        self.num_messages = 0
        self._num_waiting = num_clients
        self._ending = False

    def note(self, client: int, num_tokens: int) -> None:
        """So many tokens have come in one message."""
        arrived = self.at[client]
        if not arrived:
            self._num_waiting -= 1
            if not self._num_waiting:
                print("running", flush=True)
        arrived.extend([time.monotonic()] * num_tokens)
        self.num_messages += 1
        if len(arrived) >= self.num_tokens and not self._ending:
            self._ending = True
            print("ending", flush=True)


async def _ask_grpc(channel: grpc.aio.Channel, emission: Emission, arrivals: Arrivals) -> None:
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=emission.prompt()),
        sampling_params=pb.SamplingParams(max_tokens=arrivals.num_tokens, temperature=0.0, ignore_eos=True),
    )
    call = rpc.GenerationStub(channel).Generate(request)
    async for response in call:
        count = len(response.chunk.token_ids)
        if count:
            arrivals.note(emission.client, count)


class _SseClient(asyncio.Protocol):
    """One request on one connection; a word for each token, so the words of an event are its tokens."""

    def __init__(self, host: str, emission: Emission, arrivals: Arrivals) -> None:
        self._host = host
        self._emission = emission
        self._arrivals = arrivals
        self._rest = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = json.dumps(
            {
                "prompt": self._emission.prompt(),
                "max_tokens": self._arrivals.num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        assert isinstance(transport, asyncio.Transport), "a connection"
        transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())

    def data_received(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            words = event.partition(b'"text":"')[2].partition(b'"')[0].count(b" ")
            if words:
                self._arrivals.note(self._emission.client, words)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def _ask_sse(url: str, emission: Emission, arrivals: Arrivals) -> None:
    at = urlsplit(url)
    assert at.hostname is not None, "a URL"
    assert at.port is not None, "with a port"
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: _SseClient(at.netloc, emission, arrivals), at.hostname, at.port
    )
    await client.ended


async def _run(kind: str, address: str, num_clients: int, num_tokens: int, step_us: int) -> Arrivals:
    arrivals = Arrivals(num_clients, num_tokens)
    emissions = [Emission(num_clients, step_us, client) for client in range(num_clients)]
    if kind == "sse":
        await asyncio.gather(*(_ask_sse(address, emission, arrivals) for emission in emissions))
        return arrivals
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(min(_CONNECTIONS, num_clients))]
    await asyncio.gather(
        *(_ask_grpc(channels[e.client % len(channels)], e, arrivals) for e in emissions), return_exceptions=False
    )
    for channel in channels:
        await channel.close(None)
    return arrivals


def main(kind: str, address: str, num_clients: int, num_tokens: int, step_us: int) -> None:
    """Run to the end and print what came."""
    arrivals = asyncio.run(_run(kind, address, num_clients, num_tokens, step_us))
    print(json.dumps({"at": arrivals.at, "num_messages": arrivals.num_messages}), flush=True)


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
