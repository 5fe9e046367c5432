"""The HTTP door: OpenAI's /v1/chat/completions, /v1/completions, /v1/responses and /v1/models, Anthropic's
/v1/messages, vLLM's /tokenize and /detokenize, and what operators ask for: /health, /live, /metrics, /version, /status,
which is the JSON of ``prfaas status --json``, and the page at / (page.py).

The life of a generating request here:
1. The body is read up to ``http.max_body_bytes`` and understood by its API (``openai_api``, ``responses_api``,
   ``messages_api``), which knows what it means and how its answer is written; every prompt is prepared.
2. Nothing is sent before the first token is there, so whatever goes wrong until then has its own status code, from
   one table, ``_STATUS``, in the API's error body. Later errors are an event in the stream.
3. While it runs, the connection is watched: a client that goes away cancels it, which frees both pools.

Every answer has an ``x-request-id``: the client's, or a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import socket
import string
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import messages_api, openai_api, responses_api, token_api
from cluster.api_keys import ApiKeys
from cluster.config import ServiceConfig
from cluster.front_door import ClusterMembership, Door, not_ready_reason, retry_after
from cluster.generation import Finish, Generation, LogprobText, PreparedRequest, TextChunk, TextRequest
from cluster.metrics import Metrics
from cluster.page import REQUESTS_PATH, Recent, add_page
from cluster.version import version
from core.clock import Clock, unix_time
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidConfig,
    InvalidRequest,
    NoRoute,
    Overloaded,
    PrfaasError,
    SequenceFailed,
    TransferError,
    UnknownModel,
    WrongKey,
)
from core.request import MAX_PRIORITY, RequestId, Slo
from core.tracing import TRACEPARENT, TraceContext

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_MAX_DRAINED_BODIES = 8  # a body that is too large is read on to that many times the limit, so that the answer arrives
_NO_ROUTE_RETRY_AFTER_S = 1
_REQUEST_ID_CHARS = frozenset(string.ascii_letters + string.digits + "-_.:+=@/")
_MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID = "prfaas.request_id"  # in the ASGI scope


Describe = Callable[[], dict[str, object]]  # the service's workers, links and plan, as JSON

# Paths of OpenAI's and vLLM's servers that a model which generates text has no answer for |-> what they would give.
_NOT_SERVED = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rankings",
    "/v1/score": "scores",
    "/v1/moderations": "moderation",
    "/v1/audio/speech": "speech",
    "/v1/audio/transcriptions": "transcriptions",
    "/v1/images/generations": "images",
    "/v1/batches": "batches; send the requests one by one, as many at once as you like",
    "/v1/files": "files",
}


def _as_openai(status: int, body: Mapping[str, object]) -> Mapping[str, object]:
    return body


@dataclass(frozen=True)
class _Api:
    """What differs between APIs that generate. ``error_body``: how it writes OpenAI's error object."""

    parse: Callable[[object], openai_api.Call]
    error_body: Callable[[int, Mapping[str, object]], Mapping[str, object]] = _as_openai


_CHAT = _Api(openai_api.parse_chat)
_COMPLETION = _Api(openai_api.parse_completion)
_RESPONSE = _Api(responses_api.parse_response)
_MESSAGE = _Api(messages_api.parse_message, messages_api.error_body)


class BodyTooLarge(InvalidRequest):
    """The request's body is larger than ``http.max_body_bytes``."""


@dataclass(frozen=True)
class _Status:
    code: int
    kind: str  # OpenAI's error type
    name: str | None = None  # OpenAI's error code


# The error tree as statuses: the first line that fits is taken, so narrow errors stand before wide ones.
_STATUS: tuple[tuple[type[PrfaasError], _Status], ...] = (
    (WrongKey, _Status(401, "authentication_error", "invalid_api_key")),
    (UnknownModel, _Status(404, "invalid_request_error", "model_not_found")),
    (BodyTooLarge, _Status(413, "invalid_request_error", "body_too_large")),
    (InvalidRequest, _Status(400, "invalid_request_error", "invalid_value")),
    (Overloaded, _Status(429, "rate_limit_error", "overloaded")),
    (NoRoute, _Status(503, "service_unavailable_error", "no_worker")),
    (DeadlineExceeded, _Status(504, "timeout_error", "deadline_exceeded")),
    (Cancelled, _Status(499, "cancelled_error", "cancelled")),
    (SequenceFailed, _Status(500, "server_error", "sequence_failed")),
    (TransferError, _Status(503, "service_unavailable_error", "transfer_failed")),
    (PrfaasError, _Status(500, "server_error")),
)


