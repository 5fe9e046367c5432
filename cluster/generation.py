"""The text side of one request, shared by both front doors: from a prompt and parameters to text that streams.

The life of a request here:
1. A door parses its protocol into a ``TextRequest`` and calls ``prepare``: the model's name, the prompt and the
   parameters are checked against the served model, the prompt becomes tokens, a seed is drawn if the client gave
   none, and what its output has to obey is compiled once (grammar_check.py). Whatever is wrong raises
   ``InvalidRequest`` naming the client's field, before anything was started.
2. ``stream`` runs ``Router.generate`` and turns each chunk of tokens into text: whole UTF-8 characters only, nothing
   that could still become part of a stop string, and of a call of a tool not the text but the call (tools.py).
3. A continuation that reaches a stop string is over for the client at once; ``Router.stop`` ends it on its workers,
   and the router's last chunk for it brings the timing.
4. Closing ``stream`` early (a client that went away) closes ``Router.generate``, which frees both pools.

Engines know token ids only; everything that is a string lives in this file, ``tokenizer`` and ``stop_strings``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.config import ServiceConfig
from cluster.front_door import ClusterMembership, Door, RequestRouter
from cluster.metrics import Metrics, Outcome, RequestRecord, RequestWatcher, SloResult
from cluster.sampling_defaults import with_defaults
from cluster.stop_strings import StopStrings
from cluster.tokenizer import NO_TOOLS, ChatMessage, Tokenizer, ToolCall
from cluster.tool_calls import ParsedCall, ToolCallParser
from cluster.tools import TOOL_CALL_PARSERS, ToolFormat, ToolUse, format_of
from cluster.view import ModelInfo
from core.clock import Clock
from core.errors import InvalidRequest, NoRoute, UnknownModel
from core.grammar import Grammar
from core.prefix_hash import tenant_of
from core.request import (
    NO_SLO,
    FinishReason,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    SamplingParams,
    Slo,
    TokenLogprob,
)
from core.tracing import (
    TRACING_OFF,
    AttributeValue,
    Span,
    SpanKind,
    TraceContext,
    Tracing,
    record_steps,
)

# Above this many characters a prompt is tokenised on a thread: megabytes take seconds, in which no token would be sent.
_INLINE_PROMPT_CHARS = 20_000

# Roles that every chat template knows; most templates take any word as a role and would hide a mistake. And tool, of
# messages that answer a call.
CHAT_ROLES = ("system", "user", "assistant")

_NO_DEFAULTS = SamplingParams()


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; the tokenizer's own special tokens are added."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Tokens as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template, with the tools that the model is told of."""

    messages: tuple[ChatMessage, ...]
    tools: ToolUse | None = None


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt as a door parsed it. ``prompt_field`` is the client's name for the prompt; instants on our Clock."""

    request_id: RequestId
    door: Door
    prompt: Prompt
    prompt_field: str
    sampling: SamplingParams
    arrived_at: float
    left_open: frozenset[str] = frozenset()  # parameters of which the client said nothing: they get the defaults
    model: str | None = None  # None: whatever is served
    salt: bytes = b""
    deadline_at: float | None = None
    slo: Slo = NO_SLO  # what the client asked for; the rest is the configuration's
    priority: int = 0
    trace_parent: TraceContext | None = None  # the client's span, if it named one


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that may be started."""

    request: GenerateRequest
    door: Door
    tokenize_s: float
    trace_parent: TraceContext | None = None
    tools: ToolsInUse | None = None


@dataclass(frozen=True, slots=True)
class ToolsInUse:
    """How calls are found in the output."""

    use: ToolUse
    format: ToolFormat


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token that was, or might have been, chosen. ``data`` are its bytes, which need not be whole characters."""

    token_id: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class LogprobText:
    """The chosen token and the most likely ones, most likely first."""

    chosen: TokenText
    top: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one continuation. ``timing`` is None only if the router gave none."""

    reason: FinishReason
    text: str  # all of it, less the calls
    output_token_ids: tuple[int, ...]  # all of them, the stop token included
    stop_token_id: int | None
    stop_string: str | None
    timing: RequestTiming | None
    calls: tuple[ToolCall, ...] = ()

    @property
    def calls_tools(self) -> bool:
        """Did it end because the model wants tools to be called?"""
        return bool(self.calls) and self.reason is FinishReason.STOP


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What a door sends next for continuation ``index``. Text may lag behind tokens; the count is of tokens so far.

    ``calls`` come after the text; the first of them is number ``num_calls_before`` of the answer.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobText, ...]
    num_output_tokens: int
    cached_tokens: int
    finish: Finish | None = None
    calls: tuple[ToolCall, ...] = ()
    num_calls_before: int = 0


class GrammarCheck(Protocol):
    """Finds out whether a grammar can be obeyed. ``grammar_check.GrammarChecker`` is the real one."""

    async def check(self, grammar: Grammar, model: ModelInfo) -> None:
        """Raise ``InvalidRequest`` (field ``grammar``) unless ``model`` can be made to obey it."""
        ...


class NoGrammars:
    """For gateways that serve none."""

    async def check(self, grammar: Grammar, model: ModelInfo) -> None:
        raise InvalidRequest("grammar", "structured output is not available here")


def draw_seed() -> int:
    """A seed for a client that gave none."""
    return secrets.randbits(63)


class Generation:
    """Runs text requests. Holds no state of a request: that lives in the generator that ``stream`` returns."""

    def __init__(
        self,
        router: RequestRouter,
        membership: ClusterMembership,
        tokenizer: Tokenizer,
        metrics: Metrics,
        config: ServiceConfig,
        clock: Clock,
        seeds: Callable[[], int] = draw_seed,
        tracing: Tracing = TRACING_OFF,
        watchers: Sequence[RequestWatcher] = (),
        grammars: GrammarCheck | None = None,
        sampling_defaults: SamplingParams = _NO_DEFAULTS,
    ) -> None:
        """``watchers`` hear of each request that has ended, besides ``metrics``. ``grammars`` None: requests with one
        are refused. ``sampling_defaults``: what requests get for what they leave open."""
        self._router = router
        self._membership = membership
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._model_name = config.model_name
        self._admission = config.admission
        self._clock = clock
        self._seeds = seeds
        self._tracing = tracing
        self._watchers = watchers
        self._grammars = grammars or NoGrammars()
        self.sampling_defaults = sampling_defaults
        self._tool_call_parser = config.structured_output.tool_call_parser

    @property
    def has_chat_template(self) -> bool:
        """Whether ``ChatPrompt`` is served."""
        return self._tokenizer.has_chat_template

    def model(self) -> ModelInfo:
        """The served model; ``NoRoute`` until a worker has registered."""
        model = self._membership.model()
        if model is None:
            raise NoRoute("no worker has registered yet")
        return model

    async def tokenize(self, prompt: Prompt, *, field: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The prompt's token ids; ``InvalidRequest`` naming ``field`` if there is nothing in it."""
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        if isinstance(prompt, ChatPrompt):
            _require(bool(prompt.messages), field, "must hold at least one message")
            for index, message in enumerate(prompt.messages):
                known = message.role in CHAT_ROLES or (message.role == "tool" and message.tool_call_id is not None)
                allowed = f"must be one of {', '.join(CHAT_ROLES)}, got {message.role!r}"
                _require(known, f"{field}[{index}].role", allowed)
            size = sum(len(m.content) for m in prompt.messages)
        else:
            _require(bool(prompt.text), field, "must not be empty")
            size = len(prompt.text)
        if size > _INLINE_PROMPT_CHARS:
            return await asyncio.to_thread(self._encode, prompt, field, add_special_tokens)
        return self._encode(prompt, field, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], *, field: str) -> str:
        """The text of ``token_ids``, special tokens included."""
        _require_in_vocabulary(token_ids, field, self.model())
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each of ``token_ids`` by itself, as log-probabilities show it."""
        return [self._tokenizer.token_text(token_id)[0] for token_id in token_ids]

    def refuse(self, door: Door, error: Exception) -> None:
        """Count a request that its door could not even parse."""
        self._metrics.refuse(door, error)

    async def prepare(self, request: TextRequest) -> PreparedRequest:
        """Check and tokenise; raises ``InvalidRequest``, ``UnknownModel`` or ``NoRoute`` before anything is started."""
        try:
            return await self._prepare(request)
        except BaseException as error:
            self._metrics.refuse(request.door, error)
            raise

    async def _prepare(self, request: TextRequest) -> PreparedRequest:
        if request.model is not None and request.model != self._model_name:
            raise UnknownModel(request.model, self._model_name)
        model = self.model()
        tools = self._tools_in_use(request)
        began_at = self._clock.now()
        token_ids = await self.tokenize(request.prompt, field=request.prompt_field)
        tokenize_s = self._clock.now() - began_at
        _check_prompt(token_ids, request.prompt_field, model)
        room = model.max_model_len - len(token_ids)
        sampling = with_defaults(request.sampling, request.left_open, self.sampling_defaults, room)
        sampling = _complete_sampling(sampling, len(token_ids), model, self._seeds)
        if tools is not None:
            sampling = await self._with_tools(sampling, tools, model)
        if sampling.grammar is not None:
            await self._grammars.check(sampling.grammar, model)
        generate = GenerateRequest(
            request_id=request.request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            salt=request.salt,
            arrived_at=request.arrived_at,
            deadline_at=request.deadline_at,
            slo=self._admission.slo_for(request.slo),
            priority=request.priority,
            tokenize_s=tokenize_s,
            trace=self._tracing.root(request.trace_parent),
        )
        return PreparedRequest(generate, request.door, tokenize_s, request.trace_parent, tools)

    def _tools_in_use(self, request: TextRequest) -> ToolsInUse | None:
        """How the model calls the request's tools; ``InvalidRequest`` if it cannot."""
        use = request.prompt.tools if isinstance(request.prompt, ChatPrompt) else None
        if use is None:
            return None
        template = self._tokenizer.tool_template
        calls_as = format_of(self._tool_call_parser, template)
        _require(bool(template), use.field, NO_TOOLS)
        if calls_as is None:
            known = ", ".join(TOOL_CALL_PARSERS)
            raise InvalidRequest(
                use.field,
                f"how the served model calls them is not known (structured_output.tool_call_parser is "
                f"{self._tool_call_parser}, of {known})",
            )
        if request.sampling.grammar is not None:
            raise InvalidRequest(use.field, "an answer whose form is asked for calls no tools; set tool_choice to none")
        return ToolsInUse(use, calls_as)

    async def _with_tools(self, sampling: SamplingParams, tools: ToolsInUse, model: ModelInfo) -> SamplingParams:
        """The parameters of a request whose output is searched for calls, and perhaps has to be one."""
        use, calls_as = tools.use, tools.format
        if calls_as.begin and self._tokenizer.is_hidden(calls_as.begin):
            sampling = replace(sampling, skip_special_tokens=False)  # else nobody would see where a call begins
        for tool in use.forced:
            try:
                await self._grammars.check(tool.schema, model)  # alone, to say which is wrong
            except InvalidRequest as error:
                raise InvalidRequest(tool.path, error.message) from error
        try:
            grammar = calls_as.grammar(use, self._tokenizer.token_of)
            sampling = replace(sampling, grammar=grammar)
            if grammar is not None:
                await self._grammars.check(grammar, model)
        except InvalidRequest as error:
            field = use.choice_field if error.field == "grammar" else error.field
            raise InvalidRequest(field, error.message) from error
        return sampling

    async def stream(self, prepared: PreparedRequest) -> AsyncGenerator[TextChunk, None]:
        """Text of all n continuations as it comes; each ends with one chunk that has ``finish``.

        Raises what ``Router.generate`` raises. Closing it aborts the request.
        """
        request = prepared.request
        progress = _Progress(request, self._tokenizer, prepared.tools)
        outcome = Outcome.CANCELLED
        try:
            async with aclosing(self._router.generate(request)) as chunks:
                async for chunk in chunks:
                    continuation = progress.continuations[chunk.index]
                    was_stopped = continuation.stopped
                    text_chunk = continuation.push(chunk, self._clock.now())
                    if continuation.stopped and not was_stopped and chunk.finish_reason is None:
                        await self._router.stop(request.request_id, chunk.index)
                    if text_chunk is not None:
                        yield text_chunk
            outcome = Outcome.OK
        except BaseException as error:
            outcome = Outcome.OK if progress.finished else Outcome.of(error)
            raise
        finally:
            self._note_end(progress.record(prepared.door, outcome, self._clock.now(), self._tenant(request)), prepared)

    def _tenant(self, request: GenerateRequest) -> str:
        return self._admission.label_of(tenant_of(request.salt))

    def _note_end(self, record: RequestRecord, prepared: PreparedRequest) -> None:
        self._metrics.observe(record)
        for watcher in self._watchers:
            watcher.observe(record)
        trace, began_at = prepared.request.trace, prepared.request.arrived_at
        if trace is None:
            return
        tracer = self._tracing.tracer
        parts = record.timings[0].ttft_parts if record.timings else None
        if parts is not None:
            steps = ("receive", "tokenize", "admission", "siblings", "route")
            record_steps(tracer, trace, began_at, {name: getattr(parts, f"{name}_s") for name in steps})
        error = "" if record.outcome is Outcome.OK else record.outcome.value
        ended_at, attributes = began_at + record.e2e_s, _span_attributes(record)
        tracer.record(
            Span("request", trace, prepared.trace_parent, began_at, ended_at, SpanKind.SERVER, attributes, error)
        )

    def _encode(self, prompt: TextPrompt | ChatPrompt, field: str, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, ChatPrompt):
            tools = () if prompt.tools is None else prompt.tools.tools
            functions = [tool.as_template_gets_it() for tool in tools]
            return self._tokenizer.encode_chat(prompt.messages, field=field, tools=functions)
        return self._tokenizer.encode(prompt.text, field=field, add_special_tokens=add_special_tokens)


