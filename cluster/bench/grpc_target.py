"""How is a prfaas endpoint asked over gRPC? ``prfaas.v1.Generation`` (protos/serving.proto), prompts as token ids."""

from __future__ import annotations

import grpc

from cluster.bench.client_record import TOKEN_IDS
from cluster.bench.target import Ask, EndpointFailed, Facts, Reply, Stopwatch, Target
from cluster.message_json import as_dict
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

_ASK_TIMEOUT_S = 10.0
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


class GrpcTarget(Target):
    """One service over one channel."""

    def __init__(self, address: str, ignore_eos: bool = True, model: str | None = None) -> None:
        """``model``: the name that requests carry; None: whatever is served."""
        self._address = address
        self._ignore_eos = ignore_eos
        self._model = model or ""
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> Facts:
        self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        self._stub = rpc.GenerationStub(self._channel)
        try:
            info = await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise EndpointFailed(f"{self._address}: {error.code().name}: {error.details()}") from error
        return Facts(
            model=self._model or info.model,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            ignore_eos=self._ignore_eos,
        )

    def prepare(self, ask: Ask) -> pb.GenerateRequest:
        ids = [part for part in ask.prompt if isinstance(part, int)]
        assert len(ids) == len(ask.prompt), "over gRPC prompts are token ids"
        return pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=ids),
            model=self._model,
            sampling_params=pb.SamplingParams(
                max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=self._ignore_eos
            ),
        )

    async def send(self, prepared: pb.GenerateRequest, watch: Stopwatch) -> Reply:
        complete: pb.GenerateComplete | None = None
        watch.send()
        try:
            async for response in self._stub.Generate(prepared):
                if response.WhichOneof("response") == "complete":
                    complete = response.complete
                    watch.end()
                elif response.chunk.token_ids:
                    watch.chunk()
        except grpc.aio.AioRpcError as error:
            watch.end()
            return Reply(error=error.code().name.lower(), error_message=error.details())
        if complete is None or not watch.chunk_at:
            return Reply(error="stream_ended", error_message="the stream ended without an answer")
        return Reply(
            text=complete.text,
            token_ids=tuple(complete.output_ids),
            output_tokens=len(complete.output_ids),
            counted_by=TOKEN_IDS,
            prompt_tokens=complete.usage.prompt_tokens,
            cached_tokens=complete.usage.cached_tokens,
            finish_reason=complete.finish_reason,
            timing=as_dict(complete.timing),
        )

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
