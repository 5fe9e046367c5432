"""The text side of a request: checks before anything starts, text as it comes, stop strings, ends."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.front_door import Door
from cluster.generation import ChatPrompt, Prompt, TextChunk, TextPrompt, TextRequest, TokenPrompt
from cluster.tokenizer import ChatMessage
from core.errors import InvalidRequest, NoRoute, Overloaded, UnknownModel
from core.request import FinishReason, RequestId, SamplingParams, Slo
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import MODEL, TIMING, Gateway


def request(prompt: Prompt | str = "hello", model: str | None = None, **sampling: object) -> TextRequest:
    return TextRequest(
        request_id=RequestId("r"),
        door=Door.HTTP,
        prompt=TextPrompt(prompt) if isinstance(prompt, str) else prompt,
        prompt_field="prompt",
        sampling=SamplingParams(**sampling),
        arrived_at=0.0,
        model=model,
    )


async def run(service: Gateway, text_request: TextRequest) -> list[TextChunk]:
    prepared = await service.generation.prepare(text_request)
    async with aclosing(service.generation.stream(prepared)) as chunks:
        return [chunk async for chunk in chunks]


def text_of(chunks: list[TextChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def sample(service: Gateway, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels)


async def test_the_answer_comes_as_text_in_order(service):
    chunks = await run(service, request())
    assert text_of(chunks) == ANSWER
    assert [t for c in chunks for t in c.token_ids] == list(service.router.answer)
    finish = chunks[-1].finish
    assert finish.text == ANSWER
    assert finish.output_token_ids == service.router.answer
    assert (finish.reason, finish.stop_string, finish.timing) == (FinishReason.STOP, None, TIMING)
    assert chunks[-1].num_output_tokens == len(service.router.answer)
    assert chunks[-1].cached_tokens == 3
    assert all("�" not in c.text for c in chunks)


async def test_a_router_that_sends_many_tokens_at_once_gives_the_same_text(service):
    service.router.chunk_size = 5
    assert text_of(await run(service, request())) == ANSWER


async def test_all_n_continuations_are_streamed(service):
    chunks = await run(service, request(n=3))
    assert [text_of(chunks, index) for index in range(3)] == [ANSWER] * 3
    assert sum(chunk.finish is not None for chunk in chunks) == 3


async def test_what_the_client_left_open_is_filled_in(service):
    await run(service, request())
    (sent,) = service.router.requests
    assert sent.prompt_token_ids == service.tokenizer.encode("hello", field="x")
    assert sent.sampling.seed == 7
    assert sent.sampling.max_tokens == MODEL.max_model_len - len(sent.prompt_token_ids)


async def test_what_the_client_gave_is_kept(service):
    await run(service, request(seed=3, max_tokens=2, top_k=5))
    (sent,) = service.router.requests
    assert (sent.sampling.seed, sent.sampling.max_tokens, sent.sampling.top_k) == (3, 2, 5)


async def test_a_top_k_beyond_the_vocabulary_is_no_limit(service):
    await run(service, request(top_k=10**12))
    assert service.router.requests[0].sampling.top_k == 0


async def test_a_chat_and_token_ids_become_prompts(service):
    await run(service, request(ChatPrompt((ChatMessage("user", "hi"),))))
    await run(service, request(TokenPrompt((5, 6, 7))))
    chat, tokens = service.router.requests
    assert service.tokenizer.decode(chat.prompt_token_ids).startswith("user\nhi")
    assert tokens.prompt_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("text_request", "field"),
    [
        (request(""), "prompt"),
        (request(TokenPrompt(())), "prompt"),
        (request(ChatPrompt(())), "prompt"),
        (request(TokenPrompt((3, 350))), "prompt"),
        (request(TokenPrompt((-1,))), "prompt"),
        (request(TokenPrompt((3,) * 64)), "prompt"),
        (request("x " * 100_000), "prompt"),
        (request(TokenPrompt((3,) * 60), max_tokens=5), "max_tokens"),
        (request(TokenPrompt((3,) * 60), min_tokens=5), "min_tokens"),
        (request(stop_token_ids=(350,)), "stop_token_ids"),
        (request(logit_bias={350: 1.0}), "logit_bias"),
        (request(model="other"), "model"),
    ],
)
async def test_a_wrong_request_names_the_field_and_starts_nothing(service, text_request, field):
    with pytest.raises(InvalidRequest) as caught:
        await service.generation.prepare(text_request)
    assert caught.value.field == field
    assert service.router.requests == []
    assert sample(service, "prfaas_requests_total", door="http", outcome="invalid") == 1


async def test_an_unknown_model_is_an_error_of_its_own(service):
    with pytest.raises(UnknownModel, match="'other' is not served here, only 'tiny' is"):
        await service.generation.prepare(request(model="other"))
    await service.generation.prepare(request(model="tiny"))


async def test_without_workers_there_is_no_route(service):
    service.membership.served = None
    with pytest.raises(NoRoute):
        await service.generation.prepare(request())


async def test_a_stop_string_ends_the_text_before_it_and_stops_the_workers(service):
    chunks = await run(service, request(stop=(", stop",)))
    assert text_of(chunks) == "Hello 🙂 world"
    finish = chunks[-1].finish
    assert (finish.reason, finish.stop_string, finish.stop_token_id) == (FinishReason.STOP, ", stop", None)
    assert finish.text == "Hello 🙂 world"
    assert finish.timing == TIMING
    assert service.router.stopped == [("r", 0)]
    assert chunks[-1].num_output_tokens < len(service.router.answer)
    assert chunks[-1].num_output_tokens == len(finish.output_token_ids)


async def test_no_part_of_a_stop_string_leaks(service):
    chunks = await run(service, request(stop=("stop there!", "world, stop")))
    assert all("w" not in chunk.text for chunk in chunks)
    assert text_of(chunks) == "Hello 🙂 "


async def test_a_stop_string_is_kept_when_asked_for(service):
    chunks = await run(service, request(stop=("world",), include_stop_str_in_output=True))
    assert text_of(chunks) == "Hello 🙂 world"


async def test_a_stop_string_in_the_last_chunk_needs_no_stop_call(service):
    service.router.chunk_size = 100
    chunks = await run(service, request(stop=("world",)))
    assert text_of(chunks) == "Hello 🙂 "
    assert chunks[-1].finish.stop_string == "world"
    assert service.router.stopped == []


async def test_tokens_after_a_stop_string_are_dropped_with_their_logprobs(service):
    service.router.chunk_size = 100
    (chunk,) = await run(service, request(stop=("world",), logprobs=1))
    assert len(chunk.token_ids) == len(chunk.logprobs) == chunk.num_output_tokens < len(service.router.answer)


async def test_a_stop_string_ends_only_its_own_continuation(service):
    service.router.chunk_size = 4
    chunks = await run(service, request(n=2, stop=("world",)))
    assert [text_of(chunks, index) for index in range(2)] == ["Hello 🙂 "] * 2
    assert service.router.stopped == [("r", 0), ("r", 1)]


async def test_stop_strings_are_not_looked_for_in_the_first_min_tokens(service):
    first = len(service.tokenizer.encode("Hello 🙂 world,", field="x"))
    chunks = await run(service, request(min_tokens=first, stop=("Hello", "stop")))
    assert text_of(chunks) == "Hello 🙂 world, "


async def test_text_held_back_for_a_stop_string_is_given_at_the_end(service):
    chunks = await run(service, request(stop=("there. And",)))
    assert text_of(chunks) == ANSWER
    assert chunks[-1].finish.stop_string is None


@pytest.mark.parametrize(("include", "expected"), [(False, ANSWER[:-1]), (True, ANSWER)])
async def test_the_text_of_a_stop_token_is_shown_only_when_asked_for(service, include, expected):
    service.router.stop_token_id = service.router.answer[-1]
    chunks = await run(service, request(include_stop_str_in_output=include))
    assert text_of(chunks) == expected
    assert chunks[-1].finish.stop_token_id == service.router.answer[-1]
    assert chunks[-1].finish.output_token_ids == service.router.answer


async def test_max_tokens_ends_with_length(service):
    chunks = await run(service, request(max_tokens=2))
    assert chunks[-1].finish.reason is FinishReason.LENGTH
    assert chunks[-1].num_output_tokens == 2


async def test_logprobs_have_the_text_and_bytes_of_their_tokens(service):
    chunks = await run(service, request(logprobs=2))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert b"".join(entry.chosen.data for entry in entries) == ANSWER.encode()
    assert all(len(entry.top) == 2 for entry in entries)


async def test_closing_the_stream_closes_the_router_and_counts_as_cancelled(service):
    prepared = await service.generation.prepare(request())
    stream = service.generation.stream(prepared)
    await anext(stream)
    await stream.aclose()
    assert service.router.closed.is_set()
    assert service.router.num_inflight == 0
    assert sample(service, "prfaas_requests_total", door="http", outcome="cancelled") == 1


async def test_cancelling_the_task_closes_the_router(service):
    service.router.gate.clear()
    task = asyncio.create_task(run(service, request()))
    await service.router.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service.router.closed.is_set()


async def test_what_the_router_raises_reaches_the_door_and_is_counted(service):
    service.router.error = Overloaded("full")
    with pytest.raises(Overloaded):
        await run(service, request())
    assert sample(service, "prfaas_requests_total", door="http", outcome="overloaded") == 1


async def test_requests_with_an_objective_are_counted_by_what_became_of_them(service):
    await run(service, replace(request(), slo=Slo(ttft_s=1.0), priority=3))
    await run(service, request())
    service.router.error = Overloaded("late", reason="slo_ttft")
    with pytest.raises(Overloaded):
        await run(service, replace(request(), slo=Slo(tpot_s=1.0)))

    assert next((r.slo, r.priority) for r in service.router.requests) == (Slo(ttft_s=1.0), 3)
    assert sample(service, "prfaas_slo_requests_total", result="met") == 1
    assert sample(service, "prfaas_slo_requests_total", result="refused") == 1


async def test_a_request_that_ended_well_is_measured(service):
    await run(service, replace(request(n=2), arrived_at=service.clock.now()))
    assert sample(service, "prfaas_requests_total", door="http", outcome="ok") == 1
    assert sample(service, "prfaas_generated_tokens_total") == 2 * len(service.router.answer)
    assert sample(service, "prfaas_cached_tokens_total") == 3
    assert sample(service, "prfaas_time_to_first_token_seconds_count") == 1
    assert sample(service, "prfaas_time_per_output_token_seconds_count") == 2
    assert sample(service, "prfaas_e2e_request_latency_seconds_count") == 1


async def test_detokenize_names_the_field_of_a_stray_id(service):
    assert service.generation.detokenize(service.router.answer, field="token_ids") == ANSWER
    with pytest.raises(InvalidRequest) as caught:
        service.generation.detokenize([350], field="token_ids")
    assert caught.value.field == "token_ids"
