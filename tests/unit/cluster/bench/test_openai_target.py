"""The HTTP client against servers whose answers are written down: dialects, token counts, failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from benchmarks.scripted_endpoint import Script, ScriptedEndpoint
from cluster.bench.client_record import CHUNKS, TOKENIZER, USAGE
from cluster.bench.openai_target import OpenAIEndpoint, OpenAITarget
from cluster.bench.target import CHAT, COMPLETIONS, ON, Ask, EndpointFailed, Facts, Message, Reply, Stopwatch
from core.clock import WallClock
from tests.unit.cluster.bench.serving import served

QUICK = Script((0.0, 0.0), (0.0, 0.0))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def ask(url: str, prompt: Any = "one two three", **options: Any) -> tuple[Facts, Reply, Stopwatch]:
    count = options.pop("count_output", None)
    target = OpenAITarget(OpenAIEndpoint(f"{url}/v1", **options), count)
    try:
        facts = await target.open()
        watch = Stopwatch(WallClock())
        return facts, await target.send(target.prepare(Ask(prompt, 4)), watch), watch
    finally:
        await target.close()


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS])
async def test_an_answer_is_counted_by_the_server_and_timed_chunk_by_chunk(api: str) -> None:
    endpoint = ScriptedEndpoint(QUICK, cached_tokens=2)
    async with served(endpoint.application()) as url:
        facts, reply, watch = await ask(url, api=api)

    assert (facts.model, facts.max_model_len, facts.ignore_eos) == ("scripted", 65536, True)
    assert (facts.tokens_per_word, facts.overhead_tokens) == (1.0, 0.0)
    assert (reply.error, reply.text, reply.finish_reason) == (None, " word" * 4, "length")
    assert (reply.output_tokens, reply.counted_by) == (4, USAGE)
    assert (reply.prompt_tokens, reply.cached_tokens) == (3, 2)
    assert len(watch.chunk_at) == 4
    assert watch.sent_at <= watch.chunk_at[0] <= watch.chunk_at[-1] <= watch.ended_at


async def test_only_public_fields_are_sent_and_ignore_eos() -> None:
    endpoint = ScriptedEndpoint(QUICK)
    async with served(endpoint.application()) as url:
        await ask(url, api=CHAT, prompt=(Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
        await ask(url, api=COMPLETIONS, prompt=(1, 2, 3))

    chat, completion = endpoint.bodies
    assert set(chat) == {"model", "messages", "max_tokens", "temperature", "ignore_eos", "stream", "stream_options"}
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant", "user"]  # type: ignore[attr-defined]
    assert completion["prompt"] == [1, 2, 3]


def odd_server(answer: Handler, *, models: Any = None) -> web.Application:
    async def list_models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "odd"}]} if models is None else models)

    app = web.Application()
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/chat/completions", answer)
    return app


async def test_fields_that_a_server_refuses_are_left_out() -> None:
    """As OpenAI's reasoning models do: no ignore_eos, max_completion_tokens, no temperature."""

    async def strict(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        stray = {"ignore_eos", "max_tokens", "temperature"} & set(body)
        if stray:
            return web.json_response({"error": {"message": f"unknown: {stray}"}}, status=400)
        return await ScriptedEndpoint(QUICK)._answer(request, body, 3)

    async with served(odd_server(strict)) as url:
        facts, reply, _ = await ask(url, prompt=(Message("user", "a"),))

    assert (facts.ignore_eos, reply.error, reply.output_tokens) == (False, None, 4)


async def test_a_server_that_must_know_ignore_eos_and_does_not_cannot_be_used() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "ignore_eos is unknown"}}, status=400)

    async with served(odd_server(refuse)) as url:
        with pytest.raises(EndpointFailed, match="HTTP 400: ignore_eos is unknown"):
            await ask(url, ignore_eos=ON)


def streaming(*events: str, done: bool = True) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.json_response({"choices": []})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in (*events, *(["[DONE]"] if done else [])):
            await response.write(f"data: {event}\n\n".encode())
        await response.write_eof()
        return response

    return answer


