"""The gRPC edge of a decode worker, called as a method: what it makes of a message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import grpc
import pytest

from core.clock import VirtualClock
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, EngineId, PullTask, SamplingParams, SequenceId, SequenceSpec, WorkerId
from decode_worker.service import DecodeService
from kv_transfer.transport import PeerIdentity, SendOrder
from protos import wire
from protos import worker_pb2 as pb

TASK = PullTask(WorkerId("prefill-1"), ClusterId("here"), EngineId("engine"), "prefill:2", 8, 1.5)
SPEC = SequenceSpec(SequenceId("s"), (1, 2, 3), SamplingParams(seed=1))


class Context:
    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Aborted(code, details)


class Aborted(Exception):
    pass


class Worker:
    def __init__(self) -> None:
        self.decoded: list[tuple[Any, ...]] = []

    def decode(self, *arguments: Any) -> None:
        self.decoded.append(arguments)


def service(worker: Worker) -> DecodeService:
    identity = PeerIdentity(WorkerId("decode-0"), ClusterId("here"))
    fingerprint = CacheFingerprint("model", "revision", "float32", 16, "layout")
    return DecodeService(worker, identity, fingerprint, lambda gateway: True, VirtualClock())  # type: ignore[arg-type]


def request(**fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(gateway_id="gateway", sequence=wire.spec_to_message(SPEC), **fields)


async def test_what_is_to_be_pulled_comes_with_its_place_on_the_link() -> None:
    worker = Worker()
    told = request(pull=wire.pull_task_to_message(TASK), tenant="acme", deadline_s=2.5)

    await service(worker).Decode(told, Context())  # type: ignore[arg-type]

    wanted = replace(SPEC, first_token_by=2.5)
    assert worker.decoded == [(wanted, "gateway", None, SendOrder("acme", deadline_at=2.5), TASK)]


async def test_a_sequence_whose_kv_comes_under_a_session_pulls_nothing() -> None:
    worker = Worker()
    told = request(pull=wire.pull_task_to_message(TASK), session_id="session")

    with pytest.raises(Aborted, match="only a sequence without a session"):
        await service(worker).Decode(told, Context())  # type: ignore[arg-type]

    assert worker.decoded == []
