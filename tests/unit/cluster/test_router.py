"""The life of a request over real gRPC, with workers that die at every stage."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.config import AdmissionConfig
from cluster.output_lengths import ASSUMED_TOKENS
from cluster.prfaas_routing import PrfaasRouting
from cluster.routing_policy import RoundRobin, RouteRequest, RoutingSettings, make_policy
from cluster.view import ClusterView, Forecast, Route
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NoRoute,
    Overloaded,
    SequenceFailed,
)
from core.latency_parts import TtstParts
from core.prefix_hash import PageEvents, page_hashes, page_key, tenant_of
from core.request import FinishReason, PullOutcome, PullReport, RequestId, Role, SequenceFailure, Slo
from tests.pulling_policy import PullFromTheBest
from tests.unit.cluster.fake_worker import (
    ANNOUNCED,
    BEFORE_COMMIT,
    COMMITTED,
    DECODED,
    FINGERPRINT,
    FIRST_TOKEN,
    QUEUED,
    FakeWorker,
    Refusal,
    Visit,
    expected_tokens,
)
from tests.unit.cluster.gateway_and_fakes import CONFIG, PROMPT, Answer, Gateway, collect, gateway, until

EXPECTED = expected_tokens(PROMPT, 3, 8)


async def kill(visit: Visit) -> None:
    await visit.worker.kill()


async def fail(visit: Visit) -> None:
    visit.worker.hooks.clear()
    visit.worker.fail(visit.spec)
    await asyncio.Event().wait()


async def stall(visit: Visit) -> None:
    await asyncio.Event().wait()


def sent(num_tokens: int, then: object) -> object:
    """A hook of ``decoded`` that acts after so many tokens."""

    async def hook(visit: Visit) -> None:
        if visit.num_sent == num_tokens:
            await then(visit)  # type: ignore[operator]

    return hook


# ---- nothing goes wrong ----


async def test_the_first_token_comes_from_prefill_and_the_rest_from_decode_in_order() -> None:
    async with gateway() as g:
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.last[0].finish_reason is FinishReason.LENGTH
        assert len(g["prefill-0"].prefills) == len(g["decode-0"].decodes) == 1
        assert (g["prefill-0"].aborts, g["decode-0"].aborts) == ([], [])
        assert g.router.num_inflight == 0


async def test_tokens_that_have_come_before_they_are_asked_for_come_together() -> None:
    async with gateway() as g:
        request = g.request()
        async with aclosing(g.router.generate(request)) as stream:
            first = await anext(stream)
            inbox = g.router._flights[request.request_id].continuations[0].inbox
            await until(lambda: any(getattr(event, "finish_reason", None) for _, event in inbox._events))
            rest = [chunk async for chunk in stream]

        assert [*first.token_ids, *(token for chunk in rest for token in chunk.token_ids)] == EXPECTED
        assert len(rest) == 1
        assert rest[0].finish_reason is FinishReason.LENGTH


async def test_the_timing_is_put_together_from_both_stages_reports() -> None:
    async with gateway() as g:
        timing = (await g.generate(g.request())).timing

        assert (timing.prefill_worker, timing.decode_worker) == ("prefill-0", "decode-0")
        assert (timing.prefill_queue_s, timing.prefill_s) == (0.5, 1.0)
        assert (timing.transfer_s, timing.exposed_transfer_s, timing.bytes_shipped) == (2.0, 0.25, 128)
        assert (timing.decode_queue_s, timing.decode_s, timing.decode_cached_tokens) == (0.125, 4.0, 1)
        assert (timing.cached_tokens, timing.num_attempts) == (2, 1)
        assert 0 < timing.ttft_s <= timing.total_s
        assert "round robin" in timing.route_reason


async def test_decode_tokens_that_come_before_the_first_token_wait_for_it() -> None:
    async with gateway() as g:
        prefill, decode = g["prefill-0"], g["decode-0"]

        async def commit_first(visit: Visit) -> None:
            decode.commit(visit.spec.sequence_id)
            await until(lambda: decode.running == {})
            assert seen == []
            visit.worker.hooks.clear()

        prefill.hooks[FIRST_TOKEN] = commit_first
        seen: list[int] = []
        async for chunk in g.router.generate(g.request()):
            seen += chunk.token_ids

        assert seen == EXPECTED
        assert chunk.timing is not None
        assert chunk.timing.decode_worker == "decode-0"
        assert chunk.timing.ttst_parts == TtstParts(), "the second token came with the first"
        assert decode.aborts == []


async def test_chunks_of_one_stream_that_come_out_of_order_are_put_in_order() -> None:
    async with gateway(num_prefill=0) as g:
        decode = g["decode-0"]

        async def backwards(visit: Visit) -> None:
            decode.hooks.clear()
            for position in (7, 5, 6, 4, 3, 2, 1):
                decode.send(decode.chunk(visit.spec, position))
            raise asyncio.CancelledError

        decode.hooks[DECODED] = backwards
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}


async def test_a_request_that_ends_with_its_first_token_aborts_the_announcement() -> None:
    async with gateway() as g:
        answer = await g.generate(g.request(num_tokens=1))
        await until(lambda: g["decode-0"].aborts)

        assert answer.tokens == {0: EXPECTED[:1]}
        assert answer.timing.decode_worker is None
        assert [stage for _, stage in g["decode-0"].aborts] == [Role.DECODE]
        assert g["decode-0"].announced == {}
        assert g["prefill-0"].aborts == []


async def test_without_prefill_workers_the_decode_worker_prefills_and_the_reason_says_so() -> None:
    async with gateway(num_prefill=0) as g:
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.prefill_worker is None
        assert "no prefill worker is ready" in answer.timing.route_reason
        assert answer.timing.cached_tokens == 1


async def test_a_fallback_is_counted_logged_once_and_named_in_the_response(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway(num_prefill=0) as g:
        answers = [await g.generate(g.request()) for _ in range(3)]

        assert [answer.timing.fallback for answer in answers] == ["no_prefill_worker"] * 3
        assert g.router.counters.fallbacks_by_reason == {"no_prefill_worker": 3}
        assert g.router.counters.routes_by_place == {"colocated": 3}
        assert caplog.text.count("fallback no_prefill_worker") == 1


async def test_without_prefill_fail_ends_the_request_at_once_with_the_reason() -> None:
    async with gateway(num_prefill=0, config=replace(CONFIG, without_prefill="fail", no_route_wait_s=60.0)) as g:
        with pytest.raises(NoRoute, match=r"router\.without_prefill is fail.*no prefill worker is ready"):
            await g.generate(g.request())

        assert g.router.counters.fallbacks_by_reason == {"no_prefill_worker": 1}
        assert g.router.counters.routes_by_place == {}
        assert g["decode-0"].decodes == []


async def test_without_prefill_wait_takes_the_prefill_worker_that_comes() -> None:
    async with gateway(num_prefill=0, config=replace(CONFIG, without_prefill="wait")) as g:
        asked = asyncio.create_task(g.generate(g.request()))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await g.add(FakeWorker("prefill-0", Role.PREFILL))

        timing = (await asked).timing

        assert (timing.prefill_worker, timing.fallback) == ("prefill-0", "")
        assert g.router.counters.fallbacks_by_reason == {}


async def test_without_prefill_wait_gives_up_in_the_end() -> None:
    async with gateway(num_prefill=0, config=replace(CONFIG, without_prefill="wait", no_route_wait_s=0.05)) as g:
        with pytest.raises(NoRoute, match=r"router\.without_prefill is wait"):
            await g.generate(g.request())

        assert g.router.counters.fallbacks_by_reason == {"no_prefill_worker": 1}


async def test_a_colocated_route_by_choice_is_no_fallback() -> None:
    config = replace(CONFIG, without_prefill="fail")
    policy = PrfaasRouting(RoutingSettings(colocate="always"))
    async with gateway(config=config, policy=policy) as g:
        timing = (await g.generate(g.request())).timing

        assert (timing.prefill_worker, timing.fallback) == (None, "")
        assert g.router.counters.routes_by_place == {"colocated": 1}


async def test_what_was_expected_stands_beside_what_came_of_it() -> None:
    async with gateway(policy=PrfaasRouting(RoutingSettings(colocate="never"))) as g:
        timing = (await g.generate(g.request())).timing

        assert timing.expected_bytes_shipped == len(PROMPT) * 64
        seconds = (timing.expected_ttft_s, timing.expected_tpot_s, timing.colocated_ttft_s, timing.colocated_tpot_s)
        assert all(value is not None and value > 0 for value in seconds)
        assert timing.tpot_s is not None
        assert timing.tpot_s == pytest.approx((timing.total_s - timing.ttft_s) / 7, abs=0.05)


async def test_what_was_sent_counts_on_its_workers_until_they_report_it() -> None:
    async with gateway(policy=PrfaasRouting(RoutingSettings(colocate="never"))) as g:
        for worker in g.workers.values():
            worker.load_age_s = 60.0  # its reports are of before
        g["prefill-0"].hooks[FIRST_TOKEN] = stall
        asked = asyncio.create_task(g.generate(g.request(num_tokens=8)))
        await until(lambda: all(worker.num_unreported for worker in g.membership.view().workers))

        decode, prefill = g.membership.view().workers
        assert (prefill.unreported_tokens, prefill.unreported_kv_tokens) == (len(PROMPT), 0)
        assert (decode.unreported_tokens, decode.unreported_kv_tokens) == (0, len(PROMPT) + 8)
        asked.cancel()
        await until(lambda: not any(worker.num_unreported for worker in g.membership.view().workers))


async def test_a_policy_is_told_how_much_output_to_expect() -> None:
    asked: list[RouteRequest] = []

    class Noting(RoundRobin):
        def route(self, request: RouteRequest, view: ClusterView) -> Route:
            asked.append(request)
            return super().route(request, view)

    async with gateway(policy=Noting()) as g:
        await g.generate(g.request(num_tokens=8))
        await g.generate(g.request(num_tokens=30))

        assert [(request.num_output, request.mean_output) for request in asked] == [(8, ASSUMED_TOKENS), (8, 8.0)]


async def test_a_finish_does_not_wait_for_ever_for_the_report_of_the_hand_over() -> None:
    async with gateway() as g:
        g["prefill-0"].hooks[COMMITTED] = stall

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.bytes_shipped == 0


# ---- cached pages that are pulled first ----


async def cache_prompt(g: Gateway, worker_id: str) -> None:
    """That worker says that it caches the prompt's one full page."""
    keys = tuple(map(page_key, page_hashes(PROMPT, FINGERPRINT.page_size)))
    await g[worker_id].change(page_events=PageEvents(1, snapshot=True, stored=keys))
    hashes = page_hashes(PROMPT, FINGERPRINT.page_size)
    await until(lambda: g.membership.match_prefix(hashes).longest == 1)


