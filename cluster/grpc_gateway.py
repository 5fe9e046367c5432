"""The gRPC door: ``prfaas.v1.Generation`` (protos/serving.proto), ``grpc.health.v1`` and reflection.

Carries messages between clients and ``generation``, which does everything else; what they mean is in grpc_messages.py.
- Errors become statuses in one table, ``_STATUS``; the details of INVALID_ARGUMENT begin with the field's name.
- The client's deadline becomes the request's; a client that cancels or goes away cancels the handler, which closes
  the stream and so frees both pools. Handlers write instead of yielding for that: a generator that is suspended in
  a ``yield`` is not closed when its call is cancelled.
- Health is SERVING exactly while a request could be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.api_keys import ApiKeys
from cluster.cluster_info import (
    cluster_link_info,
    cost_info,
    link_check,
    link_info,
    offload_info,
    plan_info,
    pool_info,
    worker_info,
)
from cluster.cluster_links import by_cluster_pair
from cluster.config import ServiceConfig
from cluster.cost_model import cost_lines
from cluster.finished_requests import RecentRequests
from cluster.front_door import (
    ClusterMembership,
    Door,
    FleetPlanner,
    LinkTests,
    RequestRouter,
    not_ready_reason,
    retry_after,
)
from cluster.generation import Generation, TextRequest
from cluster.grpc_messages import (
    STRUCTURED_OUTPUT,
    answer_messages,
    default_sampling,
    parse_prompt,
    parse_request_id,
    parse_sampling,
)
from cluster.internal_tls import TlsDecision
from cluster.request_info import recent_request
from cluster.sampling_defaults import left_open
from cluster.version import version
from core.clock import Clock
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
from core.request import RequestId, Role, Slo
from core.tracing import TraceContext
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from protos.trace_metadata import trace_of

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Generation"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]

# The error tree as statuses: the first line that fits is taken, so narrow errors stand before wide ones.
_STATUS: tuple[tuple[type[PrfaasError], grpc.StatusCode], ...] = (
    (WrongKey, grpc.StatusCode.UNAUTHENTICATED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NoRoute, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    (SequenceFailed, grpc.StatusCode.INTERNAL),
    (TransferError, grpc.StatusCode.UNAVAILABLE),
    (PrfaasError, grpc.StatusCode.INTERNAL),
)
# gRPC itself refuses larger messages without saying what was too large, so its own limit is only the last defence.
_TRANSPORT_LIMIT_FACTOR = 4
_HEALTH_INTERVAL_S = 0.2
_SAMPLING_FIELDS = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)


class GrpcGateway:
    """The gRPC server of one gateway process."""

    def __init__(
        self,
        generation: Generation,
        router: RequestRouter,
        membership: ClusterMembership,
        links: LinkTests,
        planner: FleetPlanner,
        config: ServiceConfig,
        clock: Clock,
        internal_tls: TlsDecision,
        requests: RecentRequests,
    ) -> None:
        self._membership = membership
        self._config = config.grpc
        self._generation = generation
        self._keys = ApiKeys(config.api_keys_file)
        self._servicer = GenerationServicer(
            generation, router, membership, links, planner, config, clock, internal_tls, requests
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        self._server: grpc.aio.Server | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The bound port, which the configuration may have left open (0)."""
        assert self._port is not None, "started first"
        return self._port

    def cluster_info(self) -> pb.GetClusterInfoResponse:
        """What ``GetClusterInfo`` answers, for the other door."""
        return self._servicer.cluster_info()

    def recent_requests(self, limit: int) -> pb.GetRecentRequestsResponse:
        """What ``GetRecentRequests`` answers, likewise."""
        return self._servicer.recent_requests(limit)

    async def start(self) -> None:
        """Bind and serve; ``InvalidConfig`` if the address cannot be had."""
        server = grpc.aio.server(
            interceptors=(_KeyGate(self._keys, self._generation),),
            options=(
                ("grpc.max_receive_message_length", _TRANSPORT_LIMIT_FACTOR * self._config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # else a second service on the same port would silently share it
            ),
        )
        rpc.add_GenerationServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            self._port = server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise InvalidConfig("grpc.port", f"cannot listen on {host}:{self._config.port}: {error}") from error
        await self._publish_health()
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._keep_health())

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let running ones end for ``grace_s``, then cancel them."""
        if self._health_task is not None:
            self._health_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_task
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _keep_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            await self._publish_health()

    async def _publish_health(self) -> None:
        ready = not_ready_reason(self._membership) is None
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


class _KeyGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets in who shows a key; health and reflection need none."""

    def __init__(self, keys: ApiKeys, generation: Generation) -> None:
        self._keys = keys
        self._generation = generation

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE_NAME}/"):
            return handler
        try:
            self._keys.check({name: text for name, text in handler_call_details.invocation_metadata if _is_text(text)})
        except WrongKey as error:
            self._generation.refuse(Door.GRPC, error)
            return _refusing(handler, error)
        return handler