def delta(finish: str | None = None, **fields: object) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


async def test_without_usage_the_tokenizer_counts_or_each_chunk_is_a_token() -> None:
    events = (delta(role="assistant", content=""), delta(content="one two"), delta(content=" three"), delta("stop"))
    async with served(odd_server(streaming(*events))) as url:
        facts, reply, watch = await ask(url, prompt=(Message("user", "a"),))
        _, counted, _ = await ask(url, prompt=(Message("user", "a"),), count_output=lambda text: len(text.split()))

    assert (facts.tokens_per_word, facts.overhead_tokens) == (1.0, 0.0)  # nobody counted: taken for it
    assert (reply.output_tokens, reply.counted_by, len(watch.chunk_at)) == (2, CHUNKS, 2)
    assert (counted.output_tokens, counted.counted_by) == (3, TOKENIZER)
    assert (reply.text, reply.finish_reason, reply.error) == ("one two three", "stop", None)


async def test_reasoning_and_tool_calls_are_output_too() -> None:
    events = (delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]), delta("stop", content="yes"))
    async with served(odd_server(streaming(*events))) as url:
        _, reply, watch = await ask(url, prompt=(Message("user", "a"),))

    assert (len(watch.chunk_at), reply.text) == (3, "yes")


@pytest.mark.parametrize(
    ("events", "done", "error"),
    [
        ((delta(content="a"), '{"error": {"message": "worker lost"}}'), True, "stream_error"),
        ((delta(content="a"),), False, "stream_ended"),
        ((delta("stop"),), True, "no_output"),
        (("{not json",), True, "stream_error"),
    ],
)
async def test_a_stream_that_breaks_is_a_failure(events: tuple[str, ...], done: bool, error: str) -> None:
    async with served(odd_server(streaming(*events, done=done))) as url:
        _, reply, _ = await ask(url, prompt=(Message("user", "a"),))

    assert reply.error == error


async def test_a_refused_request_is_a_failure_with_its_status() -> None:
    async def overloaded(request: web.Request) -> web.StreamResponse:
        if (await request.json()).get("stream"):
            return web.json_response({"error": {"message": "later"}}, status=429)
        return web.json_response({"choices": []})

    async with served(odd_server(overloaded)) as url:
        _, reply, watch = await ask(url, prompt=(Message("user", "a"),))

    assert (reply.error, watch.chunk_at) == ("http_429", [])
    assert "later" in (reply.error_message or "")


async def test_a_connection_that_breaks_is_a_failure() -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            return web.json_response({"choices": []})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"data: {delta(content='a')}\n\n".encode())
        assert request.transport is not None
        request.transport.close()
        await asyncio.sleep(0)
        return response

    async with served(odd_server(broken)) as url:
        _, reply, watch = await ask(url, prompt=(Message("user", "a"),))

    assert reply.error in ("ClientPayloadError", "ClientConnectionResetError", "ServerDisconnectedError")
    assert len(watch.chunk_at) <= 1


async def test_nobody_there_no_model_and_a_wrong_key_are_said_before_the_run() -> None:
    with pytest.raises(EndpointFailed, match=r"http://127\.0\.0\.1:9/v1"):
        await ask("http://127.0.0.1:9")

    async with served(odd_server(streaming(), models={"data": []})) as url:
        with pytest.raises(EndpointFailed, match="names no model"):
            await ask(url)

    async def forbidden(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "who are you"}}, status=401)

    app = web.Application()
    app.router.add_get("/v1/models", forbidden)
    async with served(app) as url:
        with pytest.raises(EndpointFailed, match=r"who are you \(--api-key\)"):
            await ask(url)


async def test_the_key_is_a_bearer_token() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("authorization"))
        return await streaming(delta("stop", content="a"))(request)

    async with served(odd_server(answer)) as url:
        await ask(url, prompt=(Message("user", "a"),), api_key="secret")

    assert set(seen) == {"Bearer secret"}
