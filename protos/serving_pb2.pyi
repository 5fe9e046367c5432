from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenizedInput(_message.Message):
    __slots__ = ("input_ids", "original_text")
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_TEXT_FIELD_NUMBER: _ClassVar[int]
    input_ids: _containers.RepeatedScalarFieldContainer[int]
    original_text: str
    def __init__(self, input_ids: _Optional[_Iterable[int]] = ..., original_text: _Optional[str] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "tool_calls", "tool_call_id")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    tool_call_id: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ..., tool_call_id: _Optional[str] = ...) -> None: ...

class ChatInput(_message.Message):
    __slots__ = ("messages", "tools", "tool_choice", "parallel_tool_calls")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CHOICE_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    tools: _containers.RepeatedCompositeFieldContainer[Tool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., tools: _Optional[_Iterable[_Union[Tool, _Mapping]]] = ..., tool_choice: _Optional[_Union[ToolChoice, _Mapping]] = ..., parallel_tool_calls: _Optional[bool] = ...) -> None: ...

class Tool(_message.Message):
    __slots__ = ("name", "description", "parameters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    parameters: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., parameters: _Optional[str] = ...) -> None: ...

class ToolChoice(_message.Message):
    __slots__ = ("mode", "name")
    MODE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    mode: str
    name: str
    def __init__(self, mode: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("id", "name", "arguments")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    arguments: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "logprobs", "n", "structured_output")
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
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
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
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int
    n: int
    structured_output: StructuredOutput
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., include_stop_str_in_output: _Optional[bool] = ..., ignore_eos: _Optional[bool] = ..., skip_special_tokens: _Optional[bool] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ..., structured_output: _Optional[_Union[StructuredOutput, _Mapping]] = ...) -> None: ...

class StructuredOutput(_message.Message):
    __slots__ = ("json_schema", "json_object", "regex", "choice", "grammar")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    json_object: bool
    regex: str
    choice: Choices
    grammar: str
    def __init__(self, json_schema: _Optional[str] = ..., json_object: _Optional[bool] = ..., regex: _Optional[str] = ..., choice: _Optional[_Union[Choices, _Mapping]] = ..., grammar: _Optional[str] = ...) -> None: ...

class Choices(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "tokenized", "chat", "sampling_params", "model", "cache_salt", "slo_ttft_s", "slo_tpot_s", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZED_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SLO_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    SLO_TPOT_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    tokenized: TokenizedInput
    chat: ChatInput
    sampling_params: SamplingParams
    model: str
    cache_salt: str
    slo_ttft_s: float
    slo_tpot_s: float
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., tokenized: _Optional[_Union[TokenizedInput, _Mapping]] = ..., chat: _Optional[_Union[ChatInput, _Mapping]] = ..., sampling_params: _Optional[_Union[SamplingParams, _Mapping]] = ..., model: _Optional[str] = ..., cache_salt: _Optional[str] = ..., slo_ttft_s: _Optional[float] = ..., slo_tpot_s: _Optional[float] = ..., priority: _Optional[int] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "token")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    token: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., token: _Optional[str] = ...) -> None: ...

class OutputLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "token", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    token: str
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., token: _Optional[str] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class GenerateStreamChunk(_message.Message):
    __slots__ = ("index", "token_ids", "text", "logprobs", "prompt_tokens", "completion_tokens", "cached_tokens", "tool_calls")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[OutputLogprob]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[OutputLogprob, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ...) -> None: ...

