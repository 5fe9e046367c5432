"""The one place where messages become our types and our types become messages.

Every pair ``x_to_message`` / ``x_from_message`` is inverse on valid values. What a peer sent is checked by the
types' own constructors; a value that no peer of ours would send raises ``ProtocolViolation``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby

from core.cache_tiers import LOWER_TIERS, ReloadOutcome, ReloadReport, Tier, TierState
from core.compute import ComputeProfile, EngineModes, StepSample
from core.errors import PrfaasError, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.grammar import Grammar, GrammarKind
from core.kv_layout import KvEnd, KvLayer, KvLayout
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import PageEvents, TierPages
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
from protos import worker_pb2 as pb

MAX_LAYERS = 1 << 14  # of a layout that a peer may tell


def fingerprint_to_message(fingerprint: CacheFingerprint) -> pb.Fingerprint:
    return pb.Fingerprint(
        model=fingerprint.model,
        revision=fingerprint.revision,
        dtype=fingerprint.dtype,
        page_size=fingerprint.page_size,
        layout=fingerprint.layout,
    )


def fingerprint_from_message(message: pb.Fingerprint) -> CacheFingerprint:
    return CacheFingerprint(
        model=message.model,
        revision=message.revision,
        dtype=message.dtype,
        page_size=message.page_size,
        layout=message.layout,
    )


def kv_layout_to_message(layout: KvLayout) -> pb.KvLayout:
    message = pb.KvLayout(page_size=layout.page_size)
    for layer, alike in groupby(layout.layers):
        message.layers.add(
            count=len(list(alike)),
            num_heads=layer.num_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            dtype=layer.dtype,
            itemsize=layer.itemsize,
            first_head=layer.first_head,
        )
    return message


def kv_layout_from_message(message: pb.KvLayout) -> KvLayout:
    """Raise ``ProtocolViolation`` for a layout that no pool has."""
    num_layers = sum(entry.count for entry in message.layers)
    sizes = (min(entry.count, entry.num_heads, entry.key_dim, entry.itemsize) for entry in message.layers)
    if not message.page_size or not 1 <= num_layers <= MAX_LAYERS or not all(sizes):
        raise ProtocolViolation(f"a K/V layout of {message.page_size} tokens a page and {num_layers} layers")
    layers: list[KvLayer] = []
    for entry in message.layers:
        layer = KvLayer(entry.num_heads, entry.key_dim, entry.value_dim, entry.dtype, entry.itemsize, entry.first_head)
        layers += [layer] * entry.count
    return KvLayout(message.page_size, tuple(layers))


def kv_ends_to_messages(ranks: Iterable[KvEnd]) -> list[pb.KvEnd]:
    return [pb.KvEnd(layout=kv_layout_to_message(end.layout), descriptor=end.descriptor) for end in ranks]


def kv_ends_from_messages(messages: Iterable[pb.KvEnd]) -> tuple[KvEnd, ...]:
    """Raise ``ProtocolViolation`` for a layout that no pool has."""
    return tuple(KvEnd(kv_layout_from_message(message.layout), message.descriptor) for message in messages)


def sampling_to_message(sampling: SamplingParams) -> pb.SamplingParams:
    """The engine's half of the parameters: ``n`` and stop strings are the gateway's and do not travel."""
    assert sampling.n == 1, "the router splits a request into its continuations"
    assert sampling.seed is not None, "the gateway draws a seed"
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        grammar=None
        if sampling.grammar is None
        else pb.Grammar(kind=sampling.grammar.kind, text=sampling.grammar.text),
    )


def sampling_from_message(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        grammar=_grammar(message.grammar) if message.HasField("grammar") else None,
    )


def _grammar(message: pb.Grammar) -> Grammar:
    """Raise ``ProtocolViolation`` naming the allowed words."""
    try:
        kind = GrammarKind(message.kind)
    except ValueError:
        raise ProtocolViolation(
            f"a grammar's kind must be one of {', '.join(GrammarKind)}, got {message.kind!r}"
        ) from None
    return Grammar(kind, message.text)


def spec_to_message(spec: SequenceSpec) -> pb.SequenceSpec:
    """``hold_kv`` does not travel: the service that is called says whether K/V is to be held."""
    return pb.SequenceSpec(
        sequence_id=spec.sequence_id,
        prompt_token_ids=spec.prompt_token_ids,
        output_token_ids=spec.output_token_ids,
        sampling=sampling_to_message(spec.sampling),
        salt=spec.salt,
    )


def spec_from_message(message: pb.SequenceSpec, *, hold_kv: bool) -> SequenceSpec:
    """Raise ``ProtocolViolation`` if the message is not a sequence that an engine could run."""
    if not message.sequence_id or not message.prompt_token_ids:
        raise ProtocolViolation("a sequence needs an id and at least one prompt token")
    try:
        sampling = sampling_from_message(message.sampling)
    except PrfaasError as error:
        raise ProtocolViolation(f"sequence {message.sequence_id}: {error}") from error
    return SequenceSpec(
        sequence_id=SequenceId(message.sequence_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling,
        salt=message.salt,
        hold_kv=hold_kv,
    )


def pull_task_to_message(task: PullTask) -> pb.PullTask:
    return pb.PullTask(
        worker_id=task.worker_id,
        cluster_id=task.cluster_id,
        engine_id=task.engine_id,
        address=task.address,
        num_tokens=task.num_tokens,
        timeout_s=task.timeout_s,
    )


def pull_task_from_message(message: pb.PullTask) -> PullTask:
    return PullTask(
        worker_id=WorkerId(message.worker_id),
        cluster_id=ClusterId(message.cluster_id),
        engine_id=EngineId(message.engine_id),
        address=message.address,
        num_tokens=message.num_tokens,
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
    )


def stats_to_message(stats: StageStats) -> pb.StageStats:
    message = pb.StageStats(
        worker_id=stats.worker_id,
        role=stats.role.value,
        queue_s=stats.queue_s,
        compute_s=stats.compute_s,
        transfer_s=stats.transfer_s,
        exposed_transfer_s=stats.exposed_transfer_s,
        cached_tokens=stats.cached_tokens,
        received_tokens=stats.received_tokens,
        bytes_shipped=stats.bytes_shipped,
        num_preemptions=stats.num_preemptions,
        transfer_wait_s=stats.transfer_wait_s,
    )
    if (pull := stats.pull) is not None:
        message.pull_outcome = pull.outcome.value
        message.pulled_tokens, message.bytes_pulled, message.pull_s = pull.num_tokens, pull.num_bytes, pull.seconds
    if (reload := stats.reload) is not None:
        message.reload_outcome, message.reload_reason = reload.outcome.value, reload.reason
        message.host_tokens, message.disk_tokens = reload.host_tokens, reload.disk_tokens
        message.reload_s = reload.seconds
    return message


def stats_from_message(message: pb.StageStats) -> StageStats:
    return StageStats(
        worker_id=WorkerId(message.worker_id),
        role=role_from_text(message.role),
        queue_s=message.queue_s,
        compute_s=message.compute_s,
        transfer_s=message.transfer_s,
        exposed_transfer_s=message.exposed_transfer_s,
        cached_tokens=message.cached_tokens,
        received_tokens=message.received_tokens,
        bytes_shipped=message.bytes_shipped,
        num_preemptions=message.num_preemptions,
        pull=_pull_report(message) if message.pull_outcome else None,
        transfer_wait_s=message.transfer_wait_s,
        reload=_reload_report(message) if message.reload_outcome else None,
    )


def _reload_report(message: pb.StageStats) -> ReloadReport:
    """Raise ``ProtocolViolation`` naming the allowed words."""
    if message.reload_outcome not in set(ReloadOutcome):
        allowed = ", ".join(ReloadOutcome)
        raise ProtocolViolation(f"reload_outcome must be one of {allowed}, got {message.reload_outcome!r}")
    return ReloadReport(
        ReloadOutcome(message.reload_outcome),
        message.host_tokens,
        message.disk_tokens,
        message.reload_s,
        message.reload_reason,
    )


def _pull_report(message: pb.StageStats) -> PullReport:
    """Raise ``ProtocolViolation`` naming the allowed words."""
    try:
        outcome = PullOutcome(message.pull_outcome)
    except ValueError:
        raise ProtocolViolation(
            f"pull_outcome must be one of {', '.join(PullOutcome)}, got {message.pull_outcome!r}"
        ) from None
    return PullReport(outcome, message.pulled_tokens, message.bytes_pulled, message.pull_s)


def chunk_to_message(chunk: TokenChunk) -> pb.TokenChunk:
    message = pb.TokenChunk(
        sequence_id=chunk.sequence_id,
        position=chunk.position,
        token_ids=chunk.token_ids,
        finish_reason=chunk.finish_reason.value if chunk.finish_reason else "",
        stop_token_id=chunk.stop_token_id,
    )
    for entry in chunk.logprobs:
        message.logprobs.add(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top_token_ids=[token_id for token_id, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
        )
    if chunk.stats is not None:
        message.stats.CopyFrom(stats_to_message(chunk.stats))
    return message


def chunk_from_message(message: pb.TokenChunk) -> TokenChunk:
    has_stop = message.HasField("stop_token_id")
    if not (message.finish_reason or message.logprobs or has_stop or message.HasField("stats")):  # nearly always
        return TokenChunk(SequenceId(message.sequence_id), message.position, tuple(message.token_ids))
    return TokenChunk(
        sequence_id=SequenceId(message.sequence_id),
        position=message.position,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                top=tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)),
            )
            for entry in message.logprobs
        ),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if has_stop else None,
        stats=stats_from_message(message.stats) if message.HasField("stats") else None,
    )


def failure_to_message(failure: SequenceFailure) -> pb.SequenceFailure:
    return pb.SequenceFailure(
        sequence_id=failure.sequence_id,
        message=failure.message,
        retryable=failure.retryable,
        stage=failure.stage.value,
    )


def failure_from_message(message: pb.SequenceFailure) -> SequenceFailure:
    return SequenceFailure(
        sequence_id=SequenceId(message.sequence_id),
        message=message.message,
        retryable=message.retryable,
        stage=role_from_text(message.stage),
    )


def page_events_to_message(events: PageEvents) -> pb.PageEvents:
    return pb.PageEvents(
        number=events.number,
        after=events.after,
        snapshot=events.snapshot,
        stored=events.stored,
        removed=events.removed,
        lower=[pb.TierPages(tier=lower.tier.value, pages=lower.pages) for lower in events.lower],
    )


def page_events_from_message(message: pb.PageEvents) -> PageEvents:
    lower = tuple(TierPages(tier_from_text(pages.tier), tuple(pages.pages)) for pages in message.lower)
    stored, removed = tuple(message.stored), tuple(message.removed)
    return PageEvents(message.number, message.after, message.snapshot, stored, removed, lower)


def tier_from_text(text: str) -> Tier:
    """Raise ``ProtocolViolation`` naming the lower tiers."""
    if text not in LOWER_TIERS:
        raise ProtocolViolation(f"tier must be one of {', '.join(LOWER_TIERS)}, got {text!r}")
    return Tier(text)


def tier_state_to_message(state: TierState) -> pb.TierState:
    return pb.TierState(**asdict(state))


def tier_state_from_message(message: pb.TierState) -> TierState:
    return TierState(
        tier_from_text(message.tier),
        message.pages_total,
        message.pages_used,
        message.load_bytes_per_s,
        message.load_t0_s,
        message.queued_bytes,
        message.stored_pages,
        message.loaded_tokens,
        message.evicted_pages,
        message.damaged_pages,
        message.foreign_pages,
    )


def link_to_message(link: LinkEstimate) -> pb.LinkReport:
    return pb.LinkReport(
        worker_id=link.worker_id,
        cluster_id=link.cluster_id,
        path=link.path,
        connections=link.connections,
        goodput=link.goodput,
        delivery_rate=link.delivery_rate,
        rtt_s=link.rtt_s,
        min_rtt_s=link.min_rtt_s,
        retransmits=link.retransmits,
        retransmits_per_mib=link.retransmits_per_mib,
        fit_t0_s=link.fit_t0_s,
        fit_beta=link.fit_beta,
        fit_variance=link.fit_variance,
        samples=link.samples,
        throughput=link.throughput,
        bytes_sent=link.bytes_sent,
        bytes_queued=link.bytes_queued,
        reconnects=link.reconnects,
        falls=link.falls,
        codec=link.codec,
        codec_changes=link.codec_changes,
        age_s=link.age_s,
    )


def link_from_message(message: pb.LinkReport) -> LinkEstimate:
    return LinkEstimate(
        worker_id=WorkerId(message.worker_id),
        cluster_id=ClusterId(message.cluster_id),
        path=message.path,
        connections=message.connections,
        goodput=message.goodput if message.HasField("goodput") else None,
        delivery_rate=message.delivery_rate if message.HasField("delivery_rate") else None,
        rtt_s=message.rtt_s if message.HasField("rtt_s") else None,
        min_rtt_s=message.min_rtt_s if message.HasField("min_rtt_s") else None,
        retransmits=message.retransmits,
        retransmits_per_mib=message.retransmits_per_mib,
        fit_t0_s=message.fit_t0_s if message.HasField("fit_t0_s") else None,
        fit_beta=message.fit_beta if message.HasField("fit_beta") else None,
        fit_variance=message.fit_variance if message.HasField("fit_variance") else None,
        samples=message.samples,
        throughput=message.throughput,
        bytes_sent=message.bytes_sent,
        bytes_queued=message.bytes_queued,
        reconnects=message.reconnects,
        falls=message.falls,
        codec=message.codec or "raw",
        codec_changes=message.codec_changes,
        age_s=message.age_s,
    )


def compute_to_message(compute: ComputeProfile) -> pb.ComputeProfile:
    return pb.ComputeProfile(
        device=compute.device,
        num_devices=compute.num_devices,
        weight_bytes=compute.weight_bytes,
        weight_flops=compute.weight_flops,
        attention_flops=compute.attention_flops,
        step_tokens=compute.step_tokens,
    )


def compute_from_message(message: pb.ComputeProfile) -> ComputeProfile:
    return ComputeProfile(
        device=message.device,
        num_devices=message.num_devices,
        weight_bytes=message.weight_bytes,
        weight_flops=message.weight_flops,
        attention_flops=message.attention_flops,
        step_tokens=message.step_tokens,
    )


def modes_to_message(modes: EngineModes) -> pb.EngineModes:
    return pb.EngineModes(
        attention=modes.attention,
        attention_reason=modes.attention_reason,
        forward=modes.forward,
        forward_reason=modes.forward_reason,
        num_fallbacks=modes.num_fallbacks,
        colocated=modes.colocated,
        colocated_reason=modes.colocated_reason,
        prompt_steps=dict(modes.prompt_steps),
        num_decode_beside=modes.num_decode_beside,
        num_cascade=modes.num_cascade,
    )


def modes_from_message(message: pb.EngineModes) -> EngineModes:
    return EngineModes(
        message.attention,
        message.attention_reason,
        message.forward,
        message.forward_reason,
        message.num_fallbacks,
        message.colocated,
        message.colocated_reason,
        tuple(sorted(message.prompt_steps.items())),
        message.num_decode_beside,
        message.num_cascade,
    )


def step_to_message(step: StepSample) -> pb.StepSample:
    return pb.StepSample(
        prefill_tokens=step.prefill_tokens,
        prefill_pairs=step.prefill_pairs,
        decode_batch=step.decode_batch,
        decode_context=step.decode_context,
        seconds=step.seconds,
    )


def step_from_message(message: pb.StepSample) -> StepSample:
    return StepSample(
        prefill_tokens=message.prefill_tokens,
        prefill_pairs=message.prefill_pairs,
        decode_batch=message.decode_batch,
        decode_context=message.decode_context,
        seconds=message.seconds,
    )


def probe_to_message(report: ProbeReport) -> pb.ProbeReport:
    return pb.ProbeReport(
        path=report.path,
        num_bytes=report.num_bytes,
        exact=report.exact,
        timed_bytes=report.timed_bytes,
        seconds=report.seconds,
        rtt_s=report.rtt_s,
        error=report.error,
        reason=report.reason,
    )


def probe_from_message(message: pb.ProbeReport) -> ProbeReport:
    return ProbeReport(
        path=message.path,
        num_bytes=message.num_bytes,
        exact=message.exact,
        timed_bytes=message.timed_bytes,
        seconds=message.seconds,
        rtt_s=message.rtt_s if message.HasField("rtt_s") else None,
        error=message.error,
        reason=message.reason,
    )


def role_from_text(text: str) -> Role:
    """Raise ``ProtocolViolation`` naming the allowed words."""
    try:
        return Role(text)
    except ValueError:
        raise ProtocolViolation(f"role must be one of {', '.join(Role)}, got {text!r}") from None