async def test_whoever_prefills_is_told_what_the_route_pulls_and_the_timing_says_what_came() -> None:
    async with gateway(policy=PullFromTheBest(RoundRobin())) as g:
        await cache_prompt(g, "decode-0")
        g["prefill-0"].pull = PullReport(PullOutcome.PULLED, 4, 256, 0.125)

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        (told,) = g["prefill-0"].prefill_requests
        assert (told.pull.worker_id, told.pull.engine_id) == ("decode-0", "decode-0-engine-1")
        assert (told.pull.address, told.pull.num_tokens) == (g["decode-0"].address, 4)
        assert not told.pull.HasField("timeout_s")
        assert not g["decode-0"].decode_requests[0].HasField("pull"), "its K/V comes from the prefill worker"
        timing = answer.timing
        pulled = (timing.pull_outcome, timing.pulled_tokens, timing.bytes_pulled, timing.pull_s)
        assert pulled == ("pulled", 4, 256, 0.125)
        assert "pulls from decode-0" in timing.route_reason


async def test_a_decode_worker_that_prefills_itself_is_told_to_pull_with_its_tenant_and_deadline() -> None:
    async with gateway(0, 2, policy=PullFromTheBest(RoundRobin())) as g:
        await cache_prompt(g, "decode-1")
        g["decode-0"].pull = PullReport(PullOutcome.TIMEOUT, seconds=0.5)

        answer = await g.generate(replace(g.request(deadline_s=5.0), salt=b"tenant"))
        salted = g["decode-0"].decode_requests[0]
        plain = await g.generate(g.request())
        assert not salted.HasField("pull"), "another tenant's pages are not found"
        assert 0 < salted.deadline_s <= 5.0
        assert salted.tenant == tenant_of(b"tenant")
        assert answer.timing.pull_outcome == "timeout"
        assert plain.tokens == {0: EXPECTED}

        g["decode-1"].pull = PullReport(PullOutcome.CACHED)
        await g.generate(g.request())
        told = [request.pull.worker_id for request in g["decode-0"].decode_requests if request.HasField("pull")]
        assert told == ["decode-1"]