class TimingBreakdown(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker", "tokenize_s", "route_s", "prefill_queue_s", "prefill_s", "transfer_s", "exposed_transfer_s", "decode_queue_s", "decode_s", "ttft_s", "total_s", "bytes_shipped", "num_attempts", "route_reason", "decode_cached_tokens", "num_preemptions", "pull_outcome", "pulled_tokens", "bytes_pulled", "pull_s", "admission_s", "slo_ttft_met", "slo_tpot_met", "slo_miss_expected", "tpot_s", "fallback", "expected_ttft_s", "expected_tpot_s", "expected_bytes_shipped", "colocated_ttft_s", "colocated_tpot_s", "ttft_parts", "ttst_parts", "reload_outcome", "host_tokens", "disk_tokens", "reload_s", "reload_reason")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    ROUTE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SHIPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ROUTE_REASON_FIELD_NUMBER: _ClassVar[int]
    DECODE_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PULL_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_S_FIELD_NUMBER: _ClassVar[int]
    SLO_TTFT_MET_FIELD_NUMBER: _ClassVar[int]
    SLO_TPOT_MET_FIELD_NUMBER: _ClassVar[int]
    SLO_MISS_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TPOT_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BYTES_SHIPPED_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_TPOT_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_PARTS_FIELD_NUMBER: _ClassVar[int]
    TTST_PARTS_FIELD_NUMBER: _ClassVar[int]
    RELOAD_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RELOAD_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_REASON_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    tokenize_s: float
    route_s: float
    prefill_queue_s: float
    prefill_s: float
    transfer_s: float
    exposed_transfer_s: float
    decode_queue_s: float
    decode_s: float
    ttft_s: float
    total_s: float
    bytes_shipped: int
    num_attempts: int
    route_reason: str
    decode_cached_tokens: int
    num_preemptions: int
    pull_outcome: str
    pulled_tokens: int
    bytes_pulled: int
    pull_s: float
    admission_s: float
    slo_ttft_met: bool
    slo_tpot_met: bool
    slo_miss_expected: str
    tpot_s: float
    fallback: str
    expected_ttft_s: float
    expected_tpot_s: float
    expected_bytes_shipped: int
    colocated_ttft_s: float
    colocated_tpot_s: float
    ttft_parts: TtftParts
    ttst_parts: TtstParts
    reload_outcome: str
    host_tokens: int
    disk_tokens: int
    reload_s: float
    reload_reason: str
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., tokenize_s: _Optional[float] = ..., route_s: _Optional[float] = ..., prefill_queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., exposed_transfer_s: _Optional[float] = ..., decode_queue_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., bytes_shipped: _Optional[int] = ..., num_attempts: _Optional[int] = ..., route_reason: _Optional[str] = ..., decode_cached_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., pull_outcome: _Optional[str] = ..., pulled_tokens: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., pull_s: _Optional[float] = ..., admission_s: _Optional[float] = ..., slo_ttft_met: _Optional[bool] = ..., slo_tpot_met: _Optional[bool] = ..., slo_miss_expected: _Optional[str] = ..., tpot_s: _Optional[float] = ..., fallback: _Optional[str] = ..., expected_ttft_s: _Optional[float] = ..., expected_tpot_s: _Optional[float] = ..., expected_bytes_shipped: _Optional[int] = ..., colocated_ttft_s: _Optional[float] = ..., colocated_tpot_s: _Optional[float] = ..., ttft_parts: _Optional[_Union[TtftParts, _Mapping]] = ..., ttst_parts: _Optional[_Union[TtstParts, _Mapping]] = ..., reload_outcome: _Optional[str] = ..., host_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ..., reload_s: _Optional[float] = ..., reload_reason: _Optional[str] = ...) -> None: ...

