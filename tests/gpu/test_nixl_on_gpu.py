"""NIXL between the device memories of two processes. Skipped without NIXL and two GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.child_process import ChildProcess

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="there are no two GPUs here"
)
pytest.importorskip("nixl", reason="pip install 'prfaas[gpu]'")

POOL_PAGES = 600
TIMEOUT_S = 200.0
StartPair = Callable[..., tuple[ChildProcess, ChildProcess]]


@pytest.fixture
def start_pair() -> Iterator[StartPair]:
    started: list[ChildProcess] = []

    def start(**variables: str) -> tuple[ChildProcess, ChildProcess]:
        sender, receiver = (
            ChildProcess(list, "benchmarks.gpu_peer", (device, str(POOL_PAGES)), variables=variables)
            for device in ("cuda:0", "cuda:1")
        )
        started.extend((sender, receiver))
        sender.call("fill", timeout_s=TIMEOUT_S)
        for peer in (sender, receiver):
            peer.call("open", "nixl", 1, timeout_s=TIMEOUT_S)
        return sender, receiver

    yield start
    for process in started:
        process.close()


@pytest.mark.parametrize(("ucx_tls", "path"), [(None, "ucx:cuda_ipc"), ("tcp,cuda_copy", "ucx:tcp")])
def test_pages_arrive_byte_for_byte_over_the_path_that_is_named(
    start_pair: StartPair, ucx_tls: str | None, path: str
) -> None:
    sender, receiver = start_pair(**({} if ucx_tls is None else {"UCX_TLS": ucx_tls}))
    dice = random.Random(1)
    for number in range(3):
        num_pages = dice.randint(1, 512)
        src, dst = (tuple(dice.sample(range(POOL_PAGES), num_pages)) for _ in range(2))
        receiver.call("wipe", timeout_s=TIMEOUT_S)
        grant = receiver.call("expect", str(number), dst)
        moved = sender.call("move", str(number), src, grant, 0.0, timeout_s=TIMEOUT_S)
        assert receiver.call("count_wrong", src, dst, timeout_s=TIMEOUT_S) == 0
        assert moved.path == path