async def test_requests_at_once_do_not_mix_their_tokens() -> None:
    async with gateway(2, 2) as g:
        prompts = [tuple(range(i, i + 5)) for i in range(32)]
        answers = await asyncio.gather(*(g.generate(g.request(prompt=prompt)) for prompt in prompts))

        assert [a.tokens[0] for a in answers] == [expected_tokens(prompt, 3, 8) for prompt in prompts]
        assert all(not w.aborts for w in g.workers.values())
        assert all(w.num_assigned == 0 for w in g.membership.view().workers)


# ---- workers die ----

PREFILL_STAGES = (QUEUED, FIRST_TOKEN, BEFORE_COMMIT, COMMITTED)


@pytest.mark.parametrize("stage", PREFILL_STAGES)
async def test_a_prefill_worker_that_dies_loses_and_repeats_no_token(stage: str) -> None:
    async with gateway(2, 1) as g:
        g["prefill-0"].hooks[stage] = kill

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.last[0].finish_reason is FinishReason.LENGTH
        assert not g["decode-0"].announced


@pytest.mark.parametrize("stage", [QUEUED, FIRST_TOKEN])
async def test_a_prefill_worker_lost_before_its_token_is_a_retry_on_another_one(stage: str) -> None:
    async with gateway(2, 1) as g:
        g["prefill-0"].hooks[stage] = kill

        answer = await g.generate(g.request())

        assert answer.timing.prefill_worker == "prefill-1"
        assert answer.timing.num_attempts == 2
        assert g["prefill-1"].prefills[0].output_token_ids == ()
        assert (g.router.counters.num_retries, g.router.counters.num_resumes) == (1, 0)
        assert set(g.router.counters.retries_by_reason) == {"prefill_lost"}


async def test_a_prefill_worker_lost_between_token_and_commit_is_a_resume_with_that_token() -> None:
    async with gateway(2, 1) as g:
        g["prefill-0"].hooks[BEFORE_COMMIT] = kill

        answer = await g.generate(g.request())

        assert g["prefill-1"].prefills[0].output_token_ids == tuple(EXPECTED[:1])
        assert answer.timing.num_attempts == 2
        assert g.router.counters.resumes_by_reason == {"prefill_lost": 1}