class TtftParts(_message.Message):
    __slots__ = ("receive_s", "tokenize_s", "admission_s", "siblings_s", "route_s", "retries_s", "messages_s", "pull_s", "prefill_queue_s", "prefill_s")
    RECEIVE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_S_FIELD_NUMBER: _ClassVar[int]
    SIBLINGS_S_FIELD_NUMBER: _ClassVar[int]
    ROUTE_S_FIELD_NUMBER: _ClassVar[int]
    RETRIES_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_S_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    receive_s: float
    tokenize_s: float
    admission_s: float
    siblings_s: float
    route_s: float
    retries_s: float
    messages_s: float
    pull_s: float
    prefill_queue_s: float
    prefill_s: float
    def __init__(self, receive_s: _Optional[float] = ..., tokenize_s: _Optional[float] = ..., admission_s: _Optional[float] = ..., siblings_s: _Optional[float] = ..., route_s: _Optional[float] = ..., retries_s: _Optional[float] = ..., messages_s: _Optional[float] = ..., pull_s: _Optional[float] = ..., prefill_queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class TtstParts(_message.Message):
    __slots__ = ("transfer_wait_s", "transfer_s", "decode_queue_s", "first_step_s", "retries_s", "messages_s")
    TRANSFER_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    RETRIES_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_S_FIELD_NUMBER: _ClassVar[int]
    transfer_wait_s: float
    transfer_s: float
    decode_queue_s: float
    first_step_s: float
    retries_s: float
    messages_s: float
    def __init__(self, transfer_wait_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., decode_queue_s: _Optional[float] = ..., first_step_s: _Optional[float] = ..., retries_s: _Optional[float] = ..., messages_s: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class GenerateComplete(_message.Message):
    __slots__ = ("index", "output_ids", "text", "finish_reason", "stop_token_id", "stop_string", "usage", "timing", "tool_calls")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    index: int
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: str
    stop_token_id: int
    stop_string: str
    usage: Usage
    timing: TimingBreakdown
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    def __init__(self, index: _Optional[int] = ..., output_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[TimingBreakdown, _Mapping]] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "chunk", "complete")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chunk: GenerateStreamChunk
    complete: GenerateComplete
    def __init__(self, request_id: _Optional[str] = ..., chunk: _Optional[_Union[GenerateStreamChunk, _Mapping]] = ..., complete: _Optional[_Union[GenerateComplete, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "chat", "add_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: ChatInput
    add_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[ChatInput, _Mapping]] = ..., add_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "count", "max_model_len")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    count: int
    max_model_len: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "model_source", "architecture", "revision", "dtype", "max_model_len", "vocab_size", "page_size", "eos_token_ids", "kv_bytes_per_token", "has_chat_template", "default_sampling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_source: str
    architecture: str
    revision: str
    dtype: str
    max_model_len: int
    vocab_size: int
    page_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    kv_bytes_per_token: int
    has_chat_template: bool
    default_sampling: SamplingParams
    def __init__(self, model: _Optional[str] = ..., model_source: _Optional[str] = ..., architecture: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., page_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., kv_bytes_per_token: _Optional[int] = ..., has_chat_template: _Optional[bool] = ..., default_sampling: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class GetClusterInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "engine_id", "cluster_id", "role", "state", "address", "transport", "num_running", "num_waiting", "pages_total", "pages_free", "pages_cached", "bytes_sent", "bytes_received", "prompt_tokens", "generated_tokens", "cached_tokens", "lease_left_s", "num_sessions", "pages_quarantined", "num_preemptions", "attention", "attention_reason", "forward", "forward_reason", "engine_fallbacks", "tensor_parallel", "colocated", "colocated_reason", "tiers", "reloads", "pages_lost")
    class ReloadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PAGES_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_REASON_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_REASON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_REASON_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    PAGES_LOST_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    engine_id: str
    cluster_id: str
    role: str
    state: str
    address: str
    transport: str
    num_running: int
    num_waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    bytes_sent: int
    bytes_received: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    lease_left_s: float
    num_sessions: int
    pages_quarantined: int
    num_preemptions: int
    attention: str
    attention_reason: str
    forward: str
    forward_reason: str
    engine_fallbacks: int
    tensor_parallel: int
    colocated: str
    colocated_reason: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierInfo]
    reloads: _containers.ScalarMap[str, int]
    pages_lost: int
    def __init__(self, worker_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., transport: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_cached: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., lease_left_s: _Optional[float] = ..., num_sessions: _Optional[int] = ..., pages_quarantined: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., attention: _Optional[str] = ..., attention_reason: _Optional[str] = ..., forward: _Optional[str] = ..., forward_reason: _Optional[str] = ..., engine_fallbacks: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., colocated: _Optional[str] = ..., colocated_reason: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierInfo, _Mapping]]] = ..., reloads: _Optional[_Mapping[str, int]] = ..., pages_lost: _Optional[int] = ...) -> None: ...

class TierInfo(_message.Message):
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