def _is_text(value: str | bytes) -> bool:
    return isinstance(value, str)


def _refusing(handler: Any, error: WrongKey) -> Any:
    """A handler of the same kind that ends each call with ``error``."""

    async def refuse(request: object, context: _Context) -> None:
        async with _errors_as_statuses(context):
            raise error

    types = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse, **types)
    return grpc.unary_unary_rpc_method_handler(refuse, **types)


class GenerationServicer(rpc.GenerationServicer):
    """The methods of ``prfaas.v1.Generation``."""

    def __init__(
        self,
        generation: Generation,
        router: RequestRouter,
        membership: ClusterMembership,
        links: LinkTests,
        planner: FleetPlanner,
        config: ServiceConfig,
        clock: Clock,
        internal_tls: TlsDecision,
        requests: RecentRequests,
    ) -> None:
        self._planner = planner
        self._generation = generation
        self._router = router
        self._membership = membership
        self._links = links
        self._config = config
        self._clock = clock
        self._internal_tls = internal_tls
        self._requests = requests
        self._started_at = clock.now()

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> None:  # noqa: N802
        """Stream chunks and one final message per continuation."""
        async with _errors_as_statuses(context):
            try:
                text_request = self._parse(request, context.time_remaining(), trace_of(context.invocation_metadata()))
            except PrfaasError as error:
                self._generation.refuse(Door.GRPC, error)
                raise
            prepared = await self._generation.prepare(text_request)
            async with aclosing(self._generation.stream(prepared)) as chunks:
                async for chunk in chunks:
                    for message in answer_messages(prepared, chunk):
                        await context.write(message)

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:  # noqa: N802
        """Token ids of a text, or of a chat in the model's template."""
        async with _errors_as_statuses(context):
            self._check_size(request)
            prompt, field = parse_prompt(request)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await self._generation.tokenize(prompt, field=field, add_special_tokens=special)
            limit = self._generation.model().max_model_len
            return pb.TokenizeResponse(token_ids=token_ids, count=len(token_ids), max_model_len=limit)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:  # noqa: N802
        """The text of token ids, special tokens included."""
        async with _errors_as_statuses(context):
            self._check_size(request)
            return pb.DetokenizeResponse(text=self._generation.detokenize(request.token_ids, field="token_ids"))

    async def GetModelInfo(self, _: pb.GetModelInfoRequest, context: _Context) -> pb.GetModelInfoResponse:  # noqa: N802
        """What is served."""
        async with _errors_as_statuses(context):
            model = self._generation.model()
            return pb.GetModelInfoResponse(
                model=self._config.model_name,
                model_source=self._config.model,
                architecture=model.architecture,
                revision=model.fingerprint.revision,
                dtype=model.fingerprint.dtype,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                page_size=model.fingerprint.page_size,
                eos_token_ids=model.eos_token_ids,
                kv_bytes_per_token=model.kv_bytes_per_token,
                has_chat_template=self._generation.has_chat_template,
                default_sampling=default_sampling(self._generation.sampling_defaults),
            )

    async def GetClusterInfo(self, _: pb.GetClusterInfoRequest, context: _Context) -> pb.GetClusterInfoResponse:  # noqa: N802
        """Every live worker, every link between them, what the router counts and what the planner aims at."""
        async with _errors_as_statuses(context):
            return self.cluster_info()

    def cluster_info(self) -> pb.GetClusterInfoResponse:
        """The same, for whoever is in this process."""
        counters = self._router.counters
        now, view = self._clock.now(), self._membership.view()
        pairs = by_cluster_pair(view, self._config.kv_transfer.capacity)
        return pb.GetClusterInfoResponse(
            workers=[worker_info(worker, now) for worker in view.workers],
            num_inflight=self._router.num_inflight,
            policy=self._config.router.policy,
            internal_tls=str(self._internal_tls),
            uptime_s=now - self._started_at,
            version=version(),
            model=self._config.model_name,
            num_requests=counters.num_requests,
            num_retries=counters.num_retries,
            num_resumes=counters.num_resumes,
            num_queued=counters.admission.num_queued,
            refusals=counters.admission.refusals_by_reason,
            misses_served=counters.admission.misses_served_by_reason,
            links=[link_info(link, now) for link in view.links.values()],
            cluster_links=[cluster_link_info(pair) for pair in pairs],
            costs=[cost_info(line) for line in cost_lines(view.costs)],
            offload=offload_info(view.offload),
            routes_by_place=counters.routes_by_place,
            fallbacks_by_reason=counters.fallbacks_by_reason,
            plan=plan_info(self._planner.status, now),
        )

    async def ScalePool(self, request: pb.ScalePoolRequest, context: _Context) -> pb.ScalePoolResponse:  # noqa: N802
        """Hold an elastic pool at a size, or let it follow the load again."""
        async with _errors_as_statuses(context):
            if request.pool not in tuple(Role):
                raise InvalidRequest("pool", f"must be one of {', '.join(Role)}, got {request.pool!r}")
            role = Role(request.pool)
            answer = self._planner.scale(role, request.replicas if request.HasField("replicas") else None)
            pool = pool_info(self._planner.status, role, self._clock.now())
            return pb.ScalePoolResponse(answer=answer, pool=pool)

    async def GetRecentRequests(  # noqa: N802
        self, request: pb.GetRecentRequestsRequest, context: _Context
    ) -> pb.GetRecentRequestsResponse:
        """The latest requests that have ended, and where their seconds went."""
        async with _errors_as_statuses(context):
            return self.recent_requests(request.limit)

    def recent_requests(self, limit: int) -> pb.GetRecentRequestsResponse:
        """The same, for whoever is in this process."""
        now = self._clock.now()
        return pb.GetRecentRequestsResponse(
            requests=[recent_request(record, now) for record in self._requests.latest(limit)]
        )

    async def CheckLinks(self, _: pb.CheckLinksRequest, context: _Context) -> None:  # noqa: N802
        """Test every link now; one message for each, as its test ends."""
        async with _errors_as_statuses(context):
            async for result in self._links.test_all():
                await context.write(link_check(result))

    async def Abort(self, request: pb.AbortRequest, _: _Context) -> pb.AbortResponse:  # noqa: N802
        """End a running request by its id."""
        return pb.AbortResponse(found=self._router.abort(RequestId(request.request_id)))

    def _parse(
        self, request: pb.GenerateRequest, time_remaining_s: float | None, trace_parent: TraceContext | None
    ) -> TextRequest:
        self._check_size(request)
        prompt, field = parse_prompt(request)
        now = self._clock.now()
        return TextRequest(
            request_id=parse_request_id(request.request_id),
            door=Door.GRPC,
            prompt=prompt,
            prompt_field=field,
            sampling=parse_sampling(request.sampling_params),
            arrived_at=now,
            left_open=left_open([field.name for field, _ in request.sampling_params.ListFields()]),
            model=request.model or None,
            salt=request.cache_salt.encode(),
            deadline_at=None if time_remaining_s is None else now + time_remaining_s,
            slo=Slo(
                ttft_s=request.slo_ttft_s if request.HasField("slo_ttft_s") else None,
                tpot_s=request.slo_tpot_s if request.HasField("slo_tpot_s") else None,
            ),
            priority=request.priority,
            trace_parent=trace_parent,
        )

    def _check_size(self, request: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest) -> None:
        size, limit = request.ByteSize(), self._config.grpc.max_message_bytes
        if size > limit:
            fields = {field.name: getattr(request, field.name) for field, _ in request.ListFields()}
            largest = max(fields, key=lambda name: len(str(fields[name])))
            raise InvalidRequest(largest, f"makes a message of {size} bytes; at most {limit} are taken")


@asynccontextmanager
async def _errors_as_statuses(context: _Context) -> AsyncIterator[None]:
    """The one place where the error tree becomes gRPC statuses."""
    try:
        yield
    except PrfaasError as error:
        if isinstance(error, Overloaded):
            pushback_ms = str(round(error.retry_after_s * 1000))
            context.set_trailing_metadata(
                (
                    ("grpc-retry-pushback-ms", pushback_ms),
                    ("retry-after", str(retry_after(error))),
                    ("x-prfaas-rejection", error.reason),
                )
            )
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        await context.abort(status, _details(error))
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("a gRPC call failed for a reason that is ours")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error, see the gateway's log")


def _details(error: PrfaasError) -> str:
    """The error in words, with the client's name for a sampling field."""
    if isinstance(error, InvalidRequest) and error.field == "grammar":
        return f"{STRUCTURED_OUTPUT}: {error.message}"
    if isinstance(error, InvalidRequest) and error.field in _SAMPLING_FIELDS:
        return f"sampling_params.{error}"
    return str(error)
