"""The other APIs of the HTTP door by official clients: OpenAI's responses, Anthropic's messages; and vLLM's tokens."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from anthropic.resources import AsyncMessages
from openai.resources.responses import AsyncResponses

from cluster.config import HttpConfig, ServiceConfig
from cluster.tokenizer import Tokenizer
from core.errors import Overloaded, SequenceFailed
from core.request import SamplingParams
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import MODEL, Gateway, gateway
from tests.unit.cluster.test_http_gateway import make_door

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def url(service: Gateway) -> AsyncIterator[str]:
    door = make_door(service, service.config)
    await door.start()
    yield f"http://127.0.0.1:{door.port}"
    await door.stop(0)


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        yield client


@pytest.fixture
async def responses(url: str) -> AsyncIterator[AsyncResponses]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
        yield official.responses


@pytest.fixture
async def messages(url: str) -> AsyncIterator[AsyncMessages]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as official:
        yield official.messages


def prompt_of(service: Gateway) -> tuple[int, ...]:
    return service.router.requests[-1].prompt_token_ids


async def chat_prompt(service: Gateway, client: httpx.AsyncClient, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """The tokens that a chat with these messages has."""
    await client.post("/v1/chat/completions", json={"messages": messages})
    return prompt_of(service)


# ---- responses ----


async def test_the_official_client_gets_a_response(service, client, responses):
    answer = await responses.create(model="tiny", instructions="Hi", input="hello", max_output_tokens=32)
    assert answer.output_text == ANSWER
    assert (answer.object, answer.status, answer.incomplete_details, answer.store) == (
        "response",
        "completed",
        None,
        False,
    )
    assert (answer.instructions, answer.max_output_tokens) == ("Hi", 32)
    prompt = prompt_of(service)
    assert answer.usage.input_tokens == len(prompt)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.output_tokens == len(service.router.answer)
    assert prompt == await chat_prompt(service, client, [{"role": "system", "content": "Hi"}, *HELLO])


async def test_the_official_client_streams_a_response(responses):
    stream = await responses.create(model="tiny", input="hello", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert num_deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4 : 4 + num_deltas]) == ANSWER
    assert events[-1].response.output_text == ANSWER
    assert events[-1].response.usage.output_tokens > 0
    assert events[-1].response.id == events[0].response.id


async def test_a_response_that_used_up_its_tokens_is_incomplete(responses):
    answer = await responses.create(model="tiny", input="hello", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    stream = await responses.create(model="tiny", input="hello", max_output_tokens=2, stream=True)
    *_, last = [event async for event in stream]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")


async def test_a_response_gives_log_probabilities_if_asked(responses):
    asked = {"model": "tiny", "input": "hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = (await responses.create(**asked)).output[0].content
    assert len(part.logprobs) > 1
    assert {(len(entry.top_logprobs), entry.logprob) for entry in part.logprobs} == {(2, -0.5)}
    events = [event async for event in await responses.create(**asked, stream=True)]
    deltas = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert deltas == [entry.token for entry in part.logprobs]
    assert events[-1].response.output[0].content[0].logprobs == part.logprobs


async def test_an_answer_can_be_sent_back_as_history(service, client, responses):
    first = await responses.create(model="tiny", input="hello")
    await responses.create(
        model="tiny", input=[*HELLO, *[item.model_dump() for item in first.output], {"role": "user", "content": "and?"}]
    )
    history = [*HELLO, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and?"}]
    assert prompt_of(service) == await chat_prompt(service, client, history)


async def test_what_a_response_asks_for_arrives(service, client):
    body = {"input": "hello", "temperature": 0, "top_p": 0.5, "max_output_tokens": 9, "seed": 3, "top_k": 7}
    assert (await client.post("/v1/responses", json=body)).status_code == 200
    assert service.router.requests[0].sampling == SamplingParams(
        temperature=0, top_p=0.5, max_tokens=9, seed=3, top_k=7
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "b"}]}, "input[0].call_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
        ),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "x", "tools": [{"type": "web_search", "name": "f"}]}, "tools[0].type"),
        ({"input": "x", "tools": [{"type": "function", "name": "f"}]}, "tools"),  # the template has none
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": "x", "temperatur": 1}, "temperatur"),
        ({"input": "x", "stream_options": {}}, "stream_options"),
        ({"input": "x", "include": ["web_search_call.results"]}, "include[0]"),
        ({"input": "x", "top_logprobs": 2}, "top_logprobs"),
        ({"input": "x", "top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ],
)
async def test_a_bad_response_body_names_its_field(service, client, body, param):
    response = await client.post("/v1/responses", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert service.router.requests == []


async def test_an_error_in_the_middle_of_a_response_is_an_event(service, responses):
    service.router.error, service.router.error_after = SequenceFailed("lost", retryable=False), 3
    stream = await responses.create(model="tiny", input="hello", stream=True)
    *_, last = [event async for event in stream]
    assert (last.type, last.message, last.code) == ("error", "lost", "sequence_failed")


# ---- messages ----


async def test_anthropics_client_gets_a_message(service, client, messages):
    answer = await messages.create(model="tiny", system="Hi", messages=HELLO, max_tokens=32)
    (block,) = answer.content
    assert (block.type, block.text, answer.role, answer.model) == ("text", ANSWER, "assistant", "tiny")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    prompt = prompt_of(service)
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (len(prompt) - 3, 3)
    assert answer.usage.output_tokens == len(service.router.answer)
    counted = await messages.count_tokens(model="tiny", system="Hi", messages=HELLO)
    assert counted.input_tokens == len(prompt)
    assert prompt == await chat_prompt(service, client, [{"role": "system", "content": "Hi"}, *HELLO])


async def test_anthropics_client_streams_a_message(service, messages):
    async with messages.stream(model="tiny", messages=HELLO, max_tokens=32) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    assert text == ANSWER == message.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(service.router.answer)
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len(prompt_of(service))


async def test_a_message_ends_as_anthropic_says(service, messages):
    stopped = await messages.create(model="tiny", messages=HELLO, max_tokens=32, stop_sequences=["stop"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "stop")
    assert stopped.content[0].text == ANSWER.partition("stop")[0]
    cut = await messages.create(model="tiny", messages=HELLO, max_tokens=2)
    assert cut.stop_reason == "max_tokens"


async def test_text_blocks_and_hints_for_caches_are_understood(service, client, messages):
    block = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    await messages.create(model="tiny", messages=[{"role": "user", "content": [block]}], max_tokens=4)
    assert prompt_of(service) == await chat_prompt(service, client, HELLO)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: must be one of user, assistant"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "must end with the user's turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools: the served model's chat template"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: needs tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "only",
        ),
    ],
)
async def test_a_bad_message_body_is_refused_in_anthropics_words(service, client, change, said):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4} | change
    response = await client.post("/v1/messages", json={k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400
    assert (response.json()["type"], response.json()["error"]["type"]) == ("error", "invalid_request_error")
    assert said in response.json()["error"]["message"]
    assert service.router.requests == []


async def test_errors_of_messages_have_anthropics_types(service, messages):
    with pytest.raises(anthropic.NotFoundError, match="other"):
        await messages.create(model="other", messages=HELLO, max_tokens=4)
    with pytest.raises(anthropic.NotFoundError, match="other"):
        await messages.count_tokens(model="other", messages=HELLO)
    service.router.error = Overloaded("full")
    with pytest.raises(anthropic.RateLimitError, match="full"):
        await messages.create(model="tiny", messages=HELLO, max_tokens=4)
    service.router.error, service.router.error_after = SequenceFailed("lost", retryable=False), 3
    with pytest.raises(anthropic.APIStatusError, match="lost"):
        async with messages.stream(model="tiny", messages=HELLO, max_tokens=4) as stream:
            await stream.get_final_message()


# ---- tools that a model calls of its own accord ----

TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLING = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'
)
NOBODY = '\n<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'


@pytest.fixture
async def tool_url(tmp_path: Path) -> AsyncIterator[str]:
    """A service whose model's template has a place for tools, and that answers ``CALLING``."""
    folder = tiny_tokenizers.save(tmp_path, chat_template=tiny_tokenizers.TOOL_TEMPLATE)
    config = ServiceConfig(model=str(folder), served_model_name="tiny", http=HttpConfig(port=0))
    service = gateway(Tokenizer.load(folder), CALLING, config)
    service.membership.served = replace(MODEL, max_model_len=400)
    door = make_door(service, config)
    await door.start()
    yield f"http://127.0.0.1:{door.port}"
    await door.stop(0)
    value = service.metrics.registry.get_sample_value
    assert value("prfaas_tool_calls_total") == value("prfaas_malformed_tool_calls_total") == 2


