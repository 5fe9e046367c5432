from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Fingerprint(_message.Message):
    __slots__ = ("model", "revision", "dtype", "page_size", "layout")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    page_size: int
    layout: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., page_size: _Optional[int] = ..., layout: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("worker_id", "engine_id", "cluster_id", "address", "fingerprint", "architecture", "max_model_len", "vocab_size", "eos_token_ids", "kv_bytes_per_token", "transport", "pages_total", "pid", "compute", "num_layers", "max_batch_size", "tensor_parallel", "lower_tiers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    LOWER_TIERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    engine_id: str
    cluster_id: str
    address: str
    fingerprint: Fingerprint
    architecture: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    kv_bytes_per_token: int
    transport: str
    pages_total: int
    pid: int
    compute: ComputeProfile
    num_layers: int
    max_batch_size: int
    tensor_parallel: int
    lower_tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., address: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., architecture: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., kv_bytes_per_token: _Optional[int] = ..., transport: _Optional[str] = ..., pages_total: _Optional[int] = ..., pid: _Optional[int] = ..., compute: _Optional[_Union[ComputeProfile, _Mapping]] = ..., num_layers: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., lower_tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class ComputeProfile(_message.Message):
    __slots__ = ("device", "num_devices", "weight_bytes", "weight_flops", "attention_flops", "step_tokens")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FLOPS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FLOPS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    device: str
    num_devices: int
    weight_bytes: int
    weight_flops: float
    attention_flops: float
    step_tokens: int
    def __init__(self, device: _Optional[str] = ..., num_devices: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., weight_flops: _Optional[float] = ..., attention_flops: _Optional[float] = ..., step_tokens: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("version", "engine_id", "role", "draining", "num_running", "num_waiting", "num_waiting_tokens", "pages_free", "pages_cached", "bytes_sent", "bytes_received", "prompt_tokens", "generated_tokens", "cached_tokens", "num_sessions", "pages_quarantined", "num_preemptions", "links", "page_events", "pulls", "pulled_tokens", "pulled_bytes", "load_age_s", "num_announced", "num_other_role", "num_announced_tokens", "steps", "modes", "tiers", "reloads", "pages_lost")
    class PullsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ReloadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PAGES_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    PAGE_EVENTS_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    NUM_OTHER_ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_ANNOUNCED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    PAGES_LOST_FIELD_NUMBER: _ClassVar[int]
    version: int
    engine_id: str
    role: str
    draining: bool
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    pages_free: int
    pages_cached: int
    bytes_sent: int
    bytes_received: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    num_sessions: int
    pages_quarantined: int
    num_preemptions: int
    links: _containers.RepeatedCompositeFieldContainer[LinkReport]
    page_events: PageEvents
    pulls: _containers.ScalarMap[str, int]
    pulled_tokens: int
    pulled_bytes: int
    load_age_s: float
    num_announced: int
    num_other_role: int
    num_announced_tokens: int
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    modes: EngineModes
    tiers: _containers.RepeatedCompositeFieldContainer[TierState]
    reloads: _containers.ScalarMap[str, int]
    pages_lost: int
    def __init__(self, version: _Optional[int] = ..., engine_id: _Optional[str] = ..., role: _Optional[str] = ..., draining: _Optional[bool] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_cached: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., num_sessions: _Optional[int] = ..., pages_quarantined: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkReport, _Mapping]]] = ..., page_events: _Optional[_Union[PageEvents, _Mapping]] = ..., pulls: _Optional[_Mapping[str, int]] = ..., pulled_tokens: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., load_age_s: _Optional[float] = ..., num_announced: _Optional[int] = ..., num_other_role: _Optional[int] = ..., num_announced_tokens: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., modes: _Optional[_Union[EngineModes, _Mapping]] = ..., tiers: _Optional[_Iterable[_Union[TierState, _Mapping]]] = ..., reloads: _Optional[_Mapping[str, int]] = ..., pages_lost: _Optional[int] = ...) -> None: ...

