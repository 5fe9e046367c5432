"""The gRPC door, through a real server and a real client."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission import AdmissionCounters
from cluster.config import GrpcConfig, ServiceConfig
from cluster.front_door import Door
from cluster.grpc_gateway import GrpcGateway
from cluster.grpc_messages import _shortest, parse_sampling
from cluster.internal_tls import TlsDecision
from cluster.structured_output import asked_for
from cluster.tokenizer import Tokenizer
from cluster.view import Offload
from core.errors import (
    DeadlineExceeded,
    GrantRefused,
    InvalidConfig,
    NoRoute,
    Overloaded,
    PrfaasError,
    SequenceFailed,
)
from core.request import Role, SamplingParams, Slo
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import MODEL, Gateway, gateway, worker

TLS = TlsDecision(True, "workers listen on 10.0.0.5")


def make_door(service: Gateway) -> GrpcGateway:
    return GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        service.config,
        service.clock,
        TLS,
        service.requests,
    )


@pytest.fixture
async def door(service: Gateway) -> AsyncIterator[GrpcGateway]:
    gateway = make_door(service)
    await gateway.start()
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def channel(door: GrpcGateway) -> AsyncIterator[grpc.aio.Channel]:
    options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}", options=options) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> rpc.GenerationStub:
    return rpc.GenerationStub(channel)


def ask(text: str = "hello", **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**sampling))


async def read(call: object) -> tuple[list[pb.GenerateStreamChunk], list[pb.GenerateComplete]]:
    messages = [message async for message in call]
    return [m.chunk for m in messages if m.HasField("chunk")], [m.complete for m in messages if m.HasField("complete")]


async def read_to_the_end(call: object) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def refusal(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    return caught.value


async def test_chunks_stream_and_one_final_message_ends_them(service, stub):
    chunks, (complete,) = await read(stub.Generate(ask()))
    assert "".join(c.text for c in chunks) == complete.text == ANSWER
    assert [t for c in chunks for t in c.token_ids] == list(complete.output_ids) == list(service.router.answer)
    assert chunks[-1].completion_tokens == len(service.router.answer)
    assert (complete.finish_reason, complete.WhichOneof("matched_stop")) == ("stop", None)
    assert (complete.usage.completion_tokens, complete.usage.cached_tokens) == (len(service.router.answer), 3)
    assert complete.usage.prompt_tokens == len(service.router.requests[0].prompt_token_ids)
    timing = complete.timing
    assert (timing.prefill_worker, timing.decode_worker) == ("prefill-0", "decode-0")
    assert (timing.bytes_shipped, timing.num_attempts, timing.route_reason) == (4096, 1, "least loaded")
    pulled = (timing.pull_outcome, timing.pulled_tokens, timing.bytes_pulled, timing.pull_s)
    assert pulled == ("pulled", 2, 256, 0.125)
    reloaded = (timing.reload_outcome, timing.host_tokens, timing.disk_tokens, timing.reload_s, timing.reload_reason)
    assert reloaded == ("partly", 2, 1, 0.0625, "a file is damaged")
    assert (timing.tpot_s, timing.fallback) == (0.02, "link_down")
    assert (timing.expected_ttft_s, timing.expected_tpot_s, timing.expected_bytes_shipped) == (0.2, 0.025, 2048)
    assert (timing.colocated_ttft_s, timing.colocated_tpot_s) == (0.3, 0.03)


async def test_the_clients_request_id_is_used_and_one_is_made_up_otherwise(stub):
    request = ask()
    request.request_id = "mine"
    assert {m.request_id async for m in stub.Generate(request)} == {"mine"}
    (made_up,) = {m.request_id async for m in stub.Generate(ask())}
    assert made_up.startswith("gen-")


async def test_a_chat_and_token_ids_are_prompts_too(service, stub):
    await read(stub.Generate(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[5, 6]))))
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="hi")])
    await read(stub.Generate(pb.GenerateRequest(chat=chat)))
    first, second = service.router.requests
    assert first.prompt_token_ids == (5, 6)
    assert service.tokenizer.decode(second.prompt_token_ids).startswith("user\nhi")


async def test_sampling_parameters_arrive_as_the_client_meant_them(service, stub):
    request = ask(
        max_tokens=3,
        min_tokens=1,
        temperature=0.7,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.2,
        frequency_penalty=0.3,
        logit_bias={5: -1.5},
        seed=-9,
        stop=["x"],
        stop_token_ids=[2],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=0,
        n=2,
    )
    request.cache_salt = "tenant"
    await read(stub.Generate(request))
    (sent,) = service.router.requests
    assert sent.salt == b"tenant"
    assert sent.sampling == SamplingParams(
        max_tokens=3,
        min_tokens=1,
        temperature=0.7,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.2,
        frequency_penalty=0.3,
        logit_bias={5: -1.5},
        seed=-9,
        stop=("x",),
        stop_token_ids=(2,),
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=0,
        n=2,
    )


FORMS = {
    "json_schema": pb.StructuredOutput(json_schema='{"type": "object"}'),
    "json_object": pb.StructuredOutput(json_object=True),
    "regex": pb.StructuredOutput(regex="a|b"),
    "choice": pb.StructuredOutput(choice=pb.Choices(texts=["a", "b"])),
    "grammar": pb.StructuredOutput(grammar="start: /a/"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_that_is_asked_for_means_what_it_does_over_http(kind):
    same = {"json_schema": "json", "json_object": "json_object"}.get(kind, kind)
    value = {
        "json": {"type": "object"},
        "json_object": True,
        "regex": "a|b",
        "choice": ["a", "b"],
        "grammar": "start: /a/",
    }
    over_http = asked_for({"structured_outputs": {same: value[same]}})
    assert parse_sampling(pb.SamplingParams(structured_output=FORMS[kind])).grammar == over_http.grammar


@given(st.decimals(-100, 100, places=4))
def test_a_float_that_travelled_as_float32_is_what_was_written(value):
    assert _shortest(pb.SamplingParams(temperature=float(value)).temperature) == float(value)


async def test_continuations_logprobs_and_stops_are_told_apart(stub):
    chunks, completes = await read(stub.Generate(ask(n=2, logprobs=2, stop=["world"])))
    assert sorted(c.index for c in completes) == [0, 1]
    assert {c.stop_string for c in completes} == {"world"}
    assert all(len(c.logprobs) == len(c.token_ids) for c in chunks)
    assert len(chunks[0].logprobs[0].top) == 2


INVALID = [
    (pb.GenerateRequest(), "input: one of text, tokenized, chat"),
    (ask(""), "text: must not be empty"),
    (pb.GenerateRequest(tokenized=pb.TokenizedInput()), "tokenized.input_ids: must hold at least one token"),
    (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[350])), "tokenized.input_ids: token ids must be"),
    (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[3] * 64)), "tokenized.input_ids: has 64 tokens"),
    (pb.GenerateRequest(chat=pb.ChatInput()), "chat.messages: must hold at least one message"),
    (
        pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(role="wizard", content="x")])),
        "chat.messages[0].role: must be one of system, user, assistant, got 'wizard'",
    ),
    (ask(max_tokens=0), "sampling_params.max_tokens: must be at least 1, got 0"),
    (ask(max_tokens=64), "sampling_params.max_tokens: must be at most"),
    (ask(max_tokens=2, min_tokens=3), "sampling_params.min_tokens: must be at most max_tokens (2)"),
    (ask(temperature=-1), "sampling_params.temperature: must be between 0 and 2, got -1"),
    (ask(temperature=float("nan")), "sampling_params.temperature: must be between 0 and 2, got nan"),
    (ask(temperature=float("inf")), "sampling_params.temperature"),
    (ask(top_p=0), "sampling_params.top_p"),
    (ask(n=0), "sampling_params.n: must be between 1 and 128, got 0"),
    (ask(logprobs=21), "sampling_params.logprobs"),
    (ask(stop=[""]), "sampling_params.stop"),
    (ask(stop_token_ids=[350]), "sampling_params.stop_token_ids"),
    (ask(logit_bias={350: 1}), "sampling_params.logit_bias"),
    (
        ask(structured_output=pb.StructuredOutput()),
        "sampling_params.structured_output: one of json_schema",
    ),
    (
        ask(structured_output=FORMS["json_schema"]),
        "sampling_params.structured_output: structured output is",
    ),
    (
        ask(structured_output=pb.StructuredOutput(json_schema="[")),
        "sampling_params.structured_output.json_schema: must be a JSON Schema",
    ),
    (ask(structured_output=FORMS["regex"], min_tokens=1), "sampling_params.min_tokens: must be 0"),
    (ask("x " * 5_000_000), "text: makes a message of 10000007 bytes; at most 8388608 are taken"),
    (ask("many words " * 20_000), "text: has"),
    (pb.GenerateRequest(text="x", request_id="r" * 300), "request_id: must have at most 256"),
]


@pytest.mark.parametrize(("request_message", "said"), INVALID, ids=[said[:32] for _, said in INVALID])
async def test_a_bad_request_names_its_field_and_leaves_the_service_healthy(service, stub, request_message, said):
    error = await refusal(stub.Generate(request_message))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(said)
    assert service.router.requests == []
    _, completes = await read(stub.Generate(ask()))
    assert len(completes) == 1


async def test_another_model_is_not_found(stub):
    error = await refusal(stub.Generate(pb.GenerateRequest(text="x", model="gpt-9")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details().startswith("model: 'gpt-9' is not served here")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NoRoute("empty"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (SequenceFailed("broken", retryable=False), grpc.StatusCode.INTERNAL),
        (GrantRefused("no pages"), grpc.StatusCode.UNAVAILABLE),
        (PrfaasError("strange"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_the_error_tree_becomes_statuses(service, stub, error, code):
    service.router.error = error
    caught = await refusal(stub.Generate(ask()))
    assert (caught.code(), caught.details()) == (code, str(error))
    pushback = dict(caught.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == ("2500" if isinstance(error, Overloaded) else None)


async def test_a_refusal_carries_when_to_come_again_and_which_bound_it_was(service, stub):
    service.router.error = Overloaded("late", retry_after_s=2.5, reason="slo_tpot", predicted=4.0, allowed=1.5)

    metadata = dict((await refusal(stub.Generate(ask()))).trailing_metadata())

    assert (metadata["retry-after"], metadata["x-prfaas-rejection"]) == ("3", "slo_tpot")


async def test_objectives_and_priority_are_fields(service, stub):
    await read(stub.Generate(pb.GenerateRequest(text="x", slo_ttft_s=1.5, slo_tpot_s=0.02, priority=-7)))
    await read(stub.Generate(pb.GenerateRequest(text="x")))

    assert [(r.slo, r.priority) for r in service.router.requests] == [(Slo(1.5, 0.02), -7), (Slo(), 0)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"slo_ttft_s": 0.0}, "slo_ttft_s: must be a number of seconds above 0, got 0.0"),
        ({"slo_tpot_s": float("nan")}, "slo_tpot_s: must be a number of seconds above 0, got nan"),
        ({"priority": 101}, "priority: must be between -100 and 100, got 101"),
    ],
)
async def test_a_wrong_objective_names_its_field(service, stub, fields, said):
    error = await refusal(stub.Generate(pb.GenerateRequest(text="x", **fields)))

    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, said)
    assert service.router.requests == []


async def test_the_final_message_says_which_objectives_were_met(stub):
    _, (complete,) = await read(stub.Generate(ask()))

    timing = complete.timing
    assert (timing.admission_s, timing.slo_ttft_met, timing.HasField("slo_tpot_met")) == (0.125, True, False)
    assert timing.slo_miss_expected == "slo_ttft: late"


async def test_an_error_of_ours_is_internal_and_tells_nothing(service, stub, caplog):
    service.membership.model = lambda: 1 / 0
    error = await refusal(stub.Generate(ask()))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error, see the gateway's log")
    assert "ZeroDivisionError" in caplog.text


async def test_an_error_in_the_middle_ends_the_stream(service, stub):
    service.router.error, service.router.error_after = SequenceFailed("lost", retryable=True), 3
    call = stub.Generate(ask())
    assert (await call.read()).HasField("chunk")
    with pytest.raises(grpc.aio.AioRpcError, match="lost"):
        await read_to_the_end(call)


async def test_the_clients_deadline_becomes_the_requests(service, stub):
    await read(stub.Generate(ask(), timeout=30))
    (sent,) = service.router.requests
    assert sent.deadline_at - sent.arrived_at == pytest.approx(30, abs=1)  # gRPC rounds it


async def test_without_a_deadline_there_is_none(service, stub):
    await read(stub.Generate(ask()))
    assert service.router.requests[0].deadline_at is None


async def test_a_passed_deadline_closes_the_router(service, stub):
    service.router.gate.clear()
    error = await refusal(stub.Generate(ask(), timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(service.router.closed.wait(), 5)


async def test_a_client_that_cancels_closes_the_router(service, stub):
    service.router.gate.clear()
    call = stub.Generate(ask())
    await call.read()
    await service.router.started.wait()
    call.cancel()
    await asyncio.wait_for(service.router.closed.wait(), 5)
    assert service.router.num_inflight == 0


async def test_a_client_whose_connection_breaks_closes_the_router(service, door):
    service.router.gate.clear()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{door.port}")
    call = rpc.GenerationStub(channel).Generate(ask())
    await call.read()
    await service.router.started.wait()
    await channel.close()
    await asyncio.wait_for(service.router.closed.wait(), 5)


async def test_abort_ends_a_request_with_cancelled(service, stub):
    service.router.gate.clear()
    request = ask()
    request.request_id = "mine"
    call = stub.Generate(request)
    await service.router.started.wait()
    assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).found
    assert (await refusal(call)).code() is grpc.StatusCode.CANCELLED
    assert not (await stub.Abort(pb.AbortRequest(request_id="mine"))).found


async def test_tokenize_and_detokenize_are_inverse(stub):
    reply = await stub.Tokenize(pb.TokenizeRequest(text=ANSWER))
    assert (reply.count, reply.max_model_len) == (len(reply.token_ids), 64)
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=reply.token_ids))).text == ANSWER
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="hi")])
    reply = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
    text = (await stub.Detokenize(pb.DetokenizeRequest(token_ids=reply.token_ids))).text
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_bad_tokenize_requests_name_their_field(stub):
    for call, said in (
        (stub.Tokenize(pb.TokenizeRequest()), "input: one of text, chat"),
        (stub.Tokenize(pb.TokenizeRequest(text="")), "text: must not be empty"),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=[350])), "token_ids: token ids must be between 0 and 349"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(said)


async def test_model_info_says_what_is_served(service, stub):
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.model_source) == ("tiny", service.config.model)
    assert (info.max_model_len, info.vocab_size, info.page_size) == (64, 350, 16)
    assert info.has_chat_template
    assert info.default_sampling == pb.SamplingParams(
        temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1
    )  # without max_tokens: up to the context


async def test_what_a_client_leaves_open_is_the_services_default(service, stub):
    service.generation.sampling_defaults = SamplingParams(max_tokens=3, temperature=0.25, top_p=0.5)
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.default_sampling.max_tokens, info.default_sampling.temperature) == (3, 0.25)
    asked = [pb.SamplingParams(), pb.SamplingParams(temperature=1, max_tokens=5)]
    for sampling in asked:
        [_ async for _ in stub.Generate(pb.GenerateRequest(text="hi", sampling_params=sampling))]
    got = [(s.max_tokens, s.temperature, s.top_p) for s in (r.sampling for r in service.router.requests)]
    assert got == [(3, 0.25, 0.5), (5, 1.0, 0.5)]


async def test_model_info_is_unavailable_without_workers(service, stub):
    service.membership.served = None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_cluster_info_lists_workers_and_counters(service, stub):
    service.membership.workers += (worker("prefill-1", Role.PREFILL, draining=True),)
    info = await stub.GetClusterInfo(pb.GetClusterInfoRequest())
    assert [(w.worker_id, w.role, w.state) for w in info.workers] == [
        ("decode-0", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
        ("prefill-1", "prefill", "draining"),
    ]
    assert (info.num_requests, info.num_retries, info.num_resumes) == (5, 2, 1)
    assert (info.model, info.policy) == ("tiny", "prfaas")
    assert info.internal_tls == "on: workers listen on 10.0.0.5"


async def test_cluster_info_says_who_waits_and_who_was_refused(service, stub):
    admission = AdmissionCounters(3, {}, {"max_queued": 2}, {"slo_ttft": 1})
    service.router.counters = replace(service.router.counters, admission=admission)

    info = await stub.GetClusterInfo(pb.GetClusterInfoRequest())

    assert (info.num_queued, dict(info.refusals), dict(info.misses_served)) == (3, {"max_queued": 2}, {"slo_ttft": 1})


async def test_cluster_info_tells_costs_with_their_errors_and_where_prompts_go(service, stub):
    info = await stub.GetClusterInfo(pb.GetClusterInfoRequest())
    assert [(c.work, c.of, c.samples) for c in info.costs] == [
        ("prefill", "tiny on a cpu", 7),
        ("decode", "tiny on a cpu", 0),
        ("transfer", "local to local", 0),
    ]
    prefill = info.costs[0]
    assert (list(prefill.coefficients), prefill.error_p50, prefill.error_p90) == ([0.03, 2e-4, 5e-9], 0.1, 0.2)
    assert prefill.bias == -0.05
    assert (info.offload.threshold_tokens, info.offload.mode) == (2048, "scarce")
    assert info.offload.reason == "balances both prefill stages"
    assert (dict(info.routes_by_place), dict(info.fallbacks_by_reason)) == (
        {"local": 4, "colocated": 1},
        {"link_down": 3},
    )
    service.membership.offload = Offload(math.inf, abundant=True)
    info = await stub.GetClusterInfo(pb.GetClusterInfoRequest())
    assert (info.offload.HasField("threshold_tokens"), info.offload.mode) == (False, "abundant")


async def test_health_follows_the_cluster(service, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    names = ("", "prfaas.v1.Generation")
    for name in names:
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=names[1]))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    service.membership.workers = ()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_lists_the_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    (reply,) = [message async for message in call]
    assert {service.name for service in reply.list_services_response.service} >= {
        "prfaas.v1.Generation",
        "grpc.health.v1.Health",
    }
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="prfaas.v1.Generation")
    (reply,) = [message async for message in stub.ServerReflectionInfo(iter([symbol]))]
    assert reply.file_descriptor_response.file_descriptor_proto


async def test_a_taken_port_is_named(service, door):
    config = ServiceConfig(model="m", grpc=GrpcConfig(port=door.port))
    second = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        config,
        service.clock,
        TLS,
        service.requests,
    )
    with pytest.raises(InvalidConfig) as caught:
        await second.start()
    assert caught.value.key == "grpc.port"


async def test_stop_lets_a_running_request_end(service, door, stub):
    service.router.gate.clear()
    reading = asyncio.create_task(read(stub.Generate(ask())))
    await service.router.started.wait()
    stopping = asyncio.create_task(door.stop(5))
    await asyncio.sleep(0)
    service.router.gate.set()
    _, (complete,) = await reading
    await stopping
    assert complete.text == ANSWER
    assert not service.router.closed.is_set()


async def test_stop_cancels_what_does_not_end(service, door, stub):
    service.router.gate.clear()
    reading = asyncio.create_task(refusal(stub.Generate(ask())))
    await service.router.started.wait()
    await door.stop(0.05)
    assert (await reading).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    await asyncio.wait_for(service.router.closed.wait(), 5)


async def test_requests_are_counted_by_door_and_outcome(service, stub):
    await read(stub.Generate(ask()))
    await refusal(stub.Generate(ask("")))
    await refusal(stub.Generate(ask(n=0)))
    for outcome, count in (("ok", 1), ("invalid", 2)):
        labels = {"door": Door.GRPC.value, "outcome": outcome}
        assert service.metrics.registry.get_sample_value("prfaas_requests_total", labels) == count


async def test_recent_requests_come_newest_first_with_where_their_seconds_went(stub):
    for name in ("a", "b"):
        metadata = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"),)
        await read(stub.Generate(pb.GenerateRequest(text="hello", request_id=name), metadata=metadata))

    answer = await stub.GetRecentRequests(pb.GetRecentRequestsRequest())
    (latest,) = (await stub.GetRecentRequests(pb.GetRecentRequestsRequest(limit=1))).requests

    assert [request.request_id for request in answer.requests] == ["b", "a"]
    assert (latest.request_id, latest.outcome, latest.door, latest.trace_id) == ("b", "ok", "grpc", "a" * 32)
    assert latest.timings[0].ttft_parts.prefill_s == 0.06
    assert latest.timings[0].ttst_parts.transfer_s == 0.02


# ---- tools ----

CALLING = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL = pb.Tool(name="get_weather", description="Says it.", parameters='{"type": "object"}')
USER = pb.ChatMessage(role="user", content="hi")
CALL = pb.ToolCall(id="call_1", name="get_weather", arguments='{"city": "Ulm"}')


@pytest.fixture
async def calling(tmp_path: Path) -> AsyncIterator[tuple[Gateway, rpc.GenerationStub]]:
    """A service whose model's template has a place for tools, and that answers ``CALLING``."""
    folder = tiny_tokenizers.save(tmp_path, chat_template=tiny_tokenizers.TOOL_TEMPLATE)
    config = ServiceConfig(model=str(folder), served_model_name="tiny", grpc=GrpcConfig(port=0))
    service = gateway(Tokenizer.load(folder), CALLING, config)
    service.membership.served = replace(MODEL, max_model_len=400)
    door = make_door(service)
    await door.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
        yield service, rpc.GenerationStub(channel)
    await door.stop(0)