class HttpGateway:
    """The HTTP server of one gateway process."""

    def __init__(
        self,
        generation: Generation,
        membership: ClusterMembership,
        metrics: Metrics,
        config: ServiceConfig,
        clock: Clock,
        describe: Describe,
        recent: Recent,
    ) -> None:
        """``describe``: what GET /status answers; ``recent``: what GET /requests does."""
        self._config = config.http
        app = make_app(generation, membership, metrics, config, clock, describe)
        if config.http.page:
            add_page(app, recent)
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    @property
    def port(self) -> int:
        """The bound port, which the configuration may have left open (0)."""
        assert self._socket is not None, "started first"
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Bind and serve; ``InvalidConfig`` if the address cannot be had."""
        host, port = self._config.host, self._config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise InvalidConfig("http.port", f"cannot listen on {host}:{port}: {error.strerror}") from error
        # Connections inherit it. asyncio sets it only where a socket names its protocol, which these do not. Without it
        # an event waits for the client to acknowledge the last one, which clients put off for 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.ready.wait()

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, let running requests end for ``grace_s``, then cancel them."""
        if self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Uvicorn inside a process that has its own signal handlers and other servers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def make_app(
    generation: Generation,
    membership: ClusterMembership,
    metrics: Metrics,
    config: ServiceConfig,
    clock: Clock,
    describe: Describe,
) -> FastAPI:
    """The routes, without a server."""
    app = FastAPI(title="prfaas", version=version(), summary="OpenAI-compatible door of a prfaas service")
    app.add_middleware(_KeyGate, keys=ApiKeys(config.api_keys_file), metrics=metrics)
    app.add_middleware(_RequestIds)
    app.add_exception_handler(HTTPException, _http_error)
    _add_generation(app, lambda request, api: _Answer(request, api, generation, metrics, config, clock))
    _add_tokens(app, _Tokens(generation, config))
    _add_refusals(app)
    _add_models(app, config.model_name, membership)
    _add_operation(app, membership, metrics, describe)
    return app


def _add_generation(app: FastAPI, answer: Callable[[Request, _Api], Response]) -> None:
    """What generates, in the words of each API."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return answer(request, _CHAT)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return answer(request, _COMPLETION)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return answer(request, _RESPONSE)

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return answer(request, _MESSAGE)


def _add_tokens(app: FastAPI, tokens: _Tokens) -> None:
    """What is asked about tokens; nothing is generated."""

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await tokens.answer(request, tokens.count, _MESSAGE)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await tokens.answer(request, tokens.tokenize, _CHAT)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await tokens.answer(request, tokens.detokenize, _CHAT)


def _add_refusals(app: FastAPI) -> None:
    for path, what in _NOT_SERVED.items():
        app.add_api_route(path, _refusal(path, what), methods=["POST"], include_in_schema=False)


def _add_models(app: FastAPI, model_name: str, membership: ClusterMembership) -> None:
    """What is served: one model."""
    base = {"id": model_name, "object": "model", "created": int(unix_time()), "owned_by": "prfaas"}

    def card() -> dict[str, object]:
        model = membership.model()
        return base if model is None else {**base, "max_model_len": model.max_model_len}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != model_name:
            return _error_response(UnknownModel(name, model_name))
        return JSONResponse(card())


def _add_operation(app: FastAPI, membership: ClusterMembership, metrics: Metrics, describe: Describe) -> None:
    """What operators, and their tools, ask of the service."""

    @app.get("/health")
    async def health() -> Response:
        reason = not_ready_reason(membership)
        body = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
        return JSONResponse(body, status_code=200 if reason is None else 503)

    @app.get("/live")
    async def live() -> Response:
        return PlainTextResponse("ok")

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> Response:
        return JSONResponse(describe())

    @app.get("/version")
    async def show_version() -> Response:
        return JSONResponse({"version": version()})


def _refusal(path: str, what: str) -> Callable[[], Coroutine[None, None, Response]]:
    message = f"POST {path}: this service generates text and gives no {what}"
    body = openai_api.error_body(message, "invalid_request_error", None, "unsupported_api")

    async def refuse() -> Response:
        return JSONResponse(body, status_code=404)  # clients ask again after 5xx

    return refuse


class _Tokens:
    """Questions about tokens, for which nothing is generated."""

    def __init__(self, generation: Generation, config: ServiceConfig) -> None:
        self._generation = generation
        self._config = config

    async def answer(
        self, request: Request, ask: Callable[[object], Coroutine[None, None, dict[str, object]]], api: _Api
    ) -> Response:
        """What ``ask`` says of the request's body, or its error."""
        try:
            return JSONResponse(await ask(await _read_json(request, self._config.http.max_body_bytes)))
        except InvalidRequest as error:
            self._generation.refuse(Door.HTTP, error)
            return _error_response(error, api)
        except PrfaasError as error:
            return _error_response(error, api)

    async def tokenize(self, body: object) -> dict[str, object]:
        """POST /tokenize."""
        asked = token_api.parse_tokenize(body)
        self._check_model(asked.model)
        token_ids = await self._generation.tokenize(
            asked.prompt, field=asked.field, add_special_tokens=asked.add_special_tokens
        )
        texts = self._generation.token_texts(token_ids) if asked.with_texts else None
        return token_api.tokenized(token_ids, self._generation.model().max_model_len, texts)

    async def detokenize(self, body: object) -> dict[str, object]:
        """POST /detokenize."""
        asked = token_api.parse_detokenize(body)
        self._check_model(asked.model)
        return {"prompt": self._generation.detokenize(asked.tokens, field="tokens")}

    async def count(self, body: object) -> dict[str, object]:
        """POST /v1/messages/count_tokens."""
        model, prompt = messages_api.parse_count(body)
        self._check_model(model)
        return {"input_tokens": len(await self._generation.tokenize(prompt, field="messages"))}

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._config.model_name:
            raise UnknownModel(model, self._config.model_name)


