"""A worker without a model, in a process of its own, for measuring what is in front of it: tokens at a set rate.

    python -m benchmarks.stand_in_worker REGISTRY MODEL_FOLDER

It speaks protos/worker.proto as a decode worker that prefills by itself, with the streams and messages of the real one
(cluster/output_streams.py). Sequences wait until as many are there as ``Emission.num_sequences`` says; from then on it
works in steps, as an engine does: each gives every sequence one token. Steps are due at fixed instants, so a step that
was late is made up for. Tokens are whole words of the model's vocabulary: each has a text.

What is to be emitted is in the prompts' first tokens (``Emission``), and a prompt's fifth is its client's number. When
all sequences have ended, the instants of the steps (CLOCK_MONOTONIC, which all processes of a machine share) are
printed as one line of JSON: token k of every sequence was emitted in step k.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer

from benchmarks.orderly_exit import end_with_parent
from cluster.bench.prompts import WORDS
from cluster.output_streams import OutputStreams
from cluster.registration import Registrations
from core.request import (
    EngineId,
    FinishReason,
    GatewayId,
    Role,
    SequenceId,
    StageStats,
    TokenChunk,
    WorkerId,
)
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

_MAX_MODEL_LEN = 1 << 20
_BASE = 1 << 15  # numbers in prompts are written in digits of this base, which any vocabulary has


@dataclass(frozen=True)
class Emission:
    """What a prompt asks of the stand-in: steps of ``step_us``, once ``num_sequences`` are there."""

    num_sequences: int
    step_us: int
    client: int

    def prompt(self) -> list[int]:
        """As token ids, each below 2**15."""
        return [*divmod(self.num_sequences, _BASE), *divmod(self.step_us, _BASE), self.client]

    @classmethod
    def of(cls, prompt: list[int]) -> Emission:
        high, low, slow, fast, client = prompt
        return cls(high * _BASE + low, slow * _BASE + fast, client)


class StandInWorker(rpc.WorkerServicer, rpc.DecodeServicer):
    """One worker. Everything happens on one event loop."""

    def __init__(self, words: list[int], vocab_size: int) -> None:
        self._words = words
        self._vocab_size = vocab_size
        self._streams = OutputStreams(asyncio.get_running_loop(), lambda gateway: None)
        self._waiting: list[tuple[GatewayId, SequenceId, int]] = []  # with their numbers of tokens
        self._steps: set[asyncio.Task[None]] = set()
        self.worker_id, self.engine_id = WorkerId("stand-in"), EngineId(f"stand-in-{os.getpid()}")
        self.address = ""

    # ---- Worker ----

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.WorkerDescription:  # noqa: N802
        return pb.WorkerDescription(
            worker_id=self.worker_id,
            engine_id=self.engine_id,
            cluster_id="local",
            address=self.address,
            fingerprint=pb.Fingerprint(model="stand-in", revision="1", dtype="none", page_size=16, layout="none"),
            architecture="StandIn",
            max_model_len=_MAX_MODEL_LEN,
            vocab_size=self._vocab_size,
            kv_bytes_per_token=1,
            num_layers=1,
            transport="tcp",
            pages_total=1 << 24,
            max_batch_size=1 << 16,
        )

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerState]:  # noqa: N802
        while True:
            yield pb.WorkerState(engine_id=self.engine_id, role=Role.DECODE.value, pages_free=1 << 24)
            await asyncio.sleep(request.interval_s)

    async def Outputs(self, request: pb.OutputsRequest, context: Any) -> AsyncIterator[pb.OutputBatch]:  # noqa: N802
        async for batch in self._streams.read(GatewayId(request.gateway_id)):
            yield batch

    # ---- Decode ----

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeReply:  # noqa: N802
        sequence = request.sequence
        emission = Emission.of(list(sequence.prompt_token_ids))
        self._waiting.append(
            (GatewayId(request.gateway_id), SequenceId(sequence.sequence_id), sequence.sampling.max_tokens)
        )
        if len(self._waiting) == emission.num_sequences:
            sequences, self._waiting = self._waiting, []
            running = asyncio.create_task(self._emit(sequences, emission.step_us * 1e-6))
            self._steps.add(running)
            running.add_done_callback(self._steps.discard)
        return pb.DecodeReply()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:  # noqa: N802
        return pb.AbortReply()

    async def _emit(self, sequences: list[tuple[GatewayId, SequenceId, int]], step_s: float) -> None:
        num_steps = sequences[0][2]
        emitted: list[float] = []
        stats = StageStats(self.worker_id, Role.DECODE)
        begun_at = time.monotonic() + 0.2
        for step in range(num_steps):
            left = begun_at + step * step_s - time.monotonic()
            await asyncio.sleep(max(0.0, left))
            tokens, last = (self._words[step % len(self._words)],), step + 1 == num_steps
            emitted.append(time.monotonic())
            for gateway_id, sequence_id, _ in sequences:
                chunk = TokenChunk(sequence_id, step, tokens)
                if last:
                    chunk = chunk._replace(finish_reason=FinishReason.LENGTH, stats=stats)
                self._streams.publish(gateway_id, chunk)
        print(json.dumps(emitted), flush=True)


async def _serve(registry: str, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [ids[0] for word in WORDS if len(ids := tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1]
    worker = StandInWorker(words, tokenizer.get_vocab_size())
    server = grpc.aio.server()
    rpc.add_WorkerServicer_to_server(worker, server)
    rpc.add_DecodeServicer_to_server(worker, server)
    internal = InternalGrpc(None)
    worker.address = f"127.0.0.1:{internal.listen(server, '127.0.0.1:0')}"
    await server.start()
    await Registrations(worker.worker_id, worker.engine_id, worker.address, [registry], internal).keep()


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
