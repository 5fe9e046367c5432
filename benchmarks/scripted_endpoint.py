"""An OpenAI-compatible endpoint whose token times are written down: two runs against it are the same run.

    python -m benchmarks.scripted_endpoint PORT

The n-th request gets its first token ``Script.ttft_s(n)`` seconds after it has come, and one every ``Script.tpot_s(n)``
seconds from then on, until it has as many as it asks for; instants are counted from the request's coming, so delays do
not add up. Requests for a single token are answered at once and not counted: clients send them to look around.
``POST /reset`` begins the script anew.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

from aiohttp import web

MODEL = "scripted"
_GOLDEN, _PLASTIC = 0.6180339887498949, 0.7548776662466927  # their multiples, modulo 1, leave no gap for long


@dataclass(frozen=True)
class Script:
    """Token times by the request's number. Seconds; the ends of what is spread evenly."""

    ttft: tuple[float, float] = (0.15, 0.9)
    tpot: tuple[float, float] = (0.008, 0.03)

    def ttft_s(self, number: int) -> float:
        """From a request's coming to its first token."""
        low, high = self.ttft
        return low + (high - low) * (number * _GOLDEN % 1.0)

    def tpot_s(self, number: int) -> float:
        """Between its tokens."""
        low, high = self.tpot
        return low + (high - low) * (number * _PLASTIC % 1.0)


class ScriptedEndpoint:
    """The server. ``num_requests``: so far in this script."""

    def __init__(self, script: Script, cached_tokens: int = 0) -> None:
        self._script = script
        self._cached_tokens = cached_tokens
        self.num_requests = 0
        self.bodies: list[dict[str, object]] = []  # of the script's requests, in the order of their coming

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_post("/reset", self._reset)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 65536}]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _reset(self, _: web.Request) -> web.Response:
        self.num_requests = 0
        self.bodies.clear()
        return web.json_response({})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = "".join(str(message["content"]) for message in body["messages"])
        return await self._answer(request, body, len(text.split()))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        return await self._answer(request, body, len(prompt.split()) if isinstance(prompt, str) else len(prompt))

    async def _answer(self, request: web.Request, body: dict[str, object], prompt_tokens: int) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        came_at = loop.time()
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        assert isinstance(asked, int), "clients of a benchmark send integers"
        ttft_s, tpot_s = 0.0, 0.0
        if asked > 1:
            number, self.num_requests = self.num_requests, self.num_requests + 1
            self.bodies.append(body)
            ttft_s, tpot_s = self._script.ttft_s(number), self._script.tpot_s(number)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": asked,
            "total_tokens": prompt_tokens + asked,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
        if not body.get("stream"):
            await asyncio.sleep(max(0.0, came_at + ttft_s + (asked - 1) * tpot_s - loop.time()))
            return web.json_response(_whole(request, " word" * asked, usage))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for index in range(asked):
            await asyncio.sleep(max(0.0, came_at + ttft_s + index * tpot_s - loop.time()))
            await response.write(_event(request, " word", "length" if index == asked - 1 else None))
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            closing = {"id": "scripted", "object": "chunk", "model": MODEL, "created": 0, "choices": [], "usage": usage}
            await response.write(_data(closing))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _is_chat(request: web.Request) -> bool:
    return request.path.endswith("chat/completions")


def _event(request: web.Request, text: str, finish_reason: str | None) -> bytes:
    choice: dict[str, object] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
    kind = "text_completion"
    if _is_chat(request):
        kind, choice["delta"] = "chat.completion.chunk", {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return _data({"id": "scripted", "object": kind, "model": MODEL, "created": 0, "choices": [choice]})


def _whole(request: web.Request, text: str, usage: dict[str, object]) -> dict[str, object]:
    choice: dict[str, object] = {"index": 0, "finish_reason": "length", "logprobs": None}
    kind = "text_completion"
    if _is_chat(request):
        kind, choice["message"] = "chat.completion", {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return {"id": "scripted", "object": kind, "model": MODEL, "created": 0, "choices": [choice], "usage": usage}


def _data(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


if __name__ == "__main__":
    web.run_app(ScriptedEndpoint(Script()).application(), host="127.0.0.1", port=int(sys.argv[1]), print=None)