async def test_losing_the_prefill_worker_after_the_commit_is_no_failure() -> None:
    async with gateway(1, 1) as g:

        async def kill_prefill(visit: Visit) -> None:
            await g["prefill-0"].kill()

        g["decode-0"].hooks[DECODED] = sent(3, kill_prefill)  # type: ignore[assignment]
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.num_attempts == 1
        assert g.router.counters.num_resumes == 0


async def test_a_first_token_lost_with_its_worker_is_made_again_although_the_sequence_was_committed() -> None:
    async with gateway(2, 1) as g:
        decode = g["decode-0"]

        async def commit_and_die(visit: Visit) -> None:
            decode.commit(visit.spec.sequence_id)
            await until(lambda: not decode.running)
            await visit.worker.kill()

        g["prefill-0"].hooks[FIRST_TOKEN] = commit_and_die
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert g.router.counters.retries_by_reason == {"prefill_lost": 1}


async def test_without_another_prefill_worker_the_decode_worker_takes_over() -> None:
    async with gateway(1, 1) as g:
        g["prefill-0"].hooks[FIRST_TOKEN] = kill

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.prefill_worker is None


@pytest.mark.parametrize("num_sent", [1, 3, 5])
async def test_a_decode_worker_that_dies_is_resumed_elsewhere_with_the_tokens_so_far(num_sent: int) -> None:
    async with gateway(1, 2) as g:
        g["decode-0"].hooks[DECODED] = sent(num_sent, kill)  # type: ignore[assignment]

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.decode_worker == "decode-1"
        resumed = g["decode-1"].decodes[0].output_token_ids
        assert resumed == tuple(EXPECTED[: len(resumed)])
        assert set(g.router.counters.resumes_by_reason) == {"decode_lost"}


async def test_a_decode_worker_that_dies_on_the_announcement_is_a_retry() -> None:
    async with gateway(1, 2) as g:
        g["decode-0"].hooks[ANNOUNCED] = kill

        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert g["prefill-0"].prefills[0].output_token_ids == ()
        assert g.router.counters.retries_by_reason == {"decode_lost": 1}


async def test_the_prefill_worker_of_a_lost_attempt_is_told_to_abort() -> None:
    async with gateway(1, 2) as g:
        prefill, decode = g["prefill-0"], g["decode-0"]

        async def kill_decode(visit: Visit) -> None:
            prefill.hooks.clear()
            await decode.kill()
            await stall(visit)

        prefill.hooks[FIRST_TOKEN] = kill_decode
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert [stage for _, stage in prefill.aborts] == [Role.PREFILL]
        assert prefill.aborts[0][0] != prefill.prefills[-1].sequence_id


async def test_both_workers_dying_in_turn_under_load_lose_no_request() -> None:
    async with gateway(2, 2) as g:
        g["prefill-1"].hooks[BEFORE_COMMIT] = kill
        g["decode-0"].hooks[DECODED] = sent(4, kill)  # type: ignore[assignment]
        prompts = [tuple(range(i, i + 5)) for i in range(16)]

        answers = await asyncio.gather(*(g.generate(g.request(prompt=prompt)) for prompt in prompts))

        assert [a.tokens[0] for a in answers] == [expected_tokens(prompt, 3, 8) for prompt in prompts]
        assert all(not worker.running for worker in (g["prefill-0"], g["decode-1"]))


async def test_a_request_waits_for_a_worker_that_restarts() -> None:
    async with gateway(1, 1) as g:
        g["decode-0"].hooks[DECODED] = sent(2, kill)  # type: ignore[assignment]
        running = asyncio.create_task(g.generate(g.request()))
        await until(lambda: not g.membership.view().ready(Role.DECODE))

        await g.add(FakeWorker("decode-0", Role.DECODE, engine_id="decode-0-engine-2"))

        assert (await running).tokens == {0: EXPECTED}


async def test_when_no_decode_worker_comes_in_time_the_request_ends_with_no_route() -> None:
    async with gateway(1, 0, config=replace(CONFIG, no_route_wait_s=0.05)) as g:
        with pytest.raises(NoRoute, match="no decode worker is ready"):
            await g.generate(g.request())

        assert g.router.num_inflight == 0


# ---- workers give up ----


@pytest.mark.parametrize(
    ("worker", "stage", "reason"),
    [("prefill-0", FIRST_TOKEN, "prefill_failed"), ("decode-0", DECODED, "decode_failed")],
)
async def test_a_retryable_failure_is_tried_elsewhere(worker: str, stage: str, reason: str) -> None:
    async with gateway(2, 2) as g:
        g[worker].hooks[stage] = fail

        answer = await g.generate(g.request())

        counters = g.router.counters
        assert answer.tokens == {0: EXPECTED}
        assert Counter(counters.retries_by_reason) + Counter(counters.resumes_by_reason) == {reason: 1}
        assert worker not in (answer.timing.prefill_worker, answer.timing.decode_worker)


async def test_two_reports_of_one_failure_end_one_attempt() -> None:
    async with gateway(2, 2) as g:

        async def fail_twice(visit: Visit) -> None:
            visit.worker.hooks.clear()
            failure = SequenceFailure(visit.spec.sequence_id, "twice", True, Role.DECODE)
            visit.worker.send(failure, failure)
            await stall(visit)

        g["decode-0"].hooks[DECODED] = fail_twice
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.num_attempts == 2