class _Answer(Response):
    """The answer to one generating request: it reads the body, runs the request and watches the connection."""

    def __init__(
        self,
        request: Request,
        api: _Api,
        generation: Generation,
        metrics: Metrics,
        config: ServiceConfig,
        clock: Clock,
    ) -> None:
        super().__init__()
        self._request = request
        self._api = api
        self._generation = generation
        self._metrics = metrics
        self._config = config
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_at = self._clock.now()
        try:
            try:
                body = await _read_json(self._request, self._config.http.max_body_bytes)
                asked = _read_objectives(self._request)
                call = self._api.parse(body)
            except InvalidRequest as error:
                self._metrics.refuse(Door.HTTP, error)
                raise
        except ClientDisconnect:
            return
        except PrfaasError as error:
            await _error_response(error, self._api)(scope, receive, send)
            return
        await _until_disconnect(receive, self._run(call, asked, arrived_at, _Sender(scope, receive, send, self._api)))

    async def _run(self, call: openai_api.Call, asked: _Objectives, arrived_at: float, sender: _Sender) -> None:
        """Answer ``call``; an error is told to the client in the way that is still possible."""
        try:
            prepared = await self._prepare(call, asked, arrived_at)
            async with aclosing(_choices(self._generation, prepared)) as chunks:
                run = _Run(call, prepared, call.format(self._config.model_name, int(unix_time())), chunks)
                await (run.stream(sender) if call.stream else run.collect(sender))
        except InvalidRequest as error:
            await sender.error(openai_api.renamed(error, call.aliases))
        except PrfaasError as error:
            await sender.error(error)
        except Exception:
            about = {"request_id": self._request.scope[_REQUEST_ID]}
            logger.exception("an HTTP request failed for a reason that is ours", extra=about)
            await sender.error(PrfaasError("internal error, see the gateway's log"))

    async def _prepare(self, call: openai_api.Call, asked: _Objectives, arrived_at: float) -> list[PreparedRequest]:
        """Every prompt, checked before any of them starts."""
        # What the client calls it may come twice at once; this does not, and is found by the client's name.
        name = f"{self._request.scope[_REQUEST_ID]}-{uuid.uuid4().hex[:8]}"
        trace_parent = TraceContext.parse(self._request.headers.get(TRACEPARENT, ""))
        many = len(call.prompts) > 1
        requests = [
            TextRequest(
                request_id=RequestId(f"{name}-{position}" if many else name),
                door=Door.HTTP,
                prompt=prompt,
                prompt_field=f"{call.prompt_field}[{position}]" if many else call.prompt_field,
                sampling=call.sampling,
                left_open=call.left_open,
                arrived_at=arrived_at,
                model=call.model,
                salt=call.salt,
                slo=asked.slo,
                priority=call.priority if asked.priority is None else asked.priority,
                trace_parent=trace_parent,
            )
            for position, prompt in enumerate(call.prompts)
        ]
        return [await self._generation.prepare(request) for request in requests]