def _span_attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    return {
        "prfaas.request_id": record.request_id,
        "prfaas.door": record.door.value,
        "prfaas.outcome": record.outcome.value,
        "prfaas.tenant": record.tenant,
        "prfaas.prompt_tokens": record.prompt_tokens,
        "prfaas.cached_tokens": record.cached_tokens,
        "prfaas.generated_tokens": record.generated_tokens,
    }


class _Progress:
    """What has come of one request so far."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, tools: ToolsInUse | None) -> None:
        self._request = request
        self.continuations = [_Continuation(index, request, tokenizer, tools) for index in range(request.sampling.n)]

    @property
    def finished(self) -> bool:
        return all(c.finished for c in self.continuations)

    def record(self, door: Door, outcome: Outcome, now: float, tenant: str) -> RequestRecord:
        request = self._request
        first_at = min((c.first_token_at for c in self.continuations if c.first_token_at is not None), default=None)
        return RequestRecord(
            door=door,
            outcome=outcome,
            e2e_s=now - request.arrived_at,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=self.continuations[0].cached_tokens,
            generated_tokens=sum(len(c.output_token_ids) for c in self.continuations),
            ttft_s=None if first_at is None else first_at - request.arrived_at,
            tpot_s=tuple(c.tpot_s for c in self.continuations if c.tpot_s is not None),
            slo_result=self._slo_result(outcome),
            timings=tuple(c.timing for c in self.continuations if c.timing is not None),
            tenant=tenant,
            request_id=request.request_id,
            ended_at=now,
            trace=request.trace,
            tokenize_s=request.tokenize_s,
            num_tool_calls=sum(len(c.calls) for c in self.continuations),
            num_malformed_tool_calls=sum(c.num_malformed_calls for c in self.continuations),
        )

    def _slo_result(self, outcome: Outcome) -> SloResult | None:
        """The first continuation's first token is the request's; the tokens of all are to come in time."""
        if self._request.slo == NO_SLO:
            return None
        timings = [c.timing for c in self.continuations if c.timing is not None]
        if outcome is not Outcome.OK or not timings:
            return SloResult.of(outcome)
        ttft_missed = timings[0].slo_ttft_met is False
        return SloResult.of(outcome, ttft_missed, any(t.slo_tpot_met is False for t in timings))


class _Continuation:
    """The text of one of a request's n continuations: ``push`` is its one writer.

    running -> stopped (a stop string was found, the router has still to end it) -> finished, or running -> finished.
    """

    def __init__(
        self, index: int, request: GenerateRequest, tokenizer: Tokenizer, tools: ToolsInUse | None = None
    ) -> None:
        sampling = request.sampling
        self._index = index
        self._tokenizer = tokenizer
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._detokenizer = tokenizer.detokenizer(
            request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output) if sampling.stop else None
        self._stop_string: str | None = None
        self._tools = tools
        self._parser = None if tools is None else tools.format.parser(tools.use)
        self.calls: list[ToolCall] = []
        self.num_malformed_calls = 0
        self._text: list[str] = []
        self.output_token_ids: list[int] = []
        self.cached_tokens = 0
        self.first_token_at: float | None = None
        self.timing: RequestTiming | None = None  # when it has finished
        self._last_token_at = 0.0
        self.finished = False

    @property
    def stopped(self) -> bool:
        """True when a stop string was found: tokens that still come are dropped."""
        return self._stop_string is not None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens; None for fewer than two."""
        if self.first_token_at is None or len(self.output_token_ids) < 2:
            return None
        return (self._last_token_at - self.first_token_at) / (len(self.output_token_ids) - 1)

    def push(self, chunk: OutputChunk, now: float) -> TextChunk | None:
        """Take the router's next chunk; None when there is nothing to tell the client."""
        self.cached_tokens = chunk.cached_tokens or self.cached_tokens
        num_taken, text = (0, "") if self.stopped else self._take(chunk, now)
        if chunk.finish_reason is not None and not self.stopped:
            text += self._flush()
        num_calls_before = len(self.calls)
        if self._parser is not None:
            text = self._find_calls(self._parser, text, chunk.finish_reason)
        calls = tuple(self.calls[num_calls_before:])
        if text:
            self._text.append(text)
        if not num_taken and not text and not calls and chunk.finish_reason is None:
            return None
        return TextChunk(
            index=self._index,
            text=text,
            token_ids=chunk.token_ids[:num_taken],
            logprobs=tuple(self._logprob_text(entry) for entry in chunk.logprobs[:num_taken]),
            num_output_tokens=len(self.output_token_ids),
            cached_tokens=self.cached_tokens,
            finish=None if chunk.finish_reason is None else self._finish(chunk),
            calls=calls,
            num_calls_before=num_calls_before,
        )

    def _find_calls(self, parser: ToolCallParser, text: str, finish_reason: FinishReason | None) -> str:
        """Note the calls in it; what is left is text. Text between two calls comes before both."""
        found = parser.push(text)
        if finish_reason is not None:
            found += parser.flush()
        for parsed in found:
            self.num_malformed_calls += parsed.num_malformed
            self.calls += [self._named(call) for call in parsed.calls]
        return "".join(parsed.text for parsed in found)

    def _named(self, call: ParsedCall) -> ToolCall:
        assert self._tools is not None, "calls are found by its parser"
        return ToolCall(self._tools.format.call_id(), call.name, call.arguments)

    def _take(self, chunk: OutputChunk, now: float) -> tuple[int, str]:
        """Count and detokenise the chunk's tokens, up to a stop string; how many were taken and the text to show."""
        token_ids = chunk.token_ids
        if not token_ids:
            return 0, ""
        if self.first_token_at is None:
            self.first_token_at = now
        self._last_token_at = now
        # The text of a stop token is not part of the answer; without skip_special_tokens it would show.
        hidden = chunk.stop_token_id is not None and token_ids[-1] == chunk.stop_token_id and not self._include_stop
        if self._stop is None:
            self.output_token_ids += token_ids
            return len(token_ids), self._detokenizer.push(token_ids[:-1] if hidden else token_ids)
        shown: list[str] = []
        for num_taken, token_id in enumerate(token_ids, start=1):
            self.output_token_ids.append(token_id)
            if hidden and num_taken == len(token_ids):
                break
            shown.append(self._filter(self._detokenizer.push((token_id,))))
            if self.stopped:
                return num_taken, "".join(shown)
        return len(token_ids), "".join(shown)

    def _filter(self, text: str) -> str:
        """Hold back what may become a stop string. The text of the first ``min_tokens`` tokens is not looked at."""
        if self._stop is None or len(self.output_token_ids) <= self._min_tokens:
            return text
        shown, self._stop_string = self._stop.push(text)
        return shown

    def _flush(self) -> str:
        """What is held back at the end, by the detokeniser and then by the stop strings."""
        text = self._filter(self._detokenizer.flush())
        return text if self._stop is None or self.stopped else text + self._stop.flush()

    def _finish(self, chunk: OutputChunk) -> Finish:
        assert chunk.finish_reason is not None
        assert not self.finished, "a continuation ends once"
        self.finished = True
        self.timing = chunk.timing
        return Finish(
            reason=FinishReason.STOP if self.stopped else chunk.finish_reason,
            text="".join(self._text),
            output_token_ids=tuple(self.output_token_ids),
            stop_token_id=None if self.stopped else chunk.stop_token_id,
            stop_string=self._stop_string,
            timing=chunk.timing,
            calls=tuple(self.calls),
        )

    def _logprob_text(self, entry: TokenLogprob) -> LogprobText:
        return LogprobText(
            self._token_text(entry.token_id, entry.logprob), tuple(self._token_text(*pair) for pair in entry.top)
        )

    def _token_text(self, token_id: int, logprob: float) -> TokenText:
        text, data = self._tokenizer.token_text(token_id)
        return TokenText(token_id, text, data, logprob)


