"""Two clusters: what the far one prefills, its loss under load, its return, its goodbye. Real processes, no Ray.

The near cluster has a gateway, a prefill and a decode worker; the far one is run by cluster/remote_cluster.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from cluster.certificates import Authority, write_files
from cluster.config import PoolConfig, ServiceConfig, TlsConfig
from cluster.internal_tls import IssueProof
from cluster.ray_fleet import worker_config
from cluster.remote_cluster import serve_async
from cluster.view import WorkerView
from core.credentials import Credentials
from core.request import Role, SamplingParams, WorkerId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig
from tests.cluster.live_cluster import Answer, LiveCluster, WorkerProcess, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = [pytest.mark.timeout(180), pytest.mark.parametrize("family", ["llama"])]

NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
# Small steps, so that a cluster that falls silent does so in the middle of prompts.
SLOW = EngineConfig(
    dtype="float32", page_size=16, num_pages=256, max_prefill_chunk=8, max_batch_tokens=16, max_batch_size=8, threads=1
)
FAR = WorkerId("far/prefill-0")
START_S, LEASE_AND_MORE_S = 60.0, 20.0
_TENANTS = count()


class ProcessFleet:
    """A fleet of plain processes."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self.workers: list[WorkerProcess] = []

    def join(self) -> str:
        return "127.0.0.1"

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        for index in range(self._config.prefill.count):
            worker_id = self._config.worker_id(Role.PREFILL, index)
            proof = issue_proof(worker_id)
            assert isinstance(proof, Credentials), "files that were given"
            told = worker_config(self._config, Role.PREFILL, worker_id, "127.0.0.1", registry, proof)
            self.workers.append(WorkerProcess.start(told))

    def check(self) -> None: ...

    def drain(self, timeout_s: float) -> bool:
        for worker in self.workers:
            worker.ask_to_stop()
        return all(worker.has_ended for worker in self.workers)

    def stop(self, timeout_s: float) -> None:
        for worker in self.workers:
            worker.stop()


@asynccontextmanager
async def joined(config: ServiceConfig) -> AsyncIterator[tuple[ProcessFleet, asyncio.Task[None]]]:
    """The far cluster, ready; ended whatever the test does."""
    fleet, ready = ProcessFleet(config), asyncio.Event()
    task = asyncio.create_task(serve_async(config, ready.set, lambda _: fleet))
    try:
        await asyncio.wait({task, asyncio.ensure_future(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert ready.is_set(), "the far cluster was not taken"
        yield fleet, task
    finally:
        task.cancel()
        await asyncio.wait({task})


def far_workers(cluster: LiveCluster) -> tuple[WorkerView, ...]:
    return tuple(worker for worker in cluster.membership.view().workers if worker.worker_id == FAR)


async def answers(cluster: LiveCluster, model: ReferenceModel, num_requests: int) -> list[Answer]:
    """So many requests at once, each with the tokens that the model gives alone. Of a tenant that nobody has cached
    anything of: a cached prompt is prefilled before anybody sees who has it."""
    prompts = [model.prompts[index % len(model.prompts)] for index in range(num_requests)]
    tenant = str(next(_TENANTS)).encode()
    given = await asyncio.gather(*(cluster.generate(prompt, GREEDY, tenant) for prompt in prompts))
    for prompt, answer in zip(prompts, given, strict=True):
        assert answer.tokens == model.expected(prompt, NUM_NEW)
    return given


async def loaded(cluster: LiveCluster, model: ReferenceModel) -> asyncio.Task[list[Answer]]:
    """Requests under way, some of which the far worker says that it has. It says so four times a second, and a quick
    machine may have computed them in between: then more follow."""
    for _ in range(10):
        load = asyncio.create_task(answers(cluster, model, 64))
        busy = asyncio.create_task(
            cluster.membership.wait_until(
                lambda view: any(w.worker_id == FAR and w.load.num_running for w in view.workers), START_S
            )
        )
        await asyncio.wait({load, busy}, return_when=asyncio.FIRST_COMPLETED)
        if busy.done() and busy.result():
            return load
        busy.cancel()
        await load
    raise AssertionError("the far worker was never seen with anything of ten loads")


async def prefills_far(cluster: LiveCluster, model: ReferenceModel) -> None:
    """Wait until requests are prefilled there: its links have to pass their self-tests first."""
    async with asyncio.timeout(LEASE_AND_MORE_S):
        while not any(answer.timing.prefill_worker == FAR for answer in await answers(cluster, model, 2)):
            await asyncio.sleep(0.05)


async def test_a_cluster_that_joins_is_used_lost_used_again_and_leaves_and_no_request_fails(
    family: str, tiny_model: ReferenceModel, tmp_path: Path
) -> None:
    authority = Authority.create("near and far")
    near, far = (write_files(tmp_path / name, authority.issue(name)) for name in ("near", "far"))
    async with live_cluster(
        str(tiny_model.folder),
        engine=SLOW,
        policy="round_robin",
        self_test=True,
        tls=TlsConfig("on", str(near.ca_file), str(near.cert_file), str(near.key_file)),
        kv_transfer=KvTransferConfig(lease_s=4.0),
    ) as cluster:
        config = ServiceConfig(
            model=str(tiny_model.folder),
            cluster_id="far",
            join=("127.0.0.1:1", cluster.registry),
            engine=SLOW,
            prefill=PoolConfig(count=1),
            decode=PoolConfig(count=0),
            kv_transfer=KvTransferConfig(lease_s=4.0),
            tls=TlsConfig("on", str(far.ca_file), str(far.cert_file), str(far.key_file)),
            log_level="warning",
        )
        async with joined(config) as (fleet, running):
            assert [(worker.cluster_id, worker.role) for worker in far_workers(cluster)] == [("far", Role.PREFILL)]
            await prefills_far(cluster, tiny_model)

            load = await loaded(cluster, tiny_model)
            fleet.workers[0].kill(signal.SIGSTOP)  # as a link that was cut: silence, and no connection that ends
            given = await load
            assert far_workers(cluster) == ()
            assert max(answer.timing.num_attempts for answer in given) > 1, "it fell silent too late to matter"
            near_only = await answers(cluster, tiny_model, 4)
            assert {answer.timing.prefill_worker for answer in near_only} == {"prefill-0"}

            fleet.workers[0].kill(signal.SIGCONT)
            await prefills_far(cluster, tiny_model)

            load = await loaded(cluster, tiny_model)
            os.kill(os.getpid(), signal.SIGTERM)
            assert FAR in {answer.timing.prefill_worker for answer in await load}, "what runs there is finished there"
            await asyncio.wait_for(running, LEASE_AND_MORE_S)
            assert far_workers(cluster) == ()
        await cluster.check_integrity()
