"""The nouns of a request, shared by every package. Standard library only; everything is frozen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from typing import NamedTuple, NewType

from core.cache_tiers import ReloadReport
from core.errors import InvalidRequest
from core.grammar import Grammar
from core.latency_parts import TtftParts, TtstParts
from core.tracing import TraceContext

RequestId = NewType("RequestId", str)  # the client's name for a request
SequenceId = NewType("SequenceId", str)  # one try at one of a request's n continuations; see sequence_id()
SessionId = NewType("SessionId", str)  # one hand-over of one sequence's KV from a prefill to a decode worker
WorkerId = NewType("WorkerId", str)  # stable over restarts: "decode-0"
EngineId = NewType("EngineId", str)  # unique for each start of a worker process
ClusterId = NewType("ClusterId", str)  # a datacenter: one Ray cluster
GatewayId = NewType("GatewayId", str)

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 128
MAX_PRIORITY = 100


class Role(StrEnum):
    """What a worker advertises that it does now; any worker can be either."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's, plus ``cancelled`` and ``error``."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the model's context is used up
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop; names and meanings as vLLM's ``SamplingParams``.

    ``temperature`` 0 is greedy. ``seed`` is always set by the time a sequence reaches an engine: the gateway draws
    one if the client gave none, so a sequence that is resumed elsewhere goes on as it would have.
    ``max_tokens`` None means: up to the model's context. ``logprobs`` None means none; k >= 0 means the chosen
    token's and the k most likely ones'. ``grammar``: what the output has to obey; None: nothing. It says itself where
    the output may end, so it goes with neither ``ignore_eos`` nor ``min_tokens``.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "must be at least 0", self.min_tokens)
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must be at most max_tokens ({self.max_tokens})",
            self.min_tokens,
        )
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1", self.top_p)
        _check(self.top_k >= 0, "top_k", "must be at least 0 (0: no limit)", self.top_k)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check(
            0.0 < self.repetition_penalty <= 10.0,
            "repetition_penalty",
            "must be above 0 and at most 10",
            self.repetition_penalty,
        )
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _check(token_id >= 0, "logit_bias", "token ids must be at least 0", token_id)
            _check_range("logit_bias", bias, -100.0, 100.0)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit 64 bits", self.seed)
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        _check(all(self.stop), "stop", "strings must not be empty", self.stop)
        _check(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "must be at least 0", self.stop_token_ids)
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
            "logprobs",
            f"must be between 0 and {MAX_TOP_LOGPROBS}",
            self.logprobs,
        )
        _check(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}", self.n)
        if self.grammar is not None:
            says = "of a request whose output a grammar bounds: the grammar says where it ends"
            _check(not self.ignore_eos, "ignore_eos", f"must be false {says}", self.ignore_eos)
            _check(not self.min_tokens, "min_tokens", f"must be 0 {says}", self.min_tokens)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    def for_index(self, index: int) -> SamplingParams:
        """The parameters of continuation ``index`` of n: its own seed, n = 1."""
        assert self.seed is not None, "the gateway draws a seed before a request is split"
        if index == 0:
            return self if self.n == 1 else replace(self, n=1)
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        return replace(self, n=1, seed=int.from_bytes(digest, "little", signed=True))