class TierState(_message.Message):
    __slots__ = ("tier", "pages_total", "pages_used", "load_bytes_per_s", "load_t0_s", "queued_bytes", "stored_pages", "loaded_tokens", "evicted_pages", "damaged_pages", "foreign_pages")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    LOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_T0_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_PAGES_FIELD_NUMBER: _ClassVar[int]
    LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_PAGES_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_PAGES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    pages_total: int
    pages_used: int
    load_bytes_per_s: float
    load_t0_s: float
    queued_bytes: int
    stored_pages: int
    loaded_tokens: int
    evicted_pages: int
    damaged_pages: int
    foreign_pages: int
    def __init__(self, tier: _Optional[str] = ..., pages_total: _Optional[int] = ..., pages_used: _Optional[int] = ..., load_bytes_per_s: _Optional[float] = ..., load_t0_s: _Optional[float] = ..., queued_bytes: _Optional[int] = ..., stored_pages: _Optional[int] = ..., loaded_tokens: _Optional[int] = ..., evicted_pages: _Optional[int] = ..., damaged_pages: _Optional[int] = ..., foreign_pages: _Optional[int] = ...) -> None: ...

class EngineModes(_message.Message):
    __slots__ = ("attention", "attention_reason", "forward", "forward_reason", "num_fallbacks", "colocated", "colocated_reason", "prompt_steps", "num_decode_beside", "num_cascade")
    class PromptStepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_REASON_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_BESIDE_FIELD_NUMBER: _ClassVar[int]
    NUM_CASCADE_FIELD_NUMBER: _ClassVar[int]
    attention: str
    attention_reason: str
    forward: str
    forward_reason: str
    num_fallbacks: int
    colocated: str
    colocated_reason: str
    prompt_steps: _containers.ScalarMap[str, int]
    num_decode_beside: int
    num_cascade: int
    def __init__(self, attention: _Optional[str] = ..., attention_reason: _Optional[str] = ..., forward: _Optional[str] = ..., forward_reason: _Optional[str] = ..., num_fallbacks: _Optional[int] = ..., colocated: _Optional[str] = ..., colocated_reason: _Optional[str] = ..., prompt_steps: _Optional[_Mapping[str, int]] = ..., num_decode_beside: _Optional[int] = ..., num_cascade: _Optional[int] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "prefill_pairs", "decode_batch", "decode_context", "seconds")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DECODE_BATCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    prefill_pairs: float
    decode_batch: int
    decode_context: int
    seconds: float
    def __init__(self, prefill_tokens: _Optional[int] = ..., prefill_pairs: _Optional[float] = ..., decode_batch: _Optional[int] = ..., decode_context: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class PageEvents(_message.Message):
    __slots__ = ("number", "after", "snapshot", "stored", "removed", "lower")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    number: int
    after: int
    snapshot: bool
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    lower: _containers.RepeatedCompositeFieldContainer[TierPages]
    def __init__(self, number: _Optional[int] = ..., after: _Optional[int] = ..., snapshot: _Optional[bool] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., lower: _Optional[_Iterable[_Union[TierPages, _Mapping]]] = ...) -> None: ...

class TierPages(_message.Message):
    __slots__ = ("tier", "pages")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tier: _Optional[str] = ..., pages: _Optional[_Iterable[int]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("worker_id", "cluster_id", "path", "connections", "goodput", "delivery_rate", "rtt_s", "min_rtt_s", "retransmits", "retransmits_per_mib", "fit_t0_s", "fit_beta", "fit_variance", "samples", "throughput", "bytes_sent", "bytes_queued", "reconnects", "falls", "age_s", "codec", "codec_changes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_RATE_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    MIN_RTT_S_FIELD_NUMBER: _ClassVar[int]
    RETRANSMITS_FIELD_NUMBER: _ClassVar[int]
    RETRANSMITS_PER_MIB_FIELD_NUMBER: _ClassVar[int]
    FIT_T0_S_FIELD_NUMBER: _ClassVar[int]
    FIT_BETA_FIELD_NUMBER: _ClassVar[int]
    FIT_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    FALLS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_CHANGES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cluster_id: str
    path: str
    connections: int
    goodput: float
    delivery_rate: float
    rtt_s: float
    min_rtt_s: float
    retransmits: int
    retransmits_per_mib: float
    fit_t0_s: float
    fit_beta: float
    fit_variance: float
    samples: int
    throughput: float
    bytes_sent: int
    bytes_queued: int
    reconnects: int
    falls: int
    age_s: float
    codec: str
    codec_changes: int
    def __init__(self, worker_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., path: _Optional[str] = ..., connections: _Optional[int] = ..., goodput: _Optional[float] = ..., delivery_rate: _Optional[float] = ..., rtt_s: _Optional[float] = ..., min_rtt_s: _Optional[float] = ..., retransmits: _Optional[int] = ..., retransmits_per_mib: _Optional[float] = ..., fit_t0_s: _Optional[float] = ..., fit_beta: _Optional[float] = ..., fit_variance: _Optional[float] = ..., samples: _Optional[int] = ..., throughput: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_queued: _Optional[int] = ..., reconnects: _Optional[int] = ..., falls: _Optional[int] = ..., age_s: _Optional[float] = ..., codec: _Optional[str] = ..., codec_changes: _Optional[int] = ...) -> None: ...

class OutputsRequest(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class StageStats(_message.Message):
    __slots__ = ("worker_id", "role", "queue_s", "compute_s", "transfer_s", "exposed_transfer_s", "cached_tokens", "received_tokens", "bytes_shipped", "num_preemptions", "pull_outcome", "pulled_tokens", "bytes_pulled", "pull_s", "transfer_wait_s", "reload_outcome", "host_tokens", "disk_tokens", "reload_s", "reload_reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SHIPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PULL_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RELOAD_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    queue_s: float
    compute_s: float
    transfer_s: float
    exposed_transfer_s: float
    cached_tokens: int
    received_tokens: int
    bytes_shipped: int
    num_preemptions: int
    pull_outcome: str
    pulled_tokens: int
    bytes_pulled: int
    pull_s: float
    transfer_wait_s: float
    reload_outcome: str
    host_tokens: int
    disk_tokens: int
    reload_s: float
    reload_reason: str
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., exposed_transfer_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., received_tokens: _Optional[int] = ..., bytes_shipped: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., pull_outcome: _Optional[str] = ..., pulled_tokens: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., pull_s: _Optional[float] = ..., transfer_wait_s: _Optional[float] = ..., reload_outcome: _Optional[str] = ..., host_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ..., reload_s: _Optional[float] = ..., reload_reason: _Optional[str] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("sequence_id", "position", "token_ids", "logprobs", "finish_reason", "stop_token_id", "stats")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: str
    stop_token_id: int
    stats: StageStats
    def __init__(self, sequence_id: _Optional[str] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., stats: _Optional[_Union[StageStats, _Mapping]] = ...) -> None: ...

class SequenceFailure(_message.Message):
    __slots__ = ("sequence_id", "message", "retryable", "stage")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    message: str
    retryable: bool
    stage: str
    def __init__(self, sequence_id: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., stage: _Optional[str] = ...) -> None: ...

class OutputBatch(_message.Message):
    __slots__ = ("chunks", "failures")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[TokenChunk]
    failures: _containers.RepeatedCompositeFieldContainer[SequenceFailure]
    def __init__(self, chunks: _Optional[_Iterable[_Union[TokenChunk, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[SequenceFailure, _Mapping]]] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: str
    def __init__(self, role: _Optional[str] = ...) -> None: ...

class SetRoleReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop_token_ids", "ignore_eos", "logprobs", "grammar")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    grammar: Grammar
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class SequenceSpec(_message.Message):
    __slots__ = ("sequence_id", "prompt_token_ids", "output_token_ids", "sampling", "salt")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    salt: bytes
    def __init__(self, sequence_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., salt: _Optional[bytes] = ...) -> None: ...

class PullTask(_message.Message):
    __slots__ = ("worker_id", "cluster_id", "engine_id", "address", "num_tokens", "timeout_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cluster_id: str
    engine_id: str
    address: str
    num_tokens: int
    timeout_s: float
    def __init__(self, worker_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., address: _Optional[str] = ..., num_tokens: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("gateway_id", "sequence", "session_id", "decode_address", "tenant", "deadline_s", "pull")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    sequence: SequenceSpec
    session_id: str
    decode_address: str
    tenant: str
    deadline_s: float
    pull: PullTask
    def __init__(self, gateway_id: _Optional[str] = ..., sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., session_id: _Optional[str] = ..., decode_address: _Optional[str] = ..., tenant: _Optional[str] = ..., deadline_s: _Optional[float] = ..., pull: _Optional[_Union[PullTask, _Mapping]] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("sequence_ids", "reason")
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    def __init__(self, sequence_ids: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("gateway_id", "sequence", "session_id", "pull", "tenant", "deadline_s")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    sequence: SequenceSpec
    session_id: str
    pull: PullTask
    tenant: str
    deadline_s: float
    def __init__(self, gateway_id: _Optional[str] = ..., sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., session_id: _Optional[str] = ..., pull: _Optional[_Union[PullTask, _Mapping]] = ..., tenant: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DecodeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("session_id", "fingerprint", "wait_s", "sender_engine_id", "layout", "sender_descriptor", "sender_ranks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SENDER_ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SENDER_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    SENDER_RANKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    fingerprint: Fingerprint
    wait_s: float
    sender_engine_id: str
    layout: KvLayout
    sender_descriptor: bytes
    sender_ranks: _containers.RepeatedCompositeFieldContainer[KvEnd]
    def __init__(self, session_id: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., wait_s: _Optional[float] = ..., sender_engine_id: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., sender_descriptor: _Optional[bytes] = ..., sender_ranks: _Optional[_Iterable[_Union[KvEnd, _Mapping]]] = ...) -> None: ...

class KvEnd(_message.Message):
    __slots__ = ("layout", "descriptor")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    descriptor: bytes
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., descriptor: _Optional[bytes] = ...) -> None: ...

class GrantPart(_message.Message):
    __slots__ = ("sender_rank", "session_id", "token", "transport_descriptor", "layout")
    SENDER_RANK_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    sender_rank: int
    session_id: str
    token: bytes
    transport_descriptor: bytes
    layout: KvLayout
    def __init__(self, sender_rank: _Optional[int] = ..., session_id: _Optional[str] = ..., token: _Optional[bytes] = ..., transport_descriptor: _Optional[bytes] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ("token", "first_page", "pages", "transport_descriptor", "lease_s", "layout", "worker_id", "cluster_id", "parts")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    first_page: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    transport_descriptor: bytes
    lease_s: float
    layout: KvLayout
    worker_id: str
    cluster_id: str
    parts: _containers.RepeatedCompositeFieldContainer[GrantPart]
    def __init__(self, token: _Optional[bytes] = ..., first_page: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., transport_descriptor: _Optional[bytes] = ..., lease_s: _Optional[float] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., worker_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[GrantPart, _Mapping]]] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("page_size", "layers")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    layers: _containers.RepeatedCompositeFieldContainer[KvLayers]
    def __init__(self, page_size: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[KvLayers, _Mapping]]] = ...) -> None: ...

class KvLayers(_message.Message):
    __slots__ = ("count", "num_heads", "key_dim", "value_dim", "dtype", "itemsize", "first_head")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ITEMSIZE_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    count: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    itemsize: int
    first_head: int
    def __init__(self, count: _Optional[int] = ..., num_heads: _Optional[int] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., itemsize: _Optional[int] = ..., first_head: _Optional[int] = ...) -> None: ...

class CommitPayload(_message.Message):
    __slots__ = ("sequence_id", "token_ids")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("wanted", "grant")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    wanted: PagesWanted
    grant: GrantReply
    def __init__(self, wanted: _Optional[_Union[PagesWanted, _Mapping]] = ..., grant: _Optional[_Union[GrantReply, _Mapping]] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("offered", "pushed")
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    offered: PagesOffered
    pushed: PagesPushed
    def __init__(self, offered: _Optional[_Union[PagesOffered, _Mapping]] = ..., pushed: _Optional[_Union[PagesPushed, _Mapping]] = ...) -> None: ...

class PagesWanted(_message.Message):
    __slots__ = ("session_id", "engine_id", "fingerprint", "page_hashes", "tenant", "deadline_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    engine_id: str
    fingerprint: Fingerprint
    page_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    tenant: str
    deadline_s: float
    def __init__(self, session_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., page_hashes: _Optional[_Iterable[bytes]] = ..., tenant: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class PagesOffered(_message.Message):
    __slots__ = ("num_pages", "layout", "transport_descriptor", "ranks")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    layout: KvLayout
    transport_descriptor: bytes
    ranks: _containers.RepeatedCompositeFieldContainer[KvEnd]
    def __init__(self, num_pages: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transport_descriptor: _Optional[bytes] = ..., ranks: _Optional[_Iterable[_Union[KvEnd, _Mapping]]] = ...) -> None: ...

class PagesPushed(_message.Message):
    __slots__ = ("error", "reason")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    error: str
    reason: str
    def __init__(self, error: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("worker_id", "cluster_id", "address", "timeout_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cluster_id: str
    address: str
    timeout_s: float
    def __init__(self, worker_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., address: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ProbeReport(_message.Message):
    __slots__ = ("path", "num_bytes", "exact", "timed_bytes", "seconds", "rtt_s", "error", "reason")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    TIMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    path: str
    num_bytes: int
    exact: bool
    timed_bytes: int
    seconds: float
    rtt_s: float
    error: str
    reason: str
    def __init__(self, path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., exact: _Optional[bool] = ..., timed_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., rtt_s: _Optional[float] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ProbeGrantRequest(_message.Message):
    __slots__ = ("session_id", "fingerprint", "max_tokens", "sender_descriptor", "layout", "sender_ranks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SENDER_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SENDER_RANKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    fingerprint: Fingerprint
    max_tokens: int
    sender_descriptor: bytes
    layout: KvLayout
    sender_ranks: _containers.RepeatedCompositeFieldContainer[KvEnd]
    def __init__(self, session_id: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., max_tokens: _Optional[int] = ..., sender_descriptor: _Optional[bytes] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., sender_ranks: _Optional[_Iterable[_Union[KvEnd, _Mapping]]] = ...) -> None: ...

class ProbeDigestRequest(_message.Message):
    __slots__ = ("session_id", "wait_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    wait_s: float
    def __init__(self, session_id: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class ProbeGiveUpRequest(_message.Message):
    __slots__ = ("session_id", "reason")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    reason: str
    def __init__(self, session_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ProbeGiveUpReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeDigestReply(_message.Message):
    __slots__ = ("digest", "num_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    num_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "engine_id", "address", "leaving", "others")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    engine_id: str
    address: str
    leaving: bool
    others: _containers.RepeatedCompositeFieldContainer[Registration]
    def __init__(self, worker_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., address: _Optional[str] = ..., leaving: _Optional[bool] = ..., others: _Optional[_Iterable[_Union[Registration, _Mapping]]] = ...) -> None: ...

class Registration(_message.Message):
    __slots__ = ("registry", "taken", "said")
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    registry: str
    taken: bool
    said: str
    def __init__(self, registry: _Optional[str] = ..., taken: _Optional[bool] = ..., said: _Optional[str] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...