class _Run:
    """The chunks of one call, written as one answer. Choice ``c`` is continuation ``c % n`` of prompt ``c // n``."""

    def __init__(
        self,
        call: openai_api.Call,
        prepared: Sequence[PreparedRequest],
        answer: openai_api.Format,
        chunks: AsyncGenerator[tuple[int, TextChunk], None],
    ) -> None:
        self._call = call
        self._prepared = prepared
        self._answer = answer
        self._chunks = chunks
        self._num_choices = len(prepared) * call.sampling.n
        self._output_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # prompt |-> tokens

    async def stream(self, sender: _Sender) -> None:
        """Server-sent events, the first of them when the first token is there."""
        extra: dict[str, object] = {"usage": None} if self._call.include_usage else {}
        async for index, chunk in self._chunks:
            if not sender.started:
                await sender.start_events(self._answer)
                for choice in range(self._num_choices):
                    opening = self._answer.opening(choice, self._prompt_tokens())
                    if opening is not None:
                        await sender.event(opening)
            finish = chunk.finish
            if finish is None:
                event = self._answer.event(index, chunk, extra)
            else:
                self._count(index, chunk)
                event = self._answer.event(index, chunk, extra | _vendor([self._timing(index, finish)]))
            if event is not None:
                await sender.event(event)
        if self._call.include_usage:
            await sender.event(self._answer.closing(self._usage()))
        await sender.end_events()

    async def collect(self, sender: _Sender) -> None:
        """One JSON body when everything is there."""
        logprobs: dict[int, list[LogprobText]] = {index: [] for index in range(self._num_choices)}
        finishes: dict[int, Finish] = {}
        async for index, chunk in self._chunks:
            logprobs[index] += chunk.logprobs
            if chunk.finish is not None:
                self._count(index, chunk)
                finishes[index] = chunk.finish
        wanted = self._call.sampling.logprobs is not None
        choices = [
            self._answer.choice(index, finish, logprobs[index] if wanted else None)
            for index, finish in sorted(finishes.items())
        ]
        timings = [self._timing(index, finish) for index, finish in sorted(finishes.items())]
        body = self._answer.response(choices, self._usage(), _vendor(timings))
        await sender.json(200, body, _worker_headers(finishes.get(0)))

    def _count(self, index: int, chunk: TextChunk) -> None:
        self._output_tokens += chunk.num_output_tokens
        prompt = index // self._call.sampling.n
        self._cached_tokens[prompt] = max(self._cached_tokens.get(prompt, 0), chunk.cached_tokens)

    def _prompt_tokens(self) -> int:
        return sum(len(prepared.request.prompt_token_ids) for prepared in self._prepared)

    def _usage(self) -> dict[str, object]:
        return openai_api.usage(self._prompt_tokens(), self._output_tokens, sum(self._cached_tokens.values()))

    def _timing(self, index: int, finish: Finish) -> dict[str, object]:
        return openai_api.timing(index, finish, self._prepared[index // self._call.sampling.n].tokenize_s)


class _Sender:
    """One HTTP answer. ``started`` is True when its status is sent: from then on an error is an event."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, api: _Api) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._api = api
        self._events: openai_api.Format | None = None  # how they are written, once there are any
        self.started = False

    async def json(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        self.started = True
        await JSONResponse(body, status_code=status, headers=headers)(self._scope, self._receive, self._send)

    async def start_events(self, written_as: openai_api.Format) -> None:
        self.started = True
        self._events = written_as
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would collect events
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, event: bytes) -> None:
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def end_events(self) -> None:
        ending = b"" if self._events is None else self._events.ending
        await self._send({"type": "http.response.body", "body": ending, "more_body": False})

    async def error(self, error: PrfaasError) -> None:
        if self._events is not None:
            await self.event(self._events.failure(_error_body(error)))
            await self.end_events()
        elif not self.started:
            self.started = True
            await _error_response(error, self._api)(self._scope, self._receive, self._send)


async def _choices(
    generation: Generation, prepared: Sequence[PreparedRequest]
) -> AsyncGenerator[tuple[int, TextChunk], None]:
    """The chunks of all prompts as they come, each with the number of its choice."""
    if len(prepared) == 1:
        async with aclosing(generation.stream(prepared[0])) as chunks:
            async for chunk in chunks:
                yield chunk.index, chunk
        return
    queue: asyncio.Queue[tuple[int, TextChunk] | Exception | None] = asyncio.Queue()

    async def run(position: int, one: PreparedRequest) -> None:
        try:
            async with aclosing(generation.stream(one)) as chunks:
                async for chunk in chunks:
                    queue.put_nowait((position * one.request.sampling.n + chunk.index, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(run(position, one)) for position, one in enumerate(prepared)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_disconnect(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run ``work``; cancel it when the client goes away."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, watching):
            task.cancel()
        results = await asyncio.gather(working, watching, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _read_json(request: Request, max_bytes: int) -> object:
    """The body as JSON; ``BodyTooLarge`` or ``InvalidRequest`` on field ``body``."""
    length = request.headers.get("content-length", "")
    too_large = length.isdigit() and int(length) > max_bytes
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise BodyTooLarge("body", f"has {length} bytes; at most {max_bytes} are taken")  # it was not sent yet
    body, num_bytes = bytearray(), 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > _MAX_DRAINED_BODIES * max_bytes:
            break
        if num_bytes <= max_bytes:
            body += chunk
        else:
            body.clear()
    if num_bytes > max_bytes:
        raise BodyTooLarge("body", f"has {length or 'too many'} bytes; at most {max_bytes} are taken")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise InvalidRequest("body", f"must be JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class _Objectives:
    """What a request's headers ask for; None: nothing."""

    slo: Slo
    priority: int | None


def _read_objectives(request: Request) -> _Objectives:
    """``x-slo-ttft-ms``, ``x-slo-tpot-ms`` and ``x-priority``; ``InvalidRequest`` naming the header."""
    headers = request.headers
    slo = Slo(*(_milliseconds(name, headers.get(name)) for name in ("x-slo-ttft-ms", "x-slo-tpot-ms")))
    given = headers.get("x-priority")
    if given is None:
        return _Objectives(slo, None)
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", given, re.ASCII) or abs(int(given)) > MAX_PRIORITY:
        raise InvalidRequest(
            "x-priority", f"must be an integer between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {given!r}"
        )
    return _Objectives(slo, int(given))


def _milliseconds(header: str, given: str | None) -> float | None:
    """Seconds."""
    if given is None:
        return None
    try:
        milliseconds = float(given)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise InvalidRequest(header, f"must be a number of milliseconds above 0, got {given!r}")
    return milliseconds / 1000


def _vendor(timings: Sequence[object]) -> dict[str, object]:
    return {"prfaas": {"timing": timings}}


def _worker_headers(finish: Finish | None) -> dict[str, str]:
    """Where the first choice was prefilled and decoded, for people with curl."""
    if finish is None or finish.timing is None:
        return {}
    prefill = finish.timing.prefill_worker or finish.timing.decode_worker or ""
    decode = finish.timing.decode_worker or finish.timing.prefill_worker or ""
    return {"x-prfaas-prefill-worker": prefill, "x-prfaas-decode-worker": decode}


def _status(error: PrfaasError) -> _Status:
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def _error_body(error: PrfaasError) -> dict[str, object]:
    status = _status(error)
    param = error.field if isinstance(error, InvalidRequest) else None
    body = openai_api.error_body(str(error), status.kind, param, status.name)
    if isinstance(error, Overloaded):
        body["prfaas"] = {
            "rejection": {
                "reason": error.reason,
                "predicted": error.predicted,
                "allowed": error.allowed,
                "retry_after_s": error.retry_after_s,
            }
        }
    return body


def _error_response(error: PrfaasError, api: _Api = _CHAT) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(retry_after(error))
        headers["x-prfaas-rejection"] = error.reason
    elif isinstance(error, NoRoute):
        headers["retry-after"] = str(_NO_ROUTE_RETRY_AFTER_S)
    status = _status(error).code
    return JSONResponse(api.error_body(status, _error_body(error)), status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the routes themselves (no such path, wrong method), in OpenAI's body."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = openai_api.error_body(message, "invalid_request_error", None, None)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


class _KeyGate:
    """Lets in who shows a key, and everybody to what only reads how the service is: GET outside /v1, but for the list
    of other clients' requests."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys.needed and _needs_key(scope["method"], scope["path"]):
            try:
                self._keys.check({name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]})
            except WrongKey as error:
                self._metrics.refuse(Door.HTTP, error)
                api = _MESSAGE if scope["path"].startswith("/v1/messages") else _CHAT
                response = _error_response(error, api)
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _needs_key(method: str, path: str) -> bool:
    return method not in ("GET", "HEAD") or path.startswith("/v1/") or path == REQUESTS_PATH


class _RequestIds:
    """Gives every answer an ``x-request-id``: the client's own if it is printable and short, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = 0 < len(given) <= _MAX_REQUEST_ID_CHARS and _REQUEST_ID_CHARS.issuperset(given)
        scope[_REQUEST_ID] = given if usable else uuid.uuid4().hex
        header = (b"x-request-id", scope[_REQUEST_ID].encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        await self._app(scope, receive, send_with_id)
