"""Structured output and tools through a whole service, by the official HTTP clients, over gRPC, and token by token: the
same disaggregated, colocated, and as transformers generates with the library's own masks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anthropic
import grpc
import openai
import pytest

from cluster.config import GrpcConfig, HttpConfig, ServiceConfig
from cluster.finished_requests import RecentRequests
from cluster.generation import Generation
from cluster.grammar_check import GrammarChecker
from cluster.grpc_gateway import GrpcGateway
from cluster.http_gateway import HttpGateway
from cluster.internal_tls import TlsDecision
from cluster.metrics import Metrics
from cluster.tokenizer import Tokenizer
from core.clock import WallClock
from core.request import FinishReason, SamplingParams
from engine.config import EngineConfig
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.constrained_model import EOS, GRAMMARS, ConstrainedReference, save_constrained_model
from tests.unit.cluster.scripted_router import ScriptedLinks, ScriptedPlanner
from tests.unit.cluster.tiny_tokenizers import TOOL_TEMPLATE

pytestmark = pytest.mark.timeout(120)

ENGINE = EngineConfig(dtype="float32", page_size=4, num_pages=512, max_batch_tokens=64, max_batch_size=8, threads=1)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Says it.", "parameters": SCHEMA}}
ASK = [{"role": "user", "content": "the quick fox?"}]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ConstrainedReference:
    return ConstrainedReference(save_constrained_model(tmp_path_factory.mktemp("models") / "tools", TOOL_TEMPLATE))


@asynccontextmanager
async def doors(cluster: LiveCluster, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """The doors of the service, as launch.py makes them: HTTP's URL and gRPC's address."""
    config = ServiceConfig(
        model=str(folder), served_model_name="tiny", http=HttpConfig(port=0), grpc=GrpcConfig(port=0)
    )
    planner = ScriptedPlanner()
    metrics = Metrics(cluster.membership, cluster.router, lambda *_: None, planner)
    grammars = GrammarChecker(folder, config.structured_output, metrics.grammar)
    clock = WallClock()
    generation = Generation(
        cluster.router, cluster.membership, Tokenizer.load(folder), metrics, config, clock, grammars=grammars
    )
    router, membership = cluster.router, cluster.membership
    http = HttpGateway(generation, membership, metrics, config, clock, dict, lambda limit: {"requests": []})
    off, requests = TlsDecision(False, "test"), RecentRequests()
    rpcs = GrpcGateway(generation, router, membership, ScriptedLinks(), planner, config, clock, off, requests)
    await http.start()
    await rpcs.start()
    try:
        yield f"http://127.0.0.1:{http.port}", f"127.0.0.1:{rpcs.port}"
    finally:
        await rpcs.stop(0)
        await http.stop(0)
        await grammars.close()


async def test_tokens_are_the_models_own_and_clients_get_what_they_ask_for(reference: ConstrainedReference) -> None:
    told = [await _ask_everything(reference, num_prefill) for num_prefill in (1, 0)]
    assert told[0] == told[1], "seeds decide what a random model says, not who computes it"


async def _ask_everything(reference: ConstrainedReference, num_prefill: int) -> list[object]:
    """Without a prefill worker the decode worker does both."""
    async with live_cluster(str(reference.folder), engine=ENGINE, num_prefill=num_prefill) as cluster:
        for number, grammar in enumerate(GRAMMARS):
            prompt = [20 + number, 30, 40, 50, 60]
            expected = reference.expected(prompt, grammar, 40)
            greedy = SamplingParams(temperature=0.0, max_tokens=40, grammar=grammar)
            answer = await cluster.generate(prompt, greedy)
            assert answer.tokens == expected
            ended = FinishReason.STOP if expected[-1] == EOS else FinishReason.LENGTH
            assert answer.finish_reasons[0] is ended
            assert (answer.timing.prefill_worker is not None) == bool(num_prefill)
        async with doors(cluster, reference.folder) as (url, address):
            told = [await ask(url) for ask in (_json_schema, _chat_tools, _responses_tools, _messages_tools)]
            arguments = told[1]
            assert await _grpc_tools(address) == arguments, "the same seed, one tool: the same call at every door"
        await cluster.check_integrity()
    return told


async def _json_schema(url: str) -> object:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        form = {"type": "json_schema", "json_schema": {"name": "trip", "strict": True, "schema": SCHEMA}}
        answer = await client.chat.completions.create(
            model="tiny", messages=ASK, response_format=form, n=3, seed=5, max_tokens=400, logprobs=True, top_logprobs=1
        )
        trips = [json.loads(choice.message.content) for choice in answer.choices]
        assert all(trip["city"] in ("Ulm", "Bonn") and 1 <= trip["days"] <= 9 for trip in trips)
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        assert all(choice.logprobs.content for choice in answer.choices)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
        with pytest.raises(openai.BadRequestError, match=r"response_format.json_schema.schema: .*uniqueItems"):
            await client.chat.completions.create(model="tiny", messages=ASK, response_format=form)
        choice = await client.completions.create(
            model="tiny", prompt="x", seed=1, extra_body={"structured_outputs": {"choice": ["left", "right"]}}
        )
        assert choice.choices[0].text in ("left", "right")
        text = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
        response = await client.responses.create(model="tiny", input="x", text=text, extra_body={"seed": 2})
        json.loads(response.output_text)
        return trips, choice.choices[0].text, response.output_text


async def _chat_tools(url: str) -> object:
    asked = {"model": "tiny", "messages": ASK, "tools": [TOOL], "seed": 3, "max_tokens": 400}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chosen = {"type": "function", "function": {"name": "get_weather"}}
        answer = await client.chat.completions.create(**asked, tool_choice=chosen, parallel_tool_calls=False)
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert (call.type, call.function.name, set(arguments)) == ("function", "get_weather", {"city", "days"})

        stream = await client.chat.completions.create(
            **asked, tool_choice="required", parallel_tool_calls=False, stream=True
        )
        chunks = [chunk async for chunk in stream]
        deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or ()]
        assert [(delta.index, delta.function.name) for delta in deltas] == [(0, "get_weather")]
        assert json.loads(deltas[0].function.arguments) == arguments, "the same seed, one tool: the same call"
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        history = [*ASK, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        again = await client.chat.completions.create(
            **asked | {"messages": history, "max_tokens": 4}, tool_choice="auto"
        )
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens
        wrong = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
        with pytest.raises(openai.BadRequestError, match=r"tools\[0\].function: Unimplemented"):
            await client.chat.completions.create(**asked | {"tools": [wrong]}, tool_choice="required")
        return arguments


async def _grpc_tools(address: str) -> object:
    function = TOOL["function"]
    chat = pb.ChatInput(
        messages=[pb.ChatMessage(**ASK[0])],
        tools=[pb.Tool(name="get_weather", description="Says it.", parameters=json.dumps(function["parameters"]))],
        tool_choice=pb.ToolChoice(name="get_weather"),
        parallel_tool_calls=False,
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.GenerationStub(channel)
        asked = pb.GenerateRequest(chat=chat, sampling_params=pb.SamplingParams(seed=3, max_tokens=400))
        complete = [message.complete async for message in stub.Generate(asked)][-1]
        assert (complete.finish_reason, complete.text) == ("tool_calls", "")
        (call,) = complete.tool_calls

        chat.messages.add(role="assistant", tool_calls=[call])
        chat.messages.add(role="tool", tool_call_id=call.id, content="sunny")
        chat.tool_choice.mode = "auto"
        asked = pb.GenerateRequest(chat=chat, sampling_params=pb.SamplingParams(seed=3, max_tokens=4))
        again = [message.complete async for message in stub.Generate(asked)][-1]
        assert again.usage.prompt_tokens > complete.usage.prompt_tokens
        return json.loads(call.arguments)


async def _responses_tools(url: str) -> object:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        tool = {"type": "function", **TOOL["function"], "strict": True}
        asked = {"model": "tiny", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        stream = await client.responses.create(**asked, input="x", stream=True, extra_body={"seed": 4})
        events = [event async for event in stream]
        assert [event.type for event in events[2:]] == [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        (item,) = events[-1].response.output
        assert (item.type, item.name) == ("function_call", "get_weather")
        whole = await client.responses.create(**asked, input="x", extra_body={"seed": 4})
        assert whole.output[0].arguments == item.arguments
        history = [{"role": "user", "content": "x"}, item.model_dump(exclude_none=True)]
        history.append({"type": "function_call_output", "call_id": item.call_id, "output": "sunny"})
        asked |= {"tool_choice": "none", "max_output_tokens": 4}
        assert (await client.responses.create(**asked, input=history)).output[0].type == "message"
        return item.arguments


async def _messages_tools(url: str) -> object:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked = {
            "model": "tiny",
            "max_tokens": 400,
            "tools": [{"name": "get_weather", "description": "Says it.", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "extra_body": {"seed": 6},
        }
        answer = await client.messages.create(messages=ASK, **asked)
        (block,) = answer.content
        assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "get_weather")
        async with client.messages.stream(messages=ASK, **asked) as stream:
            final = await stream.get_final_message()
        assert (final.stop_reason, final.content[0].input) == ("tool_use", block.input)
        history = [
            *ASK,
            {"role": "assistant", "content": [block.model_dump()]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]},
        ]
        more = await client.messages.create(
            messages=history, **asked | {"tool_choice": {"type": "none"}, "max_tokens": 4}
        )
        assert more.usage.input_tokens > 0
        return block.input