class LinkInfo(_message.Message):
    __slots__ = ("from_worker", "to_worker", "from_cluster", "to_cluster", "state", "reason", "path", "connections", "rate", "goodput", "delivery_rate", "rtt_s", "min_rtt_s", "fit_t0_s", "fit_beta", "fit_variance", "samples", "throughput", "bytes_sent", "bytes_queued", "retransmits", "retransmits_per_mib", "reconnects", "falls", "age_s", "tested_rate", "codec", "codec_changes")
    FROM_WORKER_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_FIELD_NUMBER: _ClassVar[int]
    FROM_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    TO_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_RATE_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    MIN_RTT_S_FIELD_NUMBER: _ClassVar[int]
    FIT_T0_S_FIELD_NUMBER: _ClassVar[int]
    FIT_BETA_FIELD_NUMBER: _ClassVar[int]
    FIT_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    RETRANSMITS_FIELD_NUMBER: _ClassVar[int]
    RETRANSMITS_PER_MIB_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    FALLS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TESTED_RATE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_CHANGES_FIELD_NUMBER: _ClassVar[int]
    from_worker: str
    to_worker: str
    from_cluster: str
    to_cluster: str
    state: str
    reason: str
    path: str
    connections: int
    rate: float
    goodput: float
    delivery_rate: float
    rtt_s: float
    min_rtt_s: float
    fit_t0_s: float
    fit_beta: float
    fit_variance: float
    samples: int
    throughput: float
    bytes_sent: int
    bytes_queued: int
    retransmits: int
    retransmits_per_mib: float
    reconnects: int
    falls: int
    age_s: float
    tested_rate: float
    codec: str
    codec_changes: int
    def __init__(self, from_worker: _Optional[str] = ..., to_worker: _Optional[str] = ..., from_cluster: _Optional[str] = ..., to_cluster: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., path: _Optional[str] = ..., connections: _Optional[int] = ..., rate: _Optional[float] = ..., goodput: _Optional[float] = ..., delivery_rate: _Optional[float] = ..., rtt_s: _Optional[float] = ..., min_rtt_s: _Optional[float] = ..., fit_t0_s: _Optional[float] = ..., fit_beta: _Optional[float] = ..., fit_variance: _Optional[float] = ..., samples: _Optional[int] = ..., throughput: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_queued: _Optional[int] = ..., retransmits: _Optional[int] = ..., retransmits_per_mib: _Optional[float] = ..., reconnects: _Optional[int] = ..., falls: _Optional[int] = ..., age_s: _Optional[float] = ..., tested_rate: _Optional[float] = ..., codec: _Optional[str] = ..., codec_changes: _Optional[int] = ...) -> None: ...

class ClusterLinkInfo(_message.Message):
    __slots__ = ("from_cluster", "to_cluster", "num_links", "num_usable", "paths", "connections", "capacity", "measured", "throughput", "utilisation", "rtt_s", "bytes_sent", "bytes_queued", "retransmits", "reconnects", "falls", "codec_changes", "carries")
    FROM_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    TO_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    NUM_LINKS_FIELD_NUMBER: _ClassVar[int]
    NUM_USABLE_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    RETRANSMITS_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    FALLS_FIELD_NUMBER: _ClassVar[int]
    CODEC_CHANGES_FIELD_NUMBER: _ClassVar[int]
    CARRIES_FIELD_NUMBER: _ClassVar[int]
    from_cluster: str
    to_cluster: str
    num_links: int
    num_usable: int
    paths: _containers.RepeatedScalarFieldContainer[str]
    connections: int
    capacity: float
    measured: float
    throughput: float
    utilisation: float
    rtt_s: float
    bytes_sent: int
    bytes_queued: int
    retransmits: int
    reconnects: int
    falls: int
    codec_changes: int
    carries: float
    def __init__(self, from_cluster: _Optional[str] = ..., to_cluster: _Optional[str] = ..., num_links: _Optional[int] = ..., num_usable: _Optional[int] = ..., paths: _Optional[_Iterable[str]] = ..., connections: _Optional[int] = ..., capacity: _Optional[float] = ..., measured: _Optional[float] = ..., throughput: _Optional[float] = ..., utilisation: _Optional[float] = ..., rtt_s: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_queued: _Optional[int] = ..., retransmits: _Optional[int] = ..., reconnects: _Optional[int] = ..., falls: _Optional[int] = ..., codec_changes: _Optional[int] = ..., carries: _Optional[float] = ...) -> None: ...