async def test_a_failure_that_is_not_retryable_goes_to_the_client() -> None:
    async with gateway(2, 2) as g:

        async def fail_for_good(visit: Visit) -> None:
            visit.worker.fail(visit.spec, "the model diverged", retryable=False)

        g["decode-0"].hooks[DECODED] = fail_for_good
        with pytest.raises(SequenceFailed, match="the model diverged") as caught:
            await g.generate(g.request())

        assert not caught.value.retryable
        assert len(g["prefill-0"].prefills) + len(g["prefill-1"].prefills) == 1


async def test_attempts_are_bounded() -> None:
    async with gateway(0, 1, config=replace(CONFIG, max_attempts=3)) as g:

        async def always_fail(visit: Visit) -> None:
            visit.worker.fail(visit.spec, "broken")
            await stall(visit)

        g["decode-0"].hooks[DECODED] = always_fail
        with pytest.raises(SequenceFailed, match="3 attempts failed, the last: broken"):
            await g.generate(g.request())

        assert [len(spec.output_token_ids) for spec in g["decode-0"].decodes] == [0, 1, 2]


async def test_a_worker_that_refuses_the_call_is_avoided() -> None:
    async with gateway(2, 1) as g:

        async def refuse(visit: Visit) -> None:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

        g["prefill-0"].hooks[QUEUED] = refuse
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert g.router.counters.retries_by_reason == {"prefill_failed": 1}


async def test_a_request_that_no_worker_can_ever_run_is_the_clients_error_and_not_retried() -> None:
    async with gateway(2, 2) as g:

        async def refuse(visit: Visit) -> None:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "prompt: needs 90 pages, the pool has 80")

        for worker in g.workers.values():
            worker.hooks[ANNOUNCED] = refuse
        with pytest.raises(InvalidRequest) as caught:
            await g.generate(g.request())

        assert (caught.value.field, caught.value.message) == ("prompt", "needs 90 pages, the pool has 80")
        assert len(g["decode-0"].decodes) + len(g["decode-1"].decodes) == 1


async def test_late_chunks_of_a_replaced_attempt_reach_nobody() -> None:
    async with gateway(1, 2) as g:
        stale = g["decode-0"]

        async def fail_but_go_on(visit: Visit) -> None:
            stale.hooks.clear()
            stale.fail(visit.spec)

        stale.hooks[DECODED] = sent(2, fail_but_go_on)  # type: ignore[assignment]
        answer = await g.generate(g.request())

        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.decode_worker == "decode-1"


# ---- clients go away ----


@pytest.mark.parametrize("num_tokens_read", [1, 3])
async def test_closing_the_generator_aborts_both_workers(num_tokens_read: int) -> None:
    async with gateway() as g:
        g["prefill-0"].hooks[BEFORE_COMMIT if num_tokens_read == 1 else COMMITTED] = stall
        g["decode-0"].step_s = 0.005
        seen = 0
        async with aclosing(g.router.generate(g.request(num_tokens=1000))) as stream:
            async for chunk in stream:
                seen += len(chunk.token_ids)
                if seen >= num_tokens_read:
                    break
        await until(lambda: g["prefill-0"].aborts and g["decode-0"].aborts)

        assert g["prefill-0"].running == g["decode-0"].running == {}
        assert g["decode-0"].announced == {}
        assert g.router.num_inflight == 0
        assert all(worker.num_assigned == 0 for worker in g.membership.view().workers)


async def test_a_client_that_goes_during_the_announcement_leaves_nothing_behind() -> None:
    async with gateway() as g:
        reached = asyncio.Event()
        aborts_before_announced: list[int] = []

        async def slow(visit: Visit) -> None:
            reached.set()
            await asyncio.sleep(0.05)
            aborts_before_announced.append(len(visit.worker.aborts))

        g["decode-0"].hooks[ANNOUNCED] = slow
        running = asyncio.create_task(g.generate(g.request()))
        await reached.wait()
        running.cancel()
        await asyncio.wait({running})
        await until(lambda: g["decode-0"].aborts)

        assert aborts_before_announced == [0], "an abort overtook the announcement"
        assert g["decode-0"].announced == {}
        assert g["prefill-0"].prefills == []


async def test_abort_by_id_cancels_the_request_and_frees_both_workers() -> None:
    async with gateway() as g:
        g["prefill-0"].hooks[FIRST_TOKEN] = stall
        running = asyncio.create_task(g.generate(g.request(request_id="mine")))
        await until(lambda: g["prefill-0"].running)

        assert g.router.abort(RequestId("mine"))
        with pytest.raises(Cancelled):
            await running
        await until(lambda: g["prefill-0"].aborts and g["decode-0"].aborts)

        assert not g.router.abort(RequestId("mine"))
        assert g["prefill-0"].running == {}


async def test_abort_reaches_a_request_that_waits_for_a_worker() -> None:
    async with gateway(0, 0) as g:
        running = asyncio.create_task(g.generate(g.request(request_id="mine")))
        await until(lambda: g.router.num_inflight)

        g.router.abort(RequestId("mine"))

        with pytest.raises(Cancelled):
            await running