async def test_calls_come_whole_and_are_no_part_of_the_text(calling):
    _, stub = calling
    chat = pb.ChatInput(messages=[USER], tools=[TOOL])
    chunks, (complete,) = await read(stub.Generate(pb.GenerateRequest(chat=chat)))
    (call,) = [call for chunk in chunks for call in chunk.tool_calls]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Köln"})
    assert list(complete.tool_calls) == [call]
    assert "".join(chunk.text for chunk in chunks) == complete.text == "Let me see."
    assert complete.finish_reason == "tool_calls"


async def test_the_model_is_told_of_tools_unless_the_choice_is_none(calling):
    service, stub = calling
    free = pb.ToolChoice(mode="none")
    for choice in (None, free):
        chat = pb.ChatInput(messages=[USER], tools=[TOOL], tool_choice=choice)
        chunks, (complete,) = await read(stub.Generate(pb.GenerateRequest(chat=chat)))
    told, untold = (service.tokenizer.decode(request.prompt_token_ids) for request in service.router.requests)
    assert ("get_weather" in told, "get_weather" in untold) == (True, False)
    assert "".join(chunk.text for chunk in chunks) == complete.text == CALLING
    assert (complete.finish_reason, list(complete.tool_calls)) == ("stop", [])
    counted = await stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatInput(messages=[USER], tools=[TOOL])))
    assert tuple(counted.token_ids) == service.router.requests[0].prompt_token_ids


