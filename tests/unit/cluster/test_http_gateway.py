"""The HTTP door, through a real server, httpx and the official openai client."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest

from cluster.config import AdmissionConfig, HttpConfig, ServiceConfig
from cluster.generation import Generation
from cluster.http_gateway import HttpGateway
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    GrantRefused,
    InvalidConfig,
    InvalidRequest,
    NoRoute,
    Overloaded,
    PrfaasError,
    SequenceFailed,
)
from core.request import SamplingParams, Slo
from core.tracing import TraceContext
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import MODEL, Gateway

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


def make_door(service: Gateway, config: ServiceConfig) -> HttpGateway:
    return HttpGateway(
        service.generation,
        service.membership,
        service.metrics,
        config,
        service.clock,
        lambda: {"plan": {"mode": "dual"}},
        lambda limit: {"requests": [{"request_id": str(limit)}]},
    )


@pytest.fixture
async def door(service: Gateway) -> AsyncIterator[HttpGateway]:
    gateway = make_door(service, service.config)
    await gateway.start()
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def client(door: HttpGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}", timeout=20) as client:
        yield client


@pytest.fixture
async def official(door: HttpGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{door.port}/v1", api_key="none", max_retries=0
    ) as official:
        yield official


async def events(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    """The JSON of every event; the last line must be [DONE]."""
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ---- answers ----


async def test_the_official_client_gets_a_chat(service, official):
    answer = await official.chat.completions.create(model="tiny", messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.usage.completion_tokens == len(service.router.answer)
    assert answer.usage.prompt_tokens == len(service.router.requests[0].prompt_token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


async def test_the_official_client_streams_a_chat(official):
    stream = await official.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_official_client_gets_and_streams_a_completion(official):
    answer = await official.completions.create(model="tiny", prompt="hello", max_tokens=60)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    stream = await official.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


async def test_the_official_client_lists_models(official):
    (model,) = [model async for model in official.models.list()]
    assert (model.id, model.owned_by) == ("tiny", "prfaas")
    assert (await official.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await official.models.retrieve("other")


async def test_timings_and_worker_headers_come_with_the_answer(client):
    response = await client.post(CHAT, json={"model": "tiny", "messages": HELLO})
    assert response.headers["x-prfaas-prefill-worker"] == "prefill-0"
    assert response.headers["x-prfaas-decode-worker"] == "decode-0"
    (timing,) = response.json()["prfaas"]["timing"]
    assert (timing["index"], timing["prefill_worker"], timing["bytes_shipped"]) == (0, "prefill-0", 4096)
    assert (timing["pull_outcome"], timing["pulled_tokens"], timing["bytes_pulled"]) == ("pulled", 2, 256)
    assert (timing["expected_ttft_s"], timing["expected_bytes_shipped"], timing["fallback"]) == (0.2, 2048, "link_down")
    assert timing["tokenize_s"] >= 0
    *_, last = await events(client, CHAT, {"messages": HELLO})
    assert last["prfaas"]["timing"][0]["decode_worker"] == "decode-0"


async def test_no_event_waits_for_the_client_to_acknowledge_the_last(door, client):
    await client.get("/health")

    (connection,) = door._server.server_state.connections

    assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_usage_is_streamed_only_when_asked_for(client):
    assert all("usage" not in event for event in await events(client, CHAT, {"messages": HELLO}))


async def test_n_choices_are_numbered(client):
    answer = (await client.post(CHAT, json={"messages": HELLO, "n": 2})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert len(answer["prfaas"]["timing"]) == 2
    streamed = await events(client, CHAT, {"messages": HELLO, "n": 2})
    texts = ["", ""]
    for event in streamed:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [ANSWER, ANSWER]


async def test_a_chat_has_logprobs_with_bytes(client):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    answer = (await client.post(CHAT, json=body)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content) == ANSWER.encode()
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(content)
    streamed = [e["choices"][0]["logprobs"] for e in await events(client, CHAT, body)]
    assert [token for part in streamed if part for token in part["content"]] == content


async def test_logprobs_without_top_logprobs_are_the_chosen_tokens_only(client):
    answer = (await client.post(CHAT, json={"messages": HELLO, "logprobs": True})).json()
    assert all(token["top_logprobs"] == [] for token in answer["choices"][0]["logprobs"]["content"])
    answer = (await client.post(CHAT, json={"messages": HELLO})).json()
    assert answer["choices"][0]["logprobs"] is None


async def test_a_completion_has_logprobs_with_offsets(client):
    body = {"prompt": "hello", "logprobs": 1, "max_tokens": 60}
    logprobs = (await client.post(COMPLETION, json=body)).json()["choices"][0]["logprobs"]
    size = len(logprobs["tokens"])
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"]) == size
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    streamed = [e["choices"][0]["logprobs"] for e in await events(client, COMPLETION, body)]
    assert [offset for part in streamed if part for offset in part["text_offset"]] == logprobs["text_offset"]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("hello", 1), (["hello", "you"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
)
async def test_every_form_of_prompt_is_taken(service, client, prompt, num_prompts):
    body = {"prompt": prompt, "n": 2, "max_tokens": 60}
    answer = (await client.post(COMPLETION, json=body)).json()
    assert [c["index"] for c in answer["choices"]] == list(range(2 * num_prompts))
    assert {c["text"] for c in answer["choices"]} == {ANSWER}
    assert answer["usage"]["completion_tokens"] == 2 * num_prompts * len(service.router.answer)
    assert answer["usage"]["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in service.router.requests)
    streamed = await events(client, COMPLETION, body)
    assert {event["choices"][0]["index"] for event in streamed} == set(range(2 * num_prompts))


async def test_a_completion_has_openais_16_tokens_by_default(service, client):
    await client.post(COMPLETION, json={"prompt": "hello"})
    assert service.router.requests[0].sampling.max_tokens == 16


async def test_every_sampling_field_arrives(service, client):
    body = {
        "messages": HELLO,
        "max_completion_tokens": 9,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": 42,
        "stop": "x",
        "stop_token_ids": [2],
        "min_tokens": 1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": True,
        "top_logprobs": 3,
        "cache_salt": "tenant",
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
    }
    assert (await client.post(CHAT, json=body)).status_code == 200
    (sent,) = service.router.requests
    assert sent.salt == b"tenant"
    assert sent.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.2,
        logit_bias={5: -100.0, 6: 1.5},
        seed=42,
        stop=("x",),
        stop_token_ids=(2,),
        min_tokens=1,
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        logprobs=3,
    )


async def test_null_means_the_default(service, client):
    fields = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "tools", "echo", "top_k", "user")
    assert (await client.post(CHAT, json={"messages": HELLO} | dict.fromkeys(fields))).status_code == 200
    sampling = service.router.requests[0].sampling
    assert (sampling.temperature, sampling.n, sampling.stop, sampling.seed) == (1.0, 1, (), 7)


async def test_stop_strings_end_the_text(client):
    answer = (await client.post(CHAT, json={"messages": HELLO, "stop": ["zzz", " world"]})).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello 🙂", "stop")
    assert choice["stop_reason"] == " world"


async def test_content_parts_history_and_the_developer_role_are_understood(service, client, official):
    first = await official.chat.completions.create(model="tiny", messages=HELLO)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "c"},
    ]
    assert (await client.post(CHAT, json={"messages": messages, "max_tokens": 1})).status_code == 400  # too long
    service.membership.served = replace(MODEL, max_model_len=999)
    assert (await client.post(CHAT, json={"messages": messages})).status_code == 200
    text = service.tokenizer.decode(service.router.requests[-1].prompt_token_ids)
    assert text == f"system\nbe brief\nuser\na\nb\nassistant\n{ANSWER}\nuser\nc\nassistant\n"


async def test_the_request_id_is_the_clients_or_a_new_one(client):
    for path in ("/live", "/nowhere"):
        assert (await client.get(path, headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    made_up = {(await client.get("/live")).headers["x-request-id"] for _ in range(2)}
    assert len(made_up) == 2
    assert (await client.get("/live", headers={"x-request-id": "a b"})).headers["x-request-id"] != "a b"
    response = await client.post(CHAT, json={"messages": HELLO, "stream": True}, headers={"x-request-id": "s"})
    assert response.headers["x-request-id"] == "s"


# ---- refusals ----

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (CHAT, {"messages": [*HELLO, {"role": "user", "content": None}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 99}]}, "messages"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": "9"}, "max_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"max_tokens": 64}, "max_tokens"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": 10**30}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 64}, "max_completion_tokens"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": 2.5}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"temperature": float("nan")}, "temperature"),
    (CHAT, {"temperature": float("inf")}, "temperature"),
    (CHAT, {"temperature": 10**400}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 129}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"seed": 2**63}, "seed"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop": ["a", 5]}, "stop"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [350]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"350": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": [1]}, "logit_bias"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    (CHAT, {"min_tokens": 99}, "min_tokens"),
    (CHAT, {"model": 7}, "model"),
    (CHAT, {"max_token": 7}, "max_token"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"tools": [{"type": "web_search", "function": {"name": "f"}}]}, "tools[0].type"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # the template has none
    (CHAT, {"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (CHAT, {"tool_choice": "maybe"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"functions": [{}]}, "functions"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type"),
    (CHAT, {"guided_json": {}}, "guided_json"),
    (CHAT, {"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    (CHAT, {"response_format": {"type": "json_object"}, "min_tokens": 1}, "min_tokens"),
    (COMPLETION, {}, "prompt"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": None}, "prompt"),
    (COMPLETION, {"prompt": 5}, "prompt"),
    (COMPLETION, {"prompt": [5, "x"]}, "prompt"),
    (COMPLETION, {"prompt": [True]}, "prompt"),
    (COMPLETION, {"prompt": [-5]}, "prompt"),
    (COMPLETION, {"prompt": [350]}, "prompt"),
    (COMPLETION, {"prompt": ["x", ""]}, "prompt[1]"),
    (COMPLETION, {"prompt": [[5], []]}, "prompt[1]"),
    (COMPLETION, {"prompt": ["x"] * 257}, "prompt"),
    (COMPLETION, {"prompt": "a\ud800"}, "prompt"),
    (COMPLETION, {"prompt": [5] * 64}, "prompt"),
    (COMPLETION, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "x", "echo": True}, "echo"),
    (COMPLETION, {"prompt": "x", "best_of": 3}, "best_of"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETION, {"prompt": "x", "logprobs": True}, "logprobs"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_bad_request_names_its_field_and_the_service_stays_healthy(service, client, stream):
    for path, changes, param in BAD:
        body = ({"messages": HELLO} if path == CHAT and changes and "messages" not in changes else {}) | changes
        body = ({"stream": True} if stream and "stream_options" not in body else {}) | body
        response = await client.post(path, content=json.dumps(body))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), (changes, error)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
        assert error["message"].startswith(param)
    assert service.router.requests == []
    labels = {"door": "http", "outcome": "invalid"}
    assert service.metrics.registry.get_sample_value("prfaas_requests_total", labels) == len(BAD)
    assert (await client.get("/health")).status_code == 200
    assert (await client.post(CHAT, json={"messages": HELLO})).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff", b"null", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
async def test_a_body_that_is_no_json_object_is_refused(client, content):
    response = await client.post(CHAT, content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")


async def test_another_model_is_not_found(official):
    with pytest.raises(openai.NotFoundError) as caught:
        await official.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_a_body_of_10_mb_is_refused_with_413(client):
    body = {"messages": [{"role": "user", "content": "x" * 10_000_000}]}
    response = await client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (413, "body")
    assert (await client.post(CHAT, json={"messages": HELLO})).status_code == 200


async def test_a_body_without_a_length_is_limited_too(client):
    async def parts():
        for _ in range(10):
            yield b"x" * 1_000_000

    response = await client.post(CHAT, content=parts())
    assert response.status_code == 413


async def test_a_client_that_asks_first_is_refused_before_it_sends(door):
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\nexpect: 100-continue\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    await writer.wait_closed()


async def test_unknown_paths_and_methods_have_openais_error_body(client):
    response = await client.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    assert (await client.get(CHAT)).status_code == 405


# ---- errors of the cluster ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=2.5), 429, "rate_limit_error"),
        (NoRoute("empty"), 503, "service_unavailable_error"),
        (DeadlineExceeded("late"), 504, "timeout_error"),
        (Cancelled("aborted"), 499, "cancelled_error"),
        (SequenceFailed("broken", retryable=False), 500, "server_error"),
        (GrantRefused("no pages"), 503, "service_unavailable_error"),
        (InvalidRequest("prompt", "can never fit"), 400, "invalid_request_error"),
        (PrfaasError("strange"), 500, "server_error"),
    ],
)
async def test_what_happens_before_the_first_token_has_its_own_status(service, client, error, status, kind, stream):
    service.router.error = error
    response = await client.post(CHAT, json={"messages": HELLO, "stream": stream})
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.json()["error"]["message"] == str(error)
    retry_after = {Overloaded: "3", NoRoute: "1"}.get(type(error))
    assert response.headers.get("retry-after") == retry_after


async def test_a_refusal_names_the_bound_what_was_predicted_what_is_allowed_and_when_to_come_again(service, client):
    service.router.error = Overloaded("late", retry_after_s=2.5, reason="slo_ttft", predicted=4.0, allowed=1.5)

    response = await client.post(CHAT, json={"messages": HELLO})

    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.headers["x-prfaas-rejection"] == "slo_ttft"
    assert response.json()["error"] == {
        "message": "late",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    said = {"reason": "slo_ttft", "predicted": 4.0, "allowed": 1.5, "retry_after_s": 2.5}
    assert response.json()["prfaas"] == {"rejection": said}


# ---- objectives and priority ----


async def test_objectives_and_priority_come_by_header(service, client):
    headers = {"x-slo-ttft-ms": "1500", "x-slo-tpot-ms": "12.5", "x-priority": "7"}

    await client.post(COMPLETION, json={"prompt": ["a", "b"]}, headers=headers)

    assert [(r.slo, r.priority) for r in service.router.requests] == [(Slo(1.5, 0.0125), 7)] * 2


async def test_the_bodys_priority_is_vllms_and_the_header_goes_before_it(service, client):
    await client.post(CHAT, json={"messages": HELLO, "priority": -4})
    await client.post(CHAT, json={"messages": HELLO, "priority": -4}, headers={"x-priority": "-9"})
    await client.post(CHAT, json={"messages": HELLO, "priority": None})

    assert [r.priority for r in service.router.requests] == [4, -9, 0]


async def test_what_a_request_leaves_open_is_promised_by_the_configuration(service, tiny_tokenizer):
    config = replace(service.config, admission=AdmissionConfig(ttft_slo_s=3.0, tpot_slo_s=0.1))
    generation = Generation(
        service.router, service.membership, tiny_tokenizer, service.metrics, config, service.clock, lambda: 7
    )
    door = make_door(replace(service, generation=generation), config)
    await door.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}", timeout=20) as client:
        await client.post(CHAT, json={"messages": HELLO}, headers={"x-slo-ttft-ms": "500"})
    await door.stop(0)

    assert service.router.requests[0].slo == Slo(0.5, 0.1)


@pytest.mark.parametrize(
    ("header", "given", "said"),
    [
        ("x-slo-ttft-ms", "0", "must be a number of milliseconds above 0, got '0'"),
        ("x-slo-ttft-ms", "soon", "must be a number of milliseconds above 0, got 'soon'"),
        ("x-slo-tpot-ms", "nan", "must be a number of milliseconds above 0, got 'nan'"),
        ("x-slo-tpot-ms", "inf", "must be a number of milliseconds above 0, got 'inf'"),
        ("x-priority", "1.5", "must be an integer between -100 and 100, got '1.5'"),
        ("x-priority", "101", "must be an integer between -100 and 100, got '101'"),
    ],
)
async def test_a_wrong_header_is_named_with_what_is_allowed(service, client, header, given, said):
    response = await client.post(CHAT, json={"messages": HELLO}, headers={header: given})

    assert response.status_code == 400
    assert (response.json()["error"]["param"], response.json()["error"]["message"]) == (header, f"{header}: {said}")
    assert service.router.requests == []


@pytest.mark.parametrize("given", [101, -101, 1.5, "1", True])
async def test_a_wrong_priority_in_the_body_is_named(service, client, given):
    response = await client.post(CHAT, json={"messages": HELLO, "priority": given})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


async def test_the_answer_says_which_objectives_were_met(client):
    body = (await client.post(CHAT, json={"messages": HELLO})).json()
    (timing,) = body["prfaas"]["timing"]
    assert {k: timing[k] for k in ("admission_s", "slo_ttft_met", "slo_tpot_met", "slo_miss_expected")} == {
        "admission_s": 0.125,
        "slo_ttft_met": True,
        "slo_tpot_met": None,
        "slo_miss_expected": "slo_ttft: late",
    }


async def test_an_error_in_the_middle_is_an_event(service, client, official):
    service.router.error, service.router.error_after = SequenceFailed("lost", retryable=False), 3
    *_, last = await events(client, CHAT, {"messages": HELLO})
    assert last["error"]["message"] == "lost"
    stream = await official.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        [chunk async for chunk in stream]


async def test_one_prompt_that_fails_fails_the_whole_and_frees_the_others(service, client):
    service.router.error, service.router.error_after = Overloaded("full"), 3
    response = await client.post(COMPLETION, json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert service.router.num_inflight == 0


async def test_an_error_of_ours_tells_nothing(service, client, caplog):
    service.membership.model = lambda: 1 / 0
    response = await client.post(CHAT, json={"messages": HELLO})
    assert (response.status_code, response.json()["error"]["message"]) == (500, "internal error, see the gateway's log")
    assert "ZeroDivisionError" in caplog.text


async def test_without_workers_requests_and_health_are_unavailable(service, client):
    service.membership.served = None
    assert (await client.post(CHAT, json={"messages": HELLO})).status_code == 503
    response = await client.get("/health")
    assert (response.status_code, response.json()["reason"]) == (503, "no worker has registered yet")
    assert (await client.get("/live")).status_code == 200


# ---- clients that go away, and stopping ----


@pytest.mark.parametrize("body", [{"stream": True}, {}, {"n": 3}])
async def test_a_client_that_goes_away_closes_the_router(service, door, body):
    service.router.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as client:
        asking = asyncio.create_task(client.post(CHAT, json={"messages": HELLO} | body))
        await service.router.started.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.wait_for(service.router.closed.wait(), 5)
    assert service.router.num_inflight == 0


async def test_a_client_that_goes_away_frees_every_prompt(service, door):
    service.router.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as client:
        asking = asyncio.create_task(client.post(COMPLETION, json={"prompt": ["a", "b", "c"], "max_tokens": 60}))
        await service.router.started.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    while service.router.num_inflight:
        await asyncio.sleep(0.01)


async def test_stop_lets_a_running_request_end(service, door, client):
    service.router.gate.clear()
    asking = asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
    await service.router.started.wait()
    stopping = asyncio.create_task(door.stop(5))
    await asyncio.sleep(0.2)
    service.router.gate.set()
    assert (await asking).json()["choices"][0]["message"]["content"] == ANSWER
    await stopping
    with pytest.raises(httpx.ConnectError):
        await client.get("/live")


async def test_stop_cancels_what_does_not_end(service, door, client):
    service.router.gate.clear()
    asking = asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
    await service.router.started.wait()
    await door.stop(0)
    await asyncio.wait_for(service.router.closed.wait(), 5)
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_taken_port_is_named(service, door):
    second = make_door(service, ServiceConfig(model="m", http=HttpConfig(port=door.port)))
    with pytest.raises(InvalidConfig) as caught:
        await second.start()
    assert caught.value.key == "http.port"


# ---- what operators ask for ----


async def test_metrics_are_prometheus_text(client):
    await client.post(CHAT, json={"messages": HELLO})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'prfaas_requests_total{door="http",outcome="ok"} 1.0' in response.text


async def test_status_is_what_the_gateway_says_of_itself(client):
    assert (await client.get("/status")).json() == {"plan": {"mode": "dual"}}


async def test_version_and_the_api_page_are_there(client):
    assert (await client.get("/version")).json()["version"]
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {CHAT, COMPLETION, "/v1/models", "/health", "/live", "/metrics", "/status", "/version"} <= set(paths)


async def test_the_page_and_its_files_are_served_and_load_nothing_from_elsewhere(client):
    page = await client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert f'"{name}"' in page.text
        file = await client.get(f"/{name}")
        assert (file.status_code, file.headers["content-type"].split(";")[0]) == (200, kind)
        assert "http://" not in file.text.replace("http://www.w3.org/", "")
        assert "https://" not in file.text


async def test_recent_requests_are_json_and_their_number_is_checked(client):
    assert (await client.get("/requests")).json() == {"requests": [{"request_id": "0"}]}
    assert (await client.get("/requests?limit=7")).json() == {"requests": [{"request_id": "7"}]}
    for wrong in ("-1", "x", "1e3", "12345678"):
        answer = await client.get("/requests", params={"limit": wrong})
        assert (answer.status_code, "limit" in answer.json()["error"]["message"]) == (400, True)


async def test_without_the_page_there_are_neither(service):
    config = replace(service.config, http=replace(service.config.http, page=False))
    door = make_door(service, config)
    await door.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as client:
            codes = [(await client.get(path)).status_code for path in ("/", "/page.js", "/requests", "/live")]
    finally:
        await door.stop(0)
    assert codes == [404, 404, 404, 200]


async def test_a_request_is_found_by_the_clients_name_and_belongs_to_the_clients_trace(client, service):
    parent = TraceContext.new()
    headers = {"x-request-id": "mine", "traceparent": str(parent)}
    await client.post(COMPLETION, json={"prompt": "hello"}, headers=headers)

    (request,) = service.router.requests
    assert re.fullmatch("mine-[0-9a-f]{8}", request.request_id)
    assert request.trace is not None
    assert request.trace.trace_id == parent.trace_id
    (recent,) = service.requests.latest()
    assert (recent.request_id, recent.outcome) == (request.request_id, "ok")
    spans = {span.name: span for span in service.spans.spans}
    assert spans["request"].context == request.trace
    assert spans["request"].parent == parent
    assert {name for name, span in spans.items() if span.parent == request.trace} >= {"receive", "tokenize", "route"}


async def test_a_client_may_ask_not_to_be_traced(client, service):
    await client.post(COMPLETION, json={"prompt": "a"}, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"})
    await client.post(COMPLETION, json={"prompt": "a"}, headers={"traceparent": "nonsense"})

    assert [request.trace is None for request in service.router.requests] == [True, False]