async def test_a_deadline_ends_the_request_and_aborts_both_workers() -> None:
    async with gateway() as g:
        g["prefill-0"].hooks[FIRST_TOKEN] = stall

        with pytest.raises(DeadlineExceeded):
            await g.generate(g.request(deadline_s=0.1))
        await until(lambda: g["prefill-0"].aborts and g["decode-0"].aborts)


async def test_a_deadline_that_has_passed_starts_nothing() -> None:
    async with gateway() as g:
        with pytest.raises(DeadlineExceeded):
            await g.generate(g.request(deadline_s=0.0))

        assert g["decode-0"].decodes == []


async def test_stop_ends_a_continuation_with_one_last_chunk_and_aborts_it() -> None:
    async with gateway() as g:
        g["decode-0"].step_s = 0.005
        request = g.request(num_tokens=1000)
        chunks = []
        async for chunk in g.router.generate(request):
            chunks.append(chunk)
            if len(chunks) == 3:
                await g.router.stop(request.request_id, 0)
        await until(lambda: g["decode-0"].aborts)

        assert len(chunks) == 4
        assert (chunks[-1].finish_reason, chunks[-1].token_ids) == (FinishReason.STOP, ())
        assert chunks[-1].timing is not None
        assert g["decode-0"].running == {}


async def test_stopping_what_does_not_run_changes_nothing() -> None:
    async with gateway() as g:
        await g.router.stop(RequestId("unknown"), 0)
        request = g.request()
        stream = g.router.generate(request)
        first = await anext(stream)
        await g.router.stop(request.request_id, 7)
        rest = await collect(stream)

        assert [*first.token_ids, *rest.tokens[0]] == EXPECTED


# ---- bounds and drain ----


async def test_requests_beyond_the_bound_are_refused_and_the_bound_is_freed_again() -> None:
    async with gateway(config=replace(CONFIG, max_inflight=1)) as g:
        stream = g.router.generate(g.request())
        await anext(stream)

        with pytest.raises(Overloaded):
            await g.generate(g.request())
        await stream.aclose()

        assert (await g.generate(g.request())).tokens == {0: EXPECTED}


ONE_AT_A_TIME = AdmissionConfig(decode_slots=1)


async def waiting(g: Gateway, **asked: Any) -> asyncio.Task[Answer]:
    """A request that waits for its turn behind those that run."""
    queued = g.router.counters.admission.num_queued
    task = asyncio.create_task(g.generate(g.request(**asked)))
    await until(lambda: g.router.counters.admission.num_queued > queued)
    return task


async def test_a_request_waits_for_its_turn_and_says_how_long() -> None:
    async with gateway(admission=ONE_AT_A_TIME) as g:
        stream = g.router.generate(g.request())
        await anext(stream)
        second = await waiting(g)
        assert len(g["decode-0"].decodes) == 1

        await stream.aclose()

        answer = await second
        assert answer.tokens == {0: EXPECTED}
        assert answer.timing.admission_s > 0
        assert answer.timing.route_s >= 0
        assert answer.timing.ttft_s >= answer.timing.admission_s + answer.timing.route_s
        assert g.router.counters.admission.num_queued == g.router.num_inflight == 0


async def test_those_that_wait_start_in_the_order_of_their_priority() -> None:
    async with gateway(admission=ONE_AT_A_TIME) as g:
        stream = g.router.generate(g.request())
        await anext(stream)
        tasks = [await waiting(g, prompt=(priority + 10,), priority=priority) for priority in (0, 3, -2, 1)]

        await stream.aclose()
        await asyncio.gather(*tasks)

        assert [spec.prompt_token_ids[0] - 10 for spec in g["decode-0"].decodes[1:]] == [3, 1, 0, -2]


@pytest.mark.parametrize("end", ["abort", "deadline", "disconnect"])
async def test_whatever_ends_a_request_that_waits_ends_it_at_once_and_no_worker_hears_of_it(end: str) -> None:
    async with gateway(admission=ONE_AT_A_TIME) as g:
        stream = g.router.generate(g.request())
        await anext(stream)
        task = await waiting(g, request_id="mine", deadline_s=0.05 if end == "deadline" else None)

        if end == "abort":
            g.router.abort(RequestId("mine"))
        elif end == "disconnect":
            task.cancel()
        with pytest.raises({"abort": Cancelled, "deadline": DeadlineExceeded}.get(end, asyncio.CancelledError)):
            await task

        assert g.router.counters.admission.num_queued == 0
        assert g.router.num_inflight == 1
        assert len(g["prefill-0"].prefills) == len(g["decode-0"].decodes) == 1
        await stream.aclose()
        assert (await g.generate(g.request(request_id="mine"))).tokens == {0: EXPECTED}


async def test_a_drain_refuses_those_that_wait_and_lets_the_others_end() -> None:
    async with gateway(admission=ONE_AT_A_TIME) as g:
        g["decode-0"].step_s = 0.005
        stream = g.router.generate(g.request())
        first = await anext(stream)
        task = await waiting(g)

        draining = asyncio.create_task(g.router.drain(5.0))
        with pytest.raises(NoRoute, match="the gateway is stopping"):
            await task
        rest = await collect(stream)

        assert [*first.token_ids, *rest.tokens[0]] == EXPECTED
        assert await draining