def _check(ok: bool, name: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(name, f"{allowed}, got {value!r}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    _check(math.isfinite(value) and low <= value <= high, name, f"must be between {low:g} and {high:g}", value)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives of one request; None: none is asked for. Definitions as in load generators: TTFT is
    arrival to first token, TPOT the mean time between later ones."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("slo_ttft_s", self.ttft_s), ("slo_tpot_s", self.tpot_s)):
            _check(value is None or 0 < value < math.inf, name, "must be a number of seconds above 0", value)


NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A checked, tokenised request, as a gateway hands it to the router.

    ``salt`` separates tenants' prefix caches; ``deadline_at`` is on the gateway's Clock. ``priority``: higher goes
    first where requests wait. ``tokenize_s``: of the time since it arrived, what its tokens took. ``trace``: its span,
    of which attempts are children; None: it is not traced.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""
    arrived_at: float = 0.0
    deadline_at: float | None = None
    slo: Slo = NO_SLO
    priority: int = 0
    tokenize_s: float = 0.0
    trace: TraceContext | None = None

    def __post_init__(self) -> None:
        _check(len(self.prompt_token_ids) > 0, "prompt", "must hold at least one token", self.prompt_token_ids)
        _check(
            -MAX_PRIORITY <= self.priority <= MAX_PRIORITY,
            "priority",
            f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY}",
            self.priority,
        )


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence as an engine is asked to run it.

    ``output_token_ids`` are the tokens that earlier tries already gave the client: they are part of the context and
    of the penalties, and the next token has position ``len(output_token_ids)``. ``sampling.n`` is 1.
    ``hold_kv`` asks the engine to stop after one token and to keep the pages until ``release`` (a prefill worker).
    ``first_token_by``: when the first token is wanted, on the engine's Clock; None: nobody promised anything.
    ``trace``: the attempt's span, of which what workers do for it are children; None: it is not traced.
    """

    sequence_id: SequenceId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    salt: bytes = b""
    hold_kv: bool = False
    first_token_by: float | None = None
    trace: TraceContext | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every known token: the prompt and what was generated so far."""
        return self.prompt_token_ids + self.output_token_ids


@dataclass(frozen=True, slots=True)
class PullTask:
    """Whose cached pages a worker is to fetch for a sequence, before it prefills it.

    ``num_tokens``: leading ones of the sequence, whole pages of which are wanted. ``timeout_s``: after so long it would
    have been faster to compute them; None: nobody has predicted it.
    """

    worker_id: WorkerId
    cluster_id: ClusterId
    engine_id: EngineId
    address: str  # host:port of its gRPC server
    num_tokens: int
    timeout_s: float | None = None


class PullOutcome(StrEnum):
    """How a pull ended. After all but the first two the worker computes what it was to fetch."""

    PULLED = "pulled"  # what was asked for, or as much of its beginning as the source had
    CACHED = "cached"  # nothing of it was missing
    NOT_FOUND = "not_found"  # the source does not hold the first missing page
    NO_PAGES = "no_pages"  # there was no room for them, or no prefix cache
    TIMEOUT = "timeout"  # it outlasted its worth
    UNREACHABLE = "unreachable"  # the source's process, or the link between the two
    BACKING_OFF = "backing_off"  # the source was not asked: it failed a moment ago
    INCOMPATIBLE = "incompatible"  # the pages there are not like those here
    CORRUPTED = "corrupted"  # the bytes came damaged, too often
    FAILED = "failed"  # whatever else either end gave up for
    ABORTED = "aborted"  # the sequence was ended meanwhile


@dataclass(frozen=True, slots=True)
class PullReport:
    """One pull that has ended. ``seconds``: how long its sequence waited for it, before it was queued."""

    outcome: PullOutcome
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token's log-probability and the most likely tokens' (before temperature and penalties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class StageStats(NamedTuple):
    """What one worker did for one sequence; durations in seconds, measured where they passed.

    A tuple, as chunks are: engine and worker make seven of them for each sequence.
    """

    worker_id: WorkerId
    role: Role
    queue_s: float = 0.0  # from arrival in the worker's queue to the first step that held the sequence
    compute_s: float = 0.0  # from that step to the stage's last token
    transfer_s: float = 0.0  # prefill only: first write to acknowledged commit
    exposed_transfer_s: float = 0.0  # prefill only: first token to acknowledged commit, what compute did not hide
    cached_tokens: int = 0  # prompt tokens found in this worker's prefix cache, those just pulled into it included
    received_tokens: int = 0  # decode only: prompt tokens whose KV came over the wire
    bytes_shipped: int = 0  # prefill only: KV payload bytes sent
    num_preemptions: int = 0
    pull: PullReport | None = None  # of cached pages, before this worker prefilled; None: none was asked for
    transfer_wait_s: float = 0.0  # prefill only: of exposed_transfer_s, before the decode worker had granted pages
    reload: ReloadReport | None = None  # of pages in this worker's lower tiers; None: the prefix ended on the device


class TokenChunk(NamedTuple):
    """Tokens of one sequence, in order. ``position`` is the output index of ``token_ids[0]``.

    A tuple, because decode makes one for each token: a frozen dataclass takes three times as long to make.

    A chunk may hold no tokens: a finish, or only ``stats`` (a prefill worker reports the hand-over after its token).
    """

    sequence_id: SequenceId
    position: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # empty, or one for each token
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended it, if one did
    stats: StageStats | None = None


def joined_chunk(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Several chunks of one sequence, each where the one before ends, as one; only the last may end the sequence."""
    last = chunks[-1]
    return TokenChunk(
        last.sequence_id,
        chunks[0].position,
        tuple(chain.from_iterable([chunk.token_ids for chunk in chunks])),
        tuple(chain.from_iterable([chunk.logprobs for chunk in chunks])),
        last.finish_reason,
        last.stop_token_id,
        last.stats,
    )


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """A worker gave the sequence up before it finished."""

    sequence_id: SequenceId
    message: str
    retryable: bool
    stage: Role


def sequence_id(request_id: RequestId, index: int, attempt: int) -> SequenceId:
    """The name of try ``attempt`` at continuation ``index``; unique, so a late chunk of an old try is recognised."""
    return SequenceId(f"{request_id}/{index}.{attempt}")


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Where the seconds of one continuation went, put together by the router from what each stage reported.

    ``slo_ttft_met`` and ``slo_tpot_met`` say whether the request's objectives were met; None: it had none.
    """

    prefill_worker: WorkerId | None  # None: the decode worker prefilled it itself
    decode_worker: WorkerId | None  # None: the first token was the last
    route_reason: str
    admission_s: float = 0.0  # waited in the gateway for its turn
    route_s: float = 0.0  # from its arrival to its first route, less ``admission_s``: tokenising is in it
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    exposed_transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0  # arrival at the gateway to the first token at the router
    total_s: float = 0.0
    bytes_shipped: int = 0
    cached_tokens: int = 0
    decode_cached_tokens: int = 0
    num_attempts: int = 1
    num_preemptions: int = 0
    pull_outcome: str = ""  # PullOutcome of the last attempt that was to pull cached pages; empty: none was
    pulled_tokens: int = 0
    bytes_pulled: int = 0
    pull_s: float = 0.0
    reload: ReloadReport | None = None  # of what lower cache tiers held, on all its workers; None: nothing
    slo_ttft_met: bool | None = None
    slo_tpot_met: bool | None = None
    slo_miss_expected: str = ""  # why it was served although a miss was predicted; empty: none was
    tpot_s: float | None = None  # mean time between its tokens at the router; None for fewer than two
    fallback: str = ""  # a word for why the route is not what an intact cluster would take; empty: it is
    # What the route was expected to take when it was chosen; None: the policy predicts nothing. ``expected_ttft_s``
    # begins at the routing, ``ttft_s`` at the arrival, ``admission_s + route_s`` earlier.
    expected_ttft_s: float | None = None
    expected_tpot_s: float | None = None
    expected_bytes_shipped: int | None = None
    colocated_ttft_s: float | None = None  # of the best route on which one worker does both
    colocated_tpot_s: float | None = None
    ttft_parts: TtftParts | None = None  # of ``ttft_s``; None: it has no token
    ttst_parts: TtstParts | None = None  # of the time from there to the second token; None: it has no second


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """What the router gives a gateway: the next tokens of continuation ``index``.

    The last chunk of a continuation has ``finish_reason`` and ``timing``.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    timing: RequestTiming | None = None
