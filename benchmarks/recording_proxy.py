"""What does another load generator's run look like to ours? A proxy that passes its requests on and times what comes.

    python -m benchmarks.recording_proxy PORT UPSTREAM_URL

Bytes go through as they come. Each generating request is read by the client of ``prfaas bench`` on its way back and
becomes a ``ClientRecord``, as if ours had sent it; ``GET /records`` gives them as JSON lines and forgets them.
"""

from __future__ import annotations

import json
import sys

import aiohttp
from aiohttp import web

from cluster.bench.client_record import ClientRecord
from cluster.bench.openai_answer import AnswerReader
from cluster.bench.target import Stopwatch
from core.clock import Clock, WallClock

_PASSED_ON = ("content-type", "authorization", "accept", "x-request-id")


class RecordingProxy:
    """The proxy. ``records``: of the generating requests that have ended, in order of their end."""

    def __init__(self, upstream_url: str, clock: Clock) -> None:
        self._upstream_url = upstream_url
        self._clock = clock
        self._began_at = clock.now()
        self._num_requests = 0
        self.records: list[ClientRecord] = []

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=2**26)
        app.cleanup_ctx.append(self._connected)
        app.router.add_get("/records", self._take_records)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        return app

    async def _connected(self, _: web.Application):  # type: ignore[no-untyped-def]  # aiohttp's context protocol
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        ) as self._session:
            yield

    async def _take_records(self, _: web.Request) -> web.Response:
        records, self.records = self.records, []
        return web.Response(text="".join(json.dumps(record.as_dict()) + "\n" for record in records))

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        watch = Stopwatch(self._clock)
        watch.send()  # what another client sends begins to come here when it sends it
        body = await request.read()
        headers = {name: value for name in _PASSED_ON if (value := request.headers.get(name)) is not None}
        url = f"{self._upstream_url}{request.rel_url}"
        async with self._session.request(request.method, url, data=body or None, headers=headers) as upstream:
            response = web.StreamResponse(status=upstream.status)
            for name in ("content-type", "content-encoding", "x-request-id"):
                if name in upstream.headers:
                    response.headers[name] = upstream.headers[name]
            await response.prepare(request)
            answer = AnswerReader(watch, None)
            async for received in upstream.content.iter_any():
                answer.take(received)
                await response.write(received)
            await response.write_eof()
        if request.method == "POST" and request.path.endswith("/completions"):
            self._note(body, watch, answer, upstream.status)
        return response

    def _note(self, body: bytes, watch: Stopwatch, answer: AnswerReader, status: int) -> None:
        asked = json.loads(body)
        output_tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or 0
        if output_tokens <= 1 or not asked.get("stream"):
            return  # somebody looks around
        reply = answer.reply(*((None, None) if status == 200 else (f"http_{status}", None)))
        number, self._num_requests = self._num_requests, self._num_requests + 1
        sent_at = watch.sent_at - self._began_at
        self.records.append(
            ClientRecord(
                number=number,
                conversation=number,
                turn=0,
                due_at=sent_at,
                sent_at=sent_at,
                asked_input_tokens=reply.prompt_tokens or 0,
                asked_output_tokens=output_tokens,
                chunk_s=tuple(at - watch.sent_at for at in watch.chunk_at),
                ended_s=watch.ended_at - watch.sent_at,
                output_tokens=reply.output_tokens,
                counted_by=reply.counted_by,
                prompt_tokens=reply.prompt_tokens,
                cached_tokens=reply.cached_tokens,
                finish_reason=reply.finish_reason,
                error=reply.error,
                error_message=reply.error_message,
            )
        )


if __name__ == "__main__":
    web.run_app(
        RecordingProxy(sys.argv[2].rstrip("/"), WallClock()).application(),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
    )