async def test_more_than_may_wait_are_refused_with_the_bound_and_counted() -> None:
    async with gateway(admission=replace(ONE_AT_A_TIME, max_queued=1)) as g:
        stream = g.router.generate(g.request())
        await anext(stream)
        first = await waiting(g)

        with pytest.raises(Overloaded) as caught:
            await g.generate(g.request())

        assert (caught.value.reason, caught.value.allowed) == ("max_queued", 1)
        assert g.router.counters.admission.refusals_by_reason == {"max_queued": 1}
        await stream.aclose()
        assert (await first).tokens == {0: EXPECTED}


async def test_an_objective_that_the_policy_expects_to_be_missed_is_refused_and_no_worker_hears_of_it() -> None:
    class Pessimist(RoundRobin):
        def route(self, request: RouteRequest, view: ClusterView) -> Route:
            return replace(super().route(request, view), expected=Forecast(ttft_s=9.0, tpot_s=0.5, bytes_shipped=0))

    async with gateway(policy=Pessimist()) as g:
        with pytest.raises(Overloaded) as caught:
            await g.generate(g.request(slo=Slo(ttft_s=2.0)))

        assert (caught.value.reason, caught.value.allowed) == ("slo_ttft", 2.0)
        assert caught.value.predicted == pytest.approx(9.0, abs=0.5)
        assert (g["prefill-0"].prefills, g["decode-0"].decodes, g.router.num_inflight) == ([], [], 0)


async def test_what_the_prfaas_policy_forecasts_is_what_an_objective_is_held_against() -> None:
    async with gateway(policy=make_policy("prfaas")) as g:
        with pytest.raises(Overloaded) as caught:
            await g.generate(g.request(slo=Slo(ttft_s=1e-9)))
        answer = await g.generate(g.request(slo=Slo(ttft_s=60.0, tpot_s=60.0)))

        assert (caught.value.reason, caught.value.allowed) == ("slo_ttft", 1e-9)
        assert answer.tokens == {0: EXPECTED}


async def test_the_answer_says_which_objectives_were_met() -> None:
    async with gateway() as g:
        g["decode-0"].step_s = 0.005

        timing = (await g.generate(g.request(slo=Slo(ttft_s=60.0, tpot_s=0.001)))).timing
        without = (await g.generate(g.request())).timing

        assert (timing.slo_ttft_met, timing.slo_tpot_met) == (True, False)
        assert (without.slo_ttft_met, without.slo_tpot_met, without.slo_miss_expected) == (None, None, "")


async def test_the_policy_is_asked_once_for_a_request_that_starts_at_once() -> None:
    async with gateway(2, 1) as g:
        for _ in range(4):
            await g.generate(g.request())

        assert (len(g["prefill-0"].prefills), len(g["prefill-1"].prefills)) == (2, 2)


async def test_a_request_keeps_its_turn_however_often_its_route_is_asked_for_while_it_waits() -> None:
    asked: list[RouteRequest] = []

    class Noting(RoundRobin):
        def route(self, request: RouteRequest, view: ClusterView) -> Route:
            asked.append(request)
            return super().route(request, view)

    async with gateway(policy=Noting(), admission=ONE_AT_A_TIME) as g:
        stream = g.router.generate(g.request())
        await anext(stream)
        first, second = await waiting(g), await waiting(g)
        await stream.aclose()
        await asyncio.gather(first, second)

    turns = {request.request_id: {r.ordinal for r in asked if r.request_id == request.request_id} for request in asked}
    assert list(turns.values()) == [{0}, {1}, {2}]
    assert len(asked) > 3, "those that waited were asked for more than once"


async def test_a_request_id_in_flight_is_refused_and_may_be_used_again_later() -> None:
    async with gateway() as g:
        stream = g.router.generate(g.request(request_id="same"))
        await anext(stream)

        with pytest.raises(InvalidRequest, match="request_id"):
            await g.generate(g.request(request_id="same"))
        await stream.aclose()
        await g.generate(g.request(request_id="same"))

        names = [spec.sequence_id for spec in g["decode-0"].decodes]
        assert len(names) == len(set(names)) == 2


async def test_drain_lets_requests_end_and_takes_no_new_ones() -> None:
    async with gateway() as g:
        g["decode-0"].step_s = 0.005
        stream = g.router.generate(g.request())
        first = await anext(stream)
        draining = asyncio.create_task(g.router.drain(5.0))
        await asyncio.sleep(0)

        with pytest.raises(NoRoute):
            await g.generate(g.request())
        rest = await collect(stream)

        assert [*first.token_ids, *rest.tokens[0]] == EXPECTED
        assert await draining


async def test_drain_cancels_what_does_not_end_in_time_and_tells_the_workers() -> None:
    async with gateway() as g:
        g["prefill-0"].hooks[FIRST_TOKEN] = stall
        running = asyncio.create_task(g.generate(g.request()))
        await until(lambda: g["prefill-0"].running)

        assert not await g.router.drain(0.01)

        with pytest.raises(Cancelled):
            await running
        assert len(g["prefill-0"].aborts) == len(g["decode-0"].aborts) == 1