class CostInfo(_message.Message):
    __slots__ = ("work", "of", "coefficients", "samples", "error_p50", "error_p90", "bias")
    WORK_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ERROR_P50_FIELD_NUMBER: _ClassVar[int]
    ERROR_P90_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    work: str
    of: str
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    samples: int
    error_p50: float
    error_p90: float
    bias: float
    def __init__(self, work: _Optional[str] = ..., of: _Optional[str] = ..., coefficients: _Optional[_Iterable[float]] = ..., samples: _Optional[int] = ..., error_p50: _Optional[float] = ..., error_p90: _Optional[float] = ..., bias: _Optional[float] = ...) -> None: ...

class OffloadInfo(_message.Message):
    __slots__ = ("threshold_tokens", "mode", "reason")
    THRESHOLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    threshold_tokens: float
    mode: str
    reason: str
    def __init__(self, threshold_tokens: _Optional[float] = ..., mode: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PlanInfo(_message.Message):
    __slots__ = ("mode", "threshold_tokens", "abundant", "reason", "numbers", "num_prefill", "num_decode", "target_prefill", "target_decode", "changing", "advice", "gain", "history", "pools")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ABUNDANT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_FIELD_NUMBER: _ClassVar[int]
    TARGET_PREFILL_FIELD_NUMBER: _ClassVar[int]
    TARGET_DECODE_FIELD_NUMBER: _ClassVar[int]
    CHANGING_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    threshold_tokens: float
    abundant: bool
    reason: str
    numbers: _containers.ScalarMap[str, float]
    num_prefill: int
    num_decode: int
    target_prefill: int
    target_decode: int
    changing: _containers.RepeatedCompositeFieldContainer[RoleChange]
    advice: str
    gain: DisaggregationGain
    history: _containers.RepeatedCompositeFieldContainer[PlanSample]
    pools: _containers.RepeatedCompositeFieldContainer[PoolInfo]
    def __init__(self, mode: _Optional[str] = ..., threshold_tokens: _Optional[float] = ..., abundant: _Optional[bool] = ..., reason: _Optional[str] = ..., numbers: _Optional[_Mapping[str, float]] = ..., num_prefill: _Optional[int] = ..., num_decode: _Optional[int] = ..., target_prefill: _Optional[int] = ..., target_decode: _Optional[int] = ..., changing: _Optional[_Iterable[_Union[RoleChange, _Mapping]]] = ..., advice: _Optional[str] = ..., gain: _Optional[_Union[DisaggregationGain, _Mapping]] = ..., history: _Optional[_Iterable[_Union[PlanSample, _Mapping]]] = ..., pools: _Optional[_Iterable[_Union[PoolInfo, _Mapping]]] = ...) -> None: ...

class PoolInfo(_message.Message):
    __slots__ = ("pool", "min_replicas", "max_replicas", "desired", "ready_prefill", "ready_decode", "pending", "draining", "held", "start_s", "retry_in_s", "problem", "ended")
    class EndedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    POOL_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    READY_PREFILL_FIELD_NUMBER: _ClassVar[int]
    READY_DECODE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    RETRY_IN_S_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    pool: str
    min_replicas: int
    max_replicas: int
    desired: int
    ready_prefill: int
    ready_decode: int
    pending: _containers.RepeatedCompositeFieldContainer[PoolChange]
    draining: _containers.RepeatedCompositeFieldContainer[PoolChange]
    held: bool
    start_s: float
    retry_in_s: float
    problem: str
    ended: _containers.ScalarMap[str, int]
    def __init__(self, pool: _Optional[str] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., desired: _Optional[int] = ..., ready_prefill: _Optional[int] = ..., ready_decode: _Optional[int] = ..., pending: _Optional[_Iterable[_Union[PoolChange, _Mapping]]] = ..., draining: _Optional[_Iterable[_Union[PoolChange, _Mapping]]] = ..., held: _Optional[bool] = ..., start_s: _Optional[float] = ..., retry_in_s: _Optional[float] = ..., problem: _Optional[str] = ..., ended: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PoolChange(_message.Message):
    __slots__ = ("worker_id", "state", "age_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    state: str
    age_s: float
    def __init__(self, worker_id: _Optional[str] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class ScalePoolRequest(_message.Message):
    __slots__ = ("pool", "replicas")
    POOL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    replicas: int
    def __init__(self, pool: _Optional[str] = ..., replicas: _Optional[int] = ...) -> None: ...

class ScalePoolResponse(_message.Message):
    __slots__ = ("answer", "pool")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    answer: str
    pool: PoolInfo
    def __init__(self, answer: _Optional[str] = ..., pool: _Optional[_Union[PoolInfo, _Mapping]] = ...) -> None: ...

class RoleChange(_message.Message):
    __slots__ = ("worker_id", "to_role", "age_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TO_ROLE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    to_role: str
    age_s: float
    def __init__(self, worker_id: _Optional[str] = ..., to_role: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class DisaggregationGain(_message.Message):
    __slots__ = ("rate", "throughput", "ttft_s", "tpot_s", "colocated_throughput", "colocated_ttft_s", "colocated_tpot_s", "throughput_ratio", "ttft_ratio", "tpot_ratio", "reason")
    RATE_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_TPOT_S_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_RATIO_FIELD_NUMBER: _ClassVar[int]
    TTFT_RATIO_FIELD_NUMBER: _ClassVar[int]
    TPOT_RATIO_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rate: float
    throughput: float
    ttft_s: float
    tpot_s: float
    colocated_throughput: float
    colocated_ttft_s: float
    colocated_tpot_s: float
    throughput_ratio: float
    ttft_ratio: float
    tpot_ratio: float
    reason: str
    def __init__(self, rate: _Optional[float] = ..., throughput: _Optional[float] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., colocated_throughput: _Optional[float] = ..., colocated_ttft_s: _Optional[float] = ..., colocated_tpot_s: _Optional[float] = ..., throughput_ratio: _Optional[float] = ..., ttft_ratio: _Optional[float] = ..., tpot_ratio: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class PlanSample(_message.Message):
    __slots__ = ("age_s", "threshold_tokens", "abundant", "num_prefill", "num_decode", "num_changing", "num_prfaas", "link_rate", "link_utilisation", "link_queue_s", "prfaas_queue_s", "local_queue_s", "decode_queue", "rate", "change", "gateway_queue")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ABUNDANT_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_FIELD_NUMBER: _ClassVar[int]
    NUM_CHANGING_FIELD_NUMBER: _ClassVar[int]
    NUM_PRFAAS_FIELD_NUMBER: _ClassVar[int]
    LINK_RATE_FIELD_NUMBER: _ClassVar[int]
    LINK_UTILISATION_FIELD_NUMBER: _ClassVar[int]
    LINK_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PRFAAS_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_QUEUE_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    threshold_tokens: float
    abundant: bool
    num_prefill: int
    num_decode: int
    num_changing: int
    num_prfaas: int
    link_rate: float
    link_utilisation: float
    link_queue_s: float
    prfaas_queue_s: float
    local_queue_s: float
    decode_queue: int
    rate: float
    change: str
    gateway_queue: int
    def __init__(self, age_s: _Optional[float] = ..., threshold_tokens: _Optional[float] = ..., abundant: _Optional[bool] = ..., num_prefill: _Optional[int] = ..., num_decode: _Optional[int] = ..., num_changing: _Optional[int] = ..., num_prfaas: _Optional[int] = ..., link_rate: _Optional[float] = ..., link_utilisation: _Optional[float] = ..., link_queue_s: _Optional[float] = ..., prfaas_queue_s: _Optional[float] = ..., local_queue_s: _Optional[float] = ..., decode_queue: _Optional[int] = ..., rate: _Optional[float] = ..., change: _Optional[str] = ..., gateway_queue: _Optional[int] = ...) -> None: ...

class GetClusterInfoResponse(_message.Message):
    __slots__ = ("workers", "num_inflight", "policy", "uptime_s", "version", "model", "num_requests", "num_retries", "num_resumes", "internal_tls", "links", "cluster_links", "num_queued", "refusals", "misses_served", "costs", "offload", "routes_by_place", "fallbacks_by_reason", "plan")
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MissesServedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RoutesByPlaceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FallbacksByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RETRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMES_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_TLS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_LINKS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    MISSES_SERVED_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    ROUTES_BY_PLACE_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    num_inflight: int
    policy: str
    uptime_s: float
    version: str
    model: str
    num_requests: int
    num_retries: int
    num_resumes: int
    internal_tls: str
    links: _containers.RepeatedCompositeFieldContainer[LinkInfo]
    cluster_links: _containers.RepeatedCompositeFieldContainer[ClusterLinkInfo]
    num_queued: int
    refusals: _containers.ScalarMap[str, int]
    misses_served: _containers.ScalarMap[str, int]
    costs: _containers.RepeatedCompositeFieldContainer[CostInfo]
    offload: OffloadInfo
    routes_by_place: _containers.ScalarMap[str, int]
    fallbacks_by_reason: _containers.ScalarMap[str, int]
    plan: PlanInfo
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ..., num_inflight: _Optional[int] = ..., policy: _Optional[str] = ..., uptime_s: _Optional[float] = ..., version: _Optional[str] = ..., model: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_retries: _Optional[int] = ..., num_resumes: _Optional[int] = ..., internal_tls: _Optional[str] = ..., links: _Optional[_Iterable[_Union[LinkInfo, _Mapping]]] = ..., cluster_links: _Optional[_Iterable[_Union[ClusterLinkInfo, _Mapping]]] = ..., num_queued: _Optional[int] = ..., refusals: _Optional[_Mapping[str, int]] = ..., misses_served: _Optional[_Mapping[str, int]] = ..., costs: _Optional[_Iterable[_Union[CostInfo, _Mapping]]] = ..., offload: _Optional[_Union[OffloadInfo, _Mapping]] = ..., routes_by_place: _Optional[_Mapping[str, int]] = ..., fallbacks_by_reason: _Optional[_Mapping[str, int]] = ..., plan: _Optional[_Union[PlanInfo, _Mapping]] = ...) -> None: ...

class LinkCheck(_message.Message):
    __slots__ = ("from_worker", "to_worker", "path", "num_bytes", "exact", "rate", "rtt_s", "passed", "error", "reason", "num_pairs")
    FROM_WORKER_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    from_worker: str
    to_worker: str
    path: str
    num_bytes: int
    exact: bool
    rate: float
    rtt_s: float
    passed: bool
    error: str
    reason: str
    num_pairs: int
    def __init__(self, from_worker: _Optional[str] = ..., to_worker: _Optional[str] = ..., path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., exact: _Optional[bool] = ..., rate: _Optional[float] = ..., rtt_s: _Optional[float] = ..., passed: _Optional[bool] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ..., num_pairs: _Optional[int] = ...) -> None: ...

class CheckLinksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRecentRequestsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class GetRecentRequestsResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RecentRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RecentRequest, _Mapping]]] = ...) -> None: ...

class RecentRequest(_message.Message):
    __slots__ = ("request_id", "trace_id", "age_s", "door", "outcome", "tenant", "prompt_tokens", "cached_tokens", "completion_tokens", "total_s", "ttft_s", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    DOOR_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    trace_id: str
    age_s: float
    door: str
    outcome: str
    tenant: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_s: float
    ttft_s: float
    timings: _containers.RepeatedCompositeFieldContainer[TimingBreakdown]
    def __init__(self, request_id: _Optional[str] = ..., trace_id: _Optional[str] = ..., age_s: _Optional[float] = ..., door: _Optional[str] = ..., outcome: _Optional[str] = ..., tenant: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., total_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., timings: _Optional[_Iterable[_Union[TimingBreakdown, _Mapping]]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...