async def test_a_chat_gives_the_calls_and_the_text_around_them(tool_url: str):
    asked = {"model": "tiny", "messages": HELLO, "tools": [{"type": "function", "function": TOOL}]}
    async with openai.AsyncOpenAI(base_url=f"{tool_url}/v1", api_key="none", max_retries=0) as client:
        (choice,) = (await client.chat.completions.create(**asked)).choices
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Köln"})
        assert (choice.message.content, choice.finish_reason) == ("Let me see." + NOBODY, "tool_calls")

        stream = await client.chat.completions.create(**asked, stream=True)
        text, calls, reasons = "", [], []
        async for chunk in stream:
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            reasons.append(choice.finish_reason)
        assert text == "Let me see." + NOBODY
        assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
            (0, "get_weather", '{"city": "Köln"}')
        ]
        assert reasons[-1] == "tool_calls"


async def test_a_response_has_items_of_calls_between_those_of_text(tool_url: str):
    asked = {"model": "tiny", "input": "hello", "tools": [{"type": "function", **TOOL}]}
    async with openai.AsyncOpenAI(base_url=f"{tool_url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.responses.create(**asked)
        assert [item.type for item in whole.output] == ["message", "function_call"]
        assert whole.output_text == "Let me see." + NOBODY
        *_, last = [event async for event in await client.responses.create(**asked, stream=True)]
        assert [item.type for item in last.response.output] == ["message", "function_call", "message"]
        assert last.response.output[1].arguments == '{"city": "Köln"}'
        assert last.response.output_text == whole.output_text


async def test_a_message_has_blocks_of_calls_between_those_of_text(tool_url: str):
    tool = {"name": "get_weather", "input_schema": TOOL["parameters"]}
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "tools": [tool]}
    async with anthropic.AsyncAnthropic(base_url=tool_url, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(**asked)
        assert [block.type for block in whole.content] == ["text", "tool_use"]
        assert whole.content[1].input == {"city": "Köln"}
        async with client.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["text", "tool_use", "text"]
        assert (final.content[1].input, final.stop_reason) == ({"city": "Köln"}, "tool_use")
        counted = await client.messages.count_tokens(model="tiny", messages=HELLO, tools=[tool])
        assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


# ---- tokens ----


async def test_text_becomes_tokens_and_tokens_become_text(service, client):
    answer = (await client.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})).json()
    await client.post("/v1/completions", json={"prompt": "hello world"})
    assert tuple(answer["tokens"]) == prompt_of(service)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MODEL.max_model_len)
    assert "".join(answer["token_strs"]).endswith("hello world")
    back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back["prompt"].endswith("hello world")


async def test_a_chat_becomes_the_tokens_that_the_model_would_get(service, client):
    answer = (await client.post("/tokenize", json={"messages": HELLO})).json()
    assert (tuple(answer["tokens"]), answer["token_strs"]) == (await chat_prompt(service, client, HELLO), None)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": ""}, 400, "prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "a"}]}, 400, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [MODEL.vocab_size]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
async def test_a_bad_body_about_tokens_names_its_field(client, path, body, status, param):
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/audio/speech", "/v1/batches"])
async def test_what_is_not_served_is_refused_by_name(client, path):
    response = await client.post(path, content=json.dumps({"input": "x"}))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unsupported_api"
    assert path in response.json()["error"]["message"]
