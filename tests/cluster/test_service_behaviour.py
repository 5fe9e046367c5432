"""What the service does besides the plain case: sampling that survives loss, n > 1, roles, fallbacks, full pools."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from core.prefix_hash import page_hashes
from core.request import FinishReason, Role, SamplingParams, WorkerId
from engine.config import EngineConfig
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("family", ["llama"])]

NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
ENGINE = EngineConfig(
    dtype="float32",
    page_size=16,
    num_pages=256,
    max_prefill_chunk=16,
    max_batch_tokens=64,
    max_batch_size=16,
    threads=1,
)


def address(cluster: LiveCluster, worker_id: str) -> str:
    return cluster.hosts[WorkerId(worker_id)].address


async def test_sampled_tokens_depend_on_the_seed_and_not_on_the_way(family: str, tiny_model: ReferenceModel) -> None:
    """The same seed gives the same tokens whether the decode worker decodes, or prefills and decodes."""
    sampled = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=NUM_NEW, ignore_eos=True)
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        shipped = await cluster.generate(tiny_model.prompts[4], sampled)
        again = await cluster.generate(tiny_model.prompts[4], sampled)
        other = await cluster.generate(tiny_model.prompts[4], replace(sampled, seed=12))
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, num_prefill=0) as cluster:
        local = await cluster.generate(tiny_model.prompts[4], sampled)
    assert shipped.timing.prefill_worker == "prefill-0"
    assert local.timing.prefill_worker is None
    assert shipped.tokens == again.tokens == local.tokens
    assert shipped.tokens != other.tokens


async def test_n_continuations_share_the_prompt_and_each_has_its_own_seed(
    family: str, tiny_model: ReferenceModel
) -> None:
    sampled = SamplingParams(temperature=1.0, seed=5, max_tokens=NUM_NEW, ignore_eos=True, n=4)
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        answer = await cluster.generate(tiny_model.prompts[-1], sampled)
        alone = await cluster.generate(tiny_model.prompts[-1], replace(sampled, n=1), salt=b"cold")
        await cluster.check_integrity()
    assert sorted(answer.token_ids) == [0, 1, 2, 3]
    assert all(len(tokens) == NUM_NEW for tokens in answer.token_ids.values())
    assert len({tuple(tokens) for tokens in answer.token_ids.values()}) == 4
    assert answer.token_ids[0] == alone.tokens
    num_full = (len(tiny_model.prompts[-1]) - 1) // 16 * 16
    assert [answer.timings[index].cached_tokens for index in (1, 2, 3)] == [num_full] * 3


async def test_only_what_the_decode_side_lacks_travels(family: str, tiny_model: ReferenceModel) -> None:
    prompt = tiny_model.prompts[-1]  # 100 tokens: six full pages and a partial one
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        first = await cluster.generate(prompt, GREEDY)
        second = await cluster.generate(prompt, GREEDY)
        salted = await cluster.generate(prompt, GREEDY, salt=b"another tenant")
    assert first.timing.bytes_shipped == salted.timing.bytes_shipped
    assert first.timing.bytes_shipped == 7 * second.timing.bytes_shipped > 0
    assert (first.timing.cached_tokens, second.timing.cached_tokens, salted.timing.cached_tokens) == (0, 96, 0)
    assert second.timing.decode_cached_tokens == 96


async def test_gateways_know_which_pages_each_worker_caches_also_those_that_decoding_wrote(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[-1]
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        answer = await cluster.generate(prompt, replace(GREEDY, max_tokens=40))
        tokens = (*prompt, *answer.tokens)
        engines = {worker.role: worker.engine_id for worker in cluster.membership.view().workers}
        prefilled, decoded = len(prompt) // 16, (len(tokens) - 1) // 16  # the last token's K/V is never computed

        def known(_: object) -> bool:
            match = cluster.membership.match_prefix(page_hashes(tokens, 16))
            return (match.pages_on(engines[Role.PREFILL]), match.pages_on(engines[Role.DECODE])) == (prefilled, decoded)

        assert await cluster.membership.wait_until(known, 10.0)
        assert decoded > prefilled
        assert cluster.membership.match_prefix(page_hashes(tokens, 16, b"another tenant")).longest == 0


async def test_cache_aware_routing_brings_the_next_turn_to_where_the_last_one_is_cached(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[-1]
    async with live_cluster(
        str(tiny_model.folder), engine=ENGINE, num_prefill=2, num_decode=2, policy="cache_aware"
    ) as cluster:
        answer = await cluster.generate(prompt, replace(GREEDY, max_tokens=40))
        turn = (*prompt, *answer.tokens, *prompt[:20])
        num_written = (len(prompt) + len(answer.tokens) - 1) // 16

        def known(_: object) -> bool:
            return cluster.membership.match_prefix(page_hashes(turn, 16)).longest == num_written

        assert await cluster.membership.wait_until(known, 10.0)
        again = await cluster.generate(turn, GREEDY)
        alone = await cluster.generate(turn, GREEDY, salt=b"nobody's cache")
    assert again.tokens == alone.tokens
    assert again.timing.prefill_worker == answer.timing.prefill_worker
    assert again.timing.decode_worker == answer.timing.decode_worker
    assert again.timing.cached_tokens == len(prompt) // 16 * 16
    assert again.timing.decode_cached_tokens == num_written * 16
    assert again.timing.bytes_shipped < alone.timing.bytes_shipped / 2


async def test_without_a_prefill_pool_the_decode_worker_prefills_and_says_so(
    family: str, tiny_model: ReferenceModel
) -> None:
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, num_prefill=0) as cluster:
        answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in tiny_model.prompts))
        await cluster.check_integrity()
    for prompt, answer in zip(tiny_model.prompts, answers, strict=True):
        assert answer.tokens == tiny_model.expected(prompt, NUM_NEW)
        assert answer.timing.prefill_worker is None
        assert "prefill" in answer.timing.route_reason


async def test_a_worker_turns_from_prefill_to_decode_and_back_without_reloading(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[5]
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, num_prefill=2, num_decode=1) as cluster:
        engine_ids = {w.engine_id for w in cluster.membership.view().workers}
        async with grpc.aio.insecure_channel(address(cluster, "prefill-1")) as channel:
            stub = rpc.WorkerStub(channel)
            await stub.SetRole(pb.SetRoleRequest(role="decode"))
            assert await cluster.membership.wait_until(lambda view: len(view.ready(Role.DECODE)) == 2, 10)
            answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY, salt=bytes([i])) for i in range(6)))
            assert {answer.timing.decode_worker for answer in answers} == {"decode-0", "prefill-1"}
            assert {answer.timing.prefill_worker for answer in answers} == {"prefill-0"}
            await stub.SetRole(pb.SetRoleRequest(role="prefill"))
            assert await cluster.membership.wait_until(lambda view: len(view.ready(Role.PREFILL)) == 2, 10)
            answers += await asyncio.gather(*(cluster.generate(prompt, GREEDY, salt=b"%d" % i) for i in range(6)))
            assert {answer.timing.prefill_worker for answer in answers[6:]} == {"prefill-0", "prefill-1"}
            with pytest.raises(grpc.aio.AioRpcError, match="one of prefill, decode"):
                await stub.SetRole(pb.SetRoleRequest(role="both"))
        assert all(answer.tokens == tiny_model.expected(prompt, NUM_NEW) for answer in answers)
        assert {w.engine_id for w in cluster.membership.view().workers} == engine_ids
        await cluster.check_integrity()


async def test_a_decode_pool_that_is_too_small_for_the_load_is_waited_for(
    family: str, tiny_model: ReferenceModel
) -> None:
    """Eight requests, pages for about two at a time: grants wait, sequences are preempted, no token changes."""
    small = replace(ENGINE, num_pages=14)
    async with live_cluster(str(tiny_model.folder), engine=small) as cluster:
        answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in tiny_model.prompts))
        for prompt, answer in zip(tiny_model.prompts, answers, strict=True):
            assert answer.tokens == tiny_model.expected(prompt, NUM_NEW)
        await cluster.check_integrity()


async def test_a_first_token_that_ends_the_request_ships_nothing_to_decode(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[5]
    (first, *_) = tiny_model.expected(prompt, 1)
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        one = await cluster.generate(prompt, replace(GREEDY, max_tokens=1))
        stopped = await cluster.generate(prompt, replace(GREEDY, stop_token_ids=(first,)))
        assert (one.tokens, one.finish_reasons[0]) == ([first], FinishReason.LENGTH)
        assert (stopped.tokens, stopped.finish_reasons[0]) == ([first], FinishReason.STOP)
        assert stopped.chunks[-1].stop_token_id == first
        await cluster.check_integrity()


async def test_a_gateway_that_vanishes_leaves_nothing_behind(family: str, tiny_model: ReferenceModel) -> None:
    endless = replace(GREEDY, max_tokens=150)
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        streams = [cluster.stream(prompt, endless) for prompt in tiny_model.prompts]
        for stream in streams:
            await anext(stream)  # type: ignore[call-overload]
        await cluster.membership.close()  # its connections break; nobody sends an abort
        for host in cluster.hosts.values():
            async with asyncio.timeout(5):
                while True:
                    load = await asyncio.wrap_future(host.engine.submit(lambda engine: engine.load()))
                    if load.pages_free == load.pages_total and not load.num_running + load.num_waiting:
                        break
                    await asyncio.sleep(0.02)


async def test_a_pair_that_does_not_hold_the_same_cache_is_refused_by_field(
    family: str, tiny_model: ReferenceModel
) -> None:
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        async with grpc.aio.insecure_channel(address(cluster, "decode-0")) as channel:
            worker, decode = rpc.WorkerStub(channel), rpc.DecodeStub(channel)
            fingerprint = (await worker.Describe(pb.DescribeRequest())).fingerprint
            fingerprint.dtype = "float16"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await decode.Grant(pb.GrantRequest(session_id="x", fingerprint=fingerprint, wait_s=1))
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "dtype differs: this end has float32, the other end has float16" in (refused.value.details() or "")
            fingerprint.dtype, fingerprint.page_size = "float32", 64
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await decode.Grant(pb.GrantRequest(session_id="x", fingerprint=fingerprint, wait_s=1))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "compatible, but it tells no layout"
            assert "layout" in (refused.value.details() or "")


async def test_a_stranger_without_an_outputs_stream_may_queue_nothing(family: str, tiny_model: ReferenceModel) -> None:
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        sequence = pb.SequenceSpec(sequence_id="s", prompt_token_ids=[1])
        async with grpc.aio.insecure_channel(address(cluster, "prefill-0")) as channel:
            prefill, decode = rpc.PrefillStub(channel), rpc.DecodeStub(channel)
            for call in (
                prefill.Prefill(pb.PrefillRequest(gateway_id="stranger", sequence=sequence)),
                decode.Decode(pb.DecodeRequest(gateway_id="stranger", sequence=sequence)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