def _check_prompt(token_ids: tuple[int, ...], field: str, model: ModelInfo) -> None:
    _require(bool(token_ids), field, "must hold at least one token")
    _require(
        len(token_ids) < model.max_model_len,
        field,
        f"has {len(token_ids)} tokens; the model's context is {model.max_model_len} tokens, the output included",
    )
    _require_in_vocabulary(token_ids, field, model)


def _complete_sampling(
    sampling: SamplingParams, num_prompt_tokens: int, model: ModelInfo, seeds: Callable[[], int]
) -> SamplingParams:
    """Check the parameters against the model and fill in what the client left open."""
    _require_in_vocabulary(sampling.stop_token_ids, "stop_token_ids", model)
    _require_in_vocabulary(sampling.logit_bias, "logit_bias", model)
    room = model.max_model_len - num_prompt_tokens
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    _require(
        max_tokens <= room,
        "max_tokens",
        f"must be at most {room} (the context of {model.max_model_len} tokens less the prompt's {num_prompt_tokens}), "
        f"got {max_tokens}",
    )
    return replace(
        sampling,
        max_tokens=max_tokens,
        top_k=0 if sampling.top_k >= model.vocab_size else sampling.top_k,
        seed=seeds() if sampling.seed is None else sampling.seed,
    )


def _require_in_vocabulary(token_ids: Iterable[int], field: str, model: ModelInfo) -> None:
    stray = next((token_id for token_id in token_ids if not 0 <= token_id < model.vocab_size), None)
    _require(stray is None, field, f"token ids must be between 0 and {model.vocab_size - 1}, got {stray}")


def _require(ok: bool, field: str, message: str) -> None:
    if not ok:
        raise InvalidRequest(field, message)