# ---- n > 1 ----


def expected_continuations(g: Gateway, n: int) -> dict[int, list[int]]:
    sampling = g.request(n=n).sampling
    seeds = [sampling.for_index(index).seed for index in range(n)]
    return {index: expected_tokens(PROMPT, seed, 8) for index, seed in enumerate(seeds) if seed is not None}


async def test_every_continuation_comes_whole_and_ends_once() -> None:
    async with gateway(2, 2) as g:
        answer = await g.generate(g.request(n=4))

        assert answer.tokens == expected_continuations(g, 4)
        assert set(answer.last) == {0, 1, 2, 3}


async def test_siblings_start_after_the_first_token_on_the_same_workers() -> None:
    async with gateway(2, 2) as g:
        order: list[str] = []

        async def note(visit: Visit) -> None:
            order.append(visit.spec.sequence_id)
            if len(order) == 1:
                await asyncio.sleep(0.02)
                assert len(order) == 1, "a sibling started before the first token"

        for worker in (g["prefill-0"], g["prefill-1"]):
            worker.hooks[FIRST_TOKEN] = note
        answer = await g.generate(g.request(n=3))

        used = {
            (chunk.timing.prefill_worker, chunk.timing.decode_worker) for chunk in answer.last.values() if chunk.timing
        }
        assert len(used) == 1
        assert len(order) == 3


async def test_continuations_survive_the_loss_of_their_decode_worker() -> None:
    async with gateway(2, 2) as g:
        for worker in (g["decode-0"],):
            worker.hooks[DECODED] = sent(3, kill)  # type: ignore[assignment]
        answer = await g.generate(g.request(n=3))

        assert answer.tokens == expected_continuations(g, 3)


async def test_closing_the_generator_aborts_every_continuation() -> None:
    async with gateway() as g:
        g["decode-0"].step_s = 0.005
        stream = g.router.generate(g.request(n=3, num_tokens=1000))
        seen: set[int] = set()
        async for chunk in stream:
            seen.add(chunk.index)
            if seen == {0, 1, 2}:
                break
        await stream.aclose()
        await until(lambda: len(g["decode-0"].aborts) == 3)

        assert g["decode-0"].running == {}


async def test_one_continuations_failure_ends_the_request_and_aborts_its_siblings() -> None:
    async with gateway() as g:
        decode = g["decode-0"]
        decode.step_s = 0.005

        async def fail_the_last(visit: Visit) -> None:
            if "/2." in visit.spec.sequence_id:
                visit.worker.fail(visit.spec, "no", retryable=False)

        decode.hooks[DECODED] = fail_the_last
        with pytest.raises(SequenceFailed):
            await g.generate(g.request(n=3, num_tokens=1000))
        await until(lambda: len(decode.aborts) >= 2)
        await until(lambda: not decode.running)


# ---- who hears of requests ----


class Heard:
    """A RequestObserver that keeps what it is told."""

    def __init__(self) -> None:
        self.routed_requests: list[tuple[str, int]] = []
        self.ended_tokens: list[int] = []

    def routed(self, request: RouteRequest, route: Route) -> None:
        self.routed_requests.append((route.decode.worker_id, request.num_tokens))

    def ended(self, output_tokens: int) -> None:
        self.ended_tokens.append(output_tokens)


async def test_a_request_is_told_once_when_it_is_routed_and_once_when_it_ends_with_all_its_tokens() -> None:
    heard = Heard()
    async with gateway(observer=heard) as g:
        await g.generate(g.request())
        await g.generate(g.request(n=3))

    assert heard.routed_requests == [("decode-0", len(PROMPT))] * 2
    assert heard.ended_tokens == [8, 24]


async def test_a_retried_request_was_asked_for_once() -> None:
    heard = Heard()
    async with gateway(2, 1, observer=heard) as g:
        g["prefill-0"].hooks[FIRST_TOKEN] = kill
        answer = await g.generate(g.request())

    assert answer.timing.num_attempts == 2
    assert (len(heard.routed_requests), heard.ended_tokens) == (1, [8])


async def test_a_request_that_found_no_route_is_not_told_of() -> None:
    heard = Heard()
    async with gateway(1, 0, config=replace(CONFIG, no_route_wait_s=0.05), observer=heard) as g:
        with pytest.raises(NoRoute):
            await g.generate(g.request())

    assert (heard.routed_requests, heard.ended_tokens) == ([], [])


async def test_tokens_of_requests_in_flight_are_known_until_they_end() -> None:
    heard = Heard()
    async with gateway(observer=heard) as g:
        g["decode-0"].hooks[DECODED] = sent(3, stall)  # type: ignore[assignment]
        assert (g.router.num_open_tokens, g.router.num_answering) == (0, 0)
        reading = asyncio.create_task(g.generate(g.request()))
        await until(lambda: g.router.num_open_tokens == 4)
        assert g.router.num_answering == 1
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

        assert (g.router.num_open_tokens, g.router.num_answering) == (0, 0)
    assert heard.ended_tokens == [4]
