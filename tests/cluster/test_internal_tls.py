"""Worker processes under mutual TLS: the same tokens, and no call for whoever has no certificate."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from cluster.certificates import Authority, write_files
from cluster.config import TlsConfig
from core.request import SamplingParams
from engine.config import EngineConfig
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = [pytest.mark.timeout(180), pytest.mark.parametrize("family", ["llama"])]

NUM_NEW = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
ENGINE = EngineConfig(dtype="float32", page_size=16, num_pages=128, max_batch_tokens=64, threads=1)
TIMEOUT_S = 10.0


async def describe(address: str, internal: InternalGrpc) -> str:
    async with internal.channel(address) as channel:
        reply = await rpc.WorkerStub(channel).Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        return str(reply.worker_id)


async def register(registry: str, internal: InternalGrpc) -> None:
    async with internal.channel(registry) as channel:
        request = pb.RegisterRequest(worker_id="x", engine_id="x", address="127.0.0.1:1", leaving=True)
        await rpc.RegistryStub(channel).Register(request, timeout=TIMEOUT_S)


async def generates_the_models_tokens(cluster: LiveCluster, model: ReferenceModel, prompt: int) -> bool:
    answer = await cluster.generate(model.prompts[prompt], GREEDY)
    assert (answer.timing.prefill_worker, answer.timing.decode_worker) == ("prefill-0", "decode-0")
    assert answer.timing.bytes_shipped > 0
    return answer.tokens == model.expected(model.prompts[prompt], NUM_NEW)


async def test_processes_with_certificates_of_the_run_give_the_same_tokens_and_let_no_stranger_in(
    family: str, tiny_model: ReferenceModel, tmp_path: Path
) -> None:
    tls = TlsConfig(mode="on")
    foreign = write_files(tmp_path / "foreign", Authority.create("test").issue("worker"))
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, processes=True, tls=tls) as cluster:
        assert await generates_the_models_tokens(cluster, tiny_model, -1)

        for intruder in (InternalGrpc(None), InternalGrpc(foreign)):
            for worker in cluster.membership.view().workers:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await describe(worker.address, intruder)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await register(cluster.registry, intruder)
        await register(cluster.registry, cluster.internal)

        assert await generates_the_models_tokens(cluster, tiny_model, -2)


async def test_an_authority_is_replaced_while_the_service_runs(
    family: str, tiny_model: ReferenceModel, tmp_path: Path
) -> None:
    """The rotation of docs/security.md: trust both, change the certificates, trust the new one alone."""
    old, new = Authority.create("old"), Authority.create("new")
    held = write_files(tmp_path / "held", old.issue("service"))
    early = write_files(tmp_path / "early", old.issue("early"))
    late = write_files(tmp_path / "late", new.issue("late"))
    tls = TlsConfig(ca_file=str(held.ca_file), cert_file=str(held.cert_file), key_file=str(held.key_file))
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, tls=tls) as cluster:
        worker = cluster.membership.view().workers[0]
        assert await generates_the_models_tokens(cluster, tiny_model, -1)
        both = early.ca_file.read_bytes() + late.ca_file.read_bytes()
        renewed = new.issue("service")
        for content, path in (
            (both, held.ca_file),
            (renewed.cert, held.cert_file),  # for a moment, not with its key
            (renewed.key, held.key_file),
            (renewed.ca, held.ca_file),
        ):
            replace(path, content)
            assert await describe(worker.address, cluster.internal) == worker.worker_id

        assert await describe(worker.address, InternalGrpc(late)) == worker.worker_id
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await describe(worker.address, InternalGrpc(early))
        assert await generates_the_models_tokens(cluster, tiny_model, -2)


def replace(path: Path, content: bytes) -> None:
    """In one move, as an operator's tool does it."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