async def test_history_has_calls_and_their_answers(calling):
    service, stub = calling
    messages = [
        USER,
        pb.ChatMessage(role="assistant", tool_calls=[CALL]),
        pb.ChatMessage(role="tool", tool_call_id="call_1", content="sunny"),
    ]
    await read(stub.Generate(pb.GenerateRequest(chat=pb.ChatInput(messages=messages))))
    text = service.tokenizer.decode(service.router.requests[0].prompt_token_ids)
    assert '"city": "Ulm"' in text
    assert text.index("Ulm") < text.index("sunny")


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (pb.ChatInput(tools=[pb.Tool(name="f g")]), "chat.tools[0]: names of functions"),
        (pb.ChatInput(tools=[TOOL, TOOL]), "chat.tools: two of them are called 'get_weather'"),
        (pb.ChatInput(tools=[pb.Tool(name="f", parameters="[]")]), "chat.tools[0].parameters: must be the text of"),
        (pb.ChatInput(tools=[TOOL], tool_choice=pb.ToolChoice(name="f")), "chat.tool_choice: names 'f', which"),
        (
            pb.ChatInput(tools=[TOOL], tool_choice=pb.ToolChoice(mode="any")),
            "chat.tool_choice.mode: must be one of auto, none, required, got 'any'",
        ),
        (pb.ChatInput(tool_choice=pb.ToolChoice(mode="required")), "chat.tool_choice: needs tools"),
        (
            pb.ChatInput(messages=[pb.ChatMessage(role="user", tool_calls=[CALL])]),
            "chat.messages[1].tool_calls: only the assistant",
        ),
        (
            pb.ChatInput(
                messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="a", name="f", arguments="7")])]
            ),
            "chat.messages[1].tool_calls[0].arguments: must be the text of a JSON object, got '7'",
        ),
        (pb.ChatInput(messages=[pb.ChatMessage(role="tool", content="x")]), "chat.messages[1].tool_call_id: is req"),
        (
            pb.ChatInput(messages=[pb.ChatMessage(role="user", content="x", tool_call_id="a")]),
            "chat.messages[1].tool_call_id: only messages of role tool",
        ),
    ],
)
async def test_what_is_wrong_with_tools_names_its_field(calling, chat, said):
    asked = pb.ChatInput(messages=[USER])
    asked.MergeFrom(chat)
    error = await refusal(calling[1].Generate(pb.GenerateRequest(chat=asked)))
    assert (error.code(), error.details()[: len(said)]) == (grpc.StatusCode.INVALID_ARGUMENT, said)


async def test_a_template_without_a_place_for_tools_refuses_them(stub):
    error = await refusal(stub.Generate(pb.GenerateRequest(chat=pb.ChatInput(messages=[USER], tools=[TOOL]))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("chat.tools: the served model's chat template")
