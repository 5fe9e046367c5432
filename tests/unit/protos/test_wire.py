"""Messages and our types are two spellings of one thing: every crossing and back changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cache_tiers import LOWER_TIERS, ReloadOutcome, ReloadReport, TierState
from core.compute import ComputeProfile, EngineModes, StepSample
from core.errors import ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.grammar import Grammar, GrammarKind
from core.kv_layout import KvLayer, KvLayout
from core.link import LinkEstimate, ProbeReport
from core.request import (
    ClusterId,
    EngineId,
    FinishReason,
    PullOutcome,
    PullReport,
    PullTask,
    Role,
    SamplingParams,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    StageStats,
    TokenChunk,
    TokenLogprob,
    WorkerId,
)
from protos import wire
from protos import worker_pb2 as pb

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=6).map(tuple)
SECONDS = st.floats(0, 1e6)
COUNTS = st.integers(0, 2**31)
FLOAT32 = st.floats(-1e3, 0, width=32)

SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(10, 2**31),
    min_tokens=st.integers(0, 10),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**31),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
) | st.builds(
    SamplingParams,
    seed=st.integers(-(2**63), 2**63 - 1),
    grammar=st.builds(Grammar, st.sampled_from(GrammarKind), st.text(min_size=1, max_size=9)),
)
SPECS = st.builds(
    SequenceSpec,
    sequence_id=st.text(min_size=1, max_size=20).map(SequenceId),
    prompt_token_ids=TOKENS.filter(bool),
    output_token_ids=TOKENS,
    sampling=SAMPLING,
    salt=st.binary(max_size=8),
    hold_kv=st.booleans(),
)
RATES = st.none() | st.floats(0, 1e12)
LINKS = st.builds(
    LinkEstimate,
    worker_id=st.text(max_size=9).map(WorkerId),
    cluster_id=st.text(max_size=9).map(ClusterId),
    path=st.text(max_size=9),
    connections=COUNTS,
    goodput=RATES,
    delivery_rate=RATES,
    rtt_s=st.none() | SECONDS,
    min_rtt_s=st.none() | SECONDS,
    retransmits=COUNTS,
    retransmits_per_mib=SECONDS,
    fit_t0_s=st.none() | SECONDS,
    fit_beta=RATES,
    fit_variance=st.none() | SECONDS,
    samples=COUNTS,
    throughput=SECONDS,
    bytes_sent=st.integers(0, 2**63),
    bytes_queued=st.integers(0, 2**63),
    reconnects=COUNTS,
    falls=COUNTS,
    age_s=SECONDS,
)
PROBES = st.builds(
    ProbeReport,
    path=st.text(max_size=9),
    num_bytes=st.integers(0, 2**63),
    exact=st.booleans(),
    timed_bytes=st.integers(0, 2**63),
    seconds=SECONDS,
    rtt_s=st.none() | SECONDS,
    error=st.text(max_size=9),
    reason=st.text(max_size=9),
)
PULL_TASKS = st.builds(
    PullTask,
    worker_id=st.text(max_size=9).map(WorkerId),
    cluster_id=st.text(max_size=9).map(ClusterId),
    engine_id=st.text(max_size=9).map(EngineId),
    address=st.text(max_size=9),
    num_tokens=COUNTS,
    timeout_s=st.none() | SECONDS,
)
PROFILES = st.builds(
    ComputeProfile,
    device=st.text(max_size=9),
    num_devices=COUNTS,
    weight_bytes=st.integers(0, 2**63),
    weight_flops=SECONDS,
    attention_flops=SECONDS,
    step_tokens=COUNTS,
)
STEPS = st.builds(
    StepSample,
    prefill_tokens=COUNTS,
    prefill_pairs=SECONDS,
    decode_batch=COUNTS,
    decode_context=st.integers(0, 2**63),
    seconds=SECONDS,
)
STATS = st.builds(
    StageStats,
    worker_id=st.text(max_size=9).map(WorkerId),
    role=st.sampled_from(Role),
    queue_s=SECONDS,
    compute_s=SECONDS,
    transfer_s=SECONDS,
    exposed_transfer_s=SECONDS,
    transfer_wait_s=SECONDS,
    cached_tokens=COUNTS,
    received_tokens=COUNTS,
    bytes_shipped=st.integers(0, 2**63),
    num_preemptions=COUNTS,
    pull=st.none()
    | st.builds(
        PullReport,
        outcome=st.sampled_from(PullOutcome),
        num_tokens=COUNTS,
        num_bytes=st.integers(0, 2**63),
        seconds=SECONDS,
    ),
    reload=st.none()
    | st.builds(
        ReloadReport,
        outcome=st.sampled_from(ReloadOutcome),
        host_tokens=COUNTS,
        disk_tokens=COUNTS,
        seconds=SECONDS,
        reason=st.text(max_size=9),
    ),
)
STATES = st.builds(
    TierState,
    tier=st.sampled_from(LOWER_TIERS),
    pages_total=COUNTS,
    pages_used=COUNTS,
    load_bytes_per_s=SECONDS,
    load_t0_s=SECONDS,
    queued_bytes=COUNTS,
    stored_pages=COUNTS,
    loaded_tokens=COUNTS,
    evicted_pages=COUNTS,
    damaged_pages=COUNTS,
    foreign_pages=COUNTS,
)
LOGPROBS = st.builds(
    TokenLogprob,
    token_id=st.integers(0, 2**32 - 1),
    logprob=FLOAT32,
    top=st.lists(st.tuples(st.integers(0, 2**32 - 1), FLOAT32), max_size=3).map(tuple),
)
CHUNKS = st.builds(
    TokenChunk,
    sequence_id=st.text(min_size=1, max_size=20).map(SequenceId),
    position=COUNTS,
    token_ids=TOKENS,
    logprobs=st.lists(LOGPROBS, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | st.integers(0, 2**32 - 1),
    stats=st.none() | STATS,
)


@settings(max_examples=40)
@given(SPECS)
def test_a_sequence_survives_the_wire(spec: SequenceSpec) -> None:
    data = wire.spec_to_message(spec).SerializeToString()
    assert wire.spec_from_message(pb.SequenceSpec.FromString(data), hold_kv=spec.hold_kv) == spec


@settings(max_examples=40)  # each has dozens of fields to draw
@given(CHUNKS)
def test_a_chunk_survives_the_wire(chunk: TokenChunk) -> None:
    data = wire.chunk_to_message(chunk).SerializeToString()
    assert wire.chunk_from_message(pb.TokenChunk.FromString(data)) == chunk


@given(PROFILES, STEPS)
def test_what_an_engine_costs_survives_the_wire(profile: ComputeProfile, step: StepSample) -> None:
    data = wire.compute_to_message(profile).SerializeToString()
    assert wire.compute_from_message(pb.ComputeProfile.FromString(data)) == profile
    data = wire.step_to_message(step).SerializeToString()
    assert wire.step_from_message(pb.StepSample.FromString(data)) == step


@given(st.text(max_size=9), st.booleans(), st.sampled_from(Role))
def test_a_failure_survives_the_wire(message: str, retryable: bool, stage: Role) -> None:
    failure = SequenceFailure(SequenceId("s"), message, retryable, stage)
    data = wire.failure_to_message(failure).SerializeToString()
    assert wire.failure_from_message(pb.SequenceFailure.FromString(data)) == failure


@given(PULL_TASKS)
def test_a_pull_survives_the_wire(task: PullTask) -> None:
    data = wire.pull_task_to_message(task).SerializeToString()
    assert wire.pull_task_from_message(pb.PullTask.FromString(data)) == task


def test_an_unknown_outcome_of_a_pull_is_named_with_the_known_ones() -> None:
    with pytest.raises(ProtocolViolation, match=r"pulled, cached, .*, got 'pushed'"):
        wire.stats_from_message(pb.StageStats(role="prefill", pull_outcome="pushed"))


@given(STATES)
def test_a_tiers_state_survives_the_wire(state: TierState) -> None:
    data = wire.tier_state_to_message(state).SerializeToString()
    assert wire.tier_state_from_message(pb.TierState.FromString(data)) == state


def test_an_unknown_outcome_of_a_reload_is_named_with_the_known_ones() -> None:
    with pytest.raises(ProtocolViolation, match=r"loaded, partly, .*, got 'stolen'"):
        wire.stats_from_message(pb.StageStats(role="prefill", reload_outcome="stolen"))


def test_a_kv_layout_survives_the_wire_with_like_layers_told_once() -> None:
    wide, narrow = KvLayer(8, 128, 128, "bfloat16", 2), KvLayer(4, 64, 0, "bfloat16", 2, first_head=4)
    layout = KvLayout(16, (wide, wide, narrow, wide))
    message = wire.kv_layout_to_message(layout)
    assert [entry.count for entry in message.layers] == [2, 1, 1]
    assert wire.kv_layout_from_message(message) == layout


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(pb.KvLayout(), id="nothing"),
        pytest.param(pb.KvLayout(page_size=16), id="no layers"),
        pytest.param(pb.KvLayout(layers=[pb.KvLayers(count=1, num_heads=1, key_dim=1, itemsize=1)]), id="no page"),
        pytest.param(pb.KvLayout(page_size=1, layers=[pb.KvLayers(count=1, key_dim=1, itemsize=1)]), id="no head"),
        pytest.param(
            pb.KvLayout(page_size=1, layers=[pb.KvLayers(count=1 << 31, num_heads=1, key_dim=1, itemsize=1)]),
            id="layers beyond count",
        ),
    ],
)
def test_a_kv_layout_that_no_pool_has_is_a_violation(message: pb.KvLayout) -> None:
    with pytest.raises(ProtocolViolation):
        wire.kv_layout_from_message(message)


def test_a_fingerprint_survives_the_wire() -> None:
    fingerprint = CacheFingerprint("llama", "abc", "bfloat16", 16, "def")
    assert wire.fingerprint_from_message(wire.fingerprint_to_message(fingerprint)) == fingerprint


@pytest.mark.parametrize(
    "message",
    [
        pb.SequenceSpec(),
        pb.SequenceSpec(sequence_id="s"),
        pb.SequenceSpec(sequence_id="s", prompt_token_ids=[1], sampling=pb.SamplingParams(temperature=-1)),
    ],
    ids=["empty", "no-tokens", "bad-sampling"],
)
def test_a_sequence_that_no_peer_of_ours_sends_is_a_violation(message: pb.SequenceSpec) -> None:
    with pytest.raises(ProtocolViolation):
        wire.spec_from_message(message, hold_kv=False)


def test_an_unknown_role_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(ProtocolViolation, match="prefill, decode, got 'encode'"):
        wire.role_from_text("encode")


@given(LINKS)
def test_links_cross_whole(link: LinkEstimate) -> None:
    assert wire.link_from_message(wire.link_to_message(link)) == link


@given(PROBES)
def test_probe_reports_cross_whole(report: ProbeReport) -> None:
    assert wire.probe_from_message(wire.probe_to_message(report)) == report


def test_modes_survive_the_wire() -> None:
    steps = (("least", 1), ("tpot", 7))
    modes = EngineModes("flashinfer", "the fastest", "compiled", "", 2, "layered", "4 of 32 layers", steps, 9)

    assert wire.modes_from_message(wire.modes_to_message(modes)) == modes
