"""One rank of a worker that is not its first: the process that holds a slice of the model and the K/V of its heads.

    main thread     RankFollower computes each step that rank 0 sends, one after the other
    line's thread   what rank 0 says: steps are queued, hand-overs are done at once
    transport       KvSender and KvReceiver of this rank move its pages, to and from ranks of other workers
    one more        leases, and what the transport counts, told to rank 0 every quarter second

It has no scheduler, no gRPC server and no name in any registry. Invariant: it does not outlive rank 0. When its line
breaks, or when anything here fails, the process ends at once, whatever a collective waits for.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import queue
import shutil
import threading
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from cluster.config import WorkerConfig
from cluster.log_format import configure_logging
from cluster.rank_processes import STOP_WAIT_S, RankCounts, RankFailed, RankProcess, RankReady, RankTask, StopRank
from core.clock import Clock, WallClock
from core.errors import PrfaasError, RankLost
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvEnd
from core.rank_channel import RankChannel
from engine.model_loader import device_of
from engine.page_pool import PagePool
from engine.rank_follower import RankFollower
from engine.rank_group import RankGroup, visible_gpus
from engine.rank_steps import RankStep
from kv_transfer.codec_policy import LinkCodecs
from kv_transfer.link_monitor import TICK_S
from kv_transfer.probe_pages import RankPages
from kv_transfer.rank_receiver import RankReceiving
from kv_transfer.rank_sender import RankSending
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender, StoredPages
from kv_transfer.staging_device import DeviceRegion
from kv_transfer.transport import (
    LayerPages,
    PageGeometry,
    PeerIdentity,
    Region,
    Transport,
    create_transport,
)

logger = logging.getLogger(__name__)

# A rank that computes something else, or nothing, is found out after so long; one that has died at once.
COLLECTIVE_TIMEOUT_S = 300.0
EXIT_RANK_ENDED = 71


def region_of(pool: PagePool) -> Region:
    """A pool as the transport sees it."""
    layout = pool.layout
    layers = range(layout.num_layers)
    pages = (LayerPages(layout.page_bytes(i), layout.layers[i].dtype, layout.block_bytes(i)) for i in layers)
    geometry = PageGeometry(tuple(pages), pool.num_pages)
    if pool.device.type == "cpu":
        return Region(geometry, tuple(pool.layer_bytes(i) for i in layers))
    return DeviceRegion(geometry, tuple(pool.pages(i) for i in layers))


def open_transport(config: WorkerConfig, fingerprint: CacheFingerprint, pool: PagePool, clock: Clock) -> Transport:
    """What one rank of a worker, the first or another, moves pages of its pool with."""
    kv_transfer = replace(config.kv_transfer, host=config.kv_transfer.host or config.host)
    identity = PeerIdentity(config.worker_id, config.cluster_id)
    transport = create_transport(kv_transfer, fingerprint, clock, identity, config.credentials)
    transport.register(region_of(pool))
    return transport


def start_process(task: RankTask) -> RankProcess:
    """A rank as a process of this host, which sees of this one's GPUs the one at its rank.

    On CPU it is forked, which saves loading torch: from this process if it has no thread yet, else from one that is
    made for that. A GPU's driver forbids it.
    """
    context: Any
    visible = None if task.config.engine.device == "cpu" else visible_gpus(task.size)
    if visible is not None:
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "forkserver")
        context.set_forkserver_preload([__name__])
    name = f"{task.config.worker_id}-rank-{task.rank}"
    own = None if visible is None else visible[task.rank]
    process = context.Process(target=_serve, args=(task, own), name=name, daemon=True)
    process.start()
    started: RankProcess = process
    return started


def _serve(task: RankTask, visible_device: str | None) -> None:
    if visible_device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device  # before the driver is asked for anything
    serve_rank(task)


def serve_rank(task: RankTask) -> None:
    """Be a rank until rank 0 says stop or is gone. Ends the process if anything fails."""
    config = task.config
    configure_logging(config.log_level, config.log_format, config.log_requests, f"{config.worker_id}/{task.rank}")
    connection = Client(task.address, "AF_UNIX", authkey=task.secret)
    connection.send(task.rank)
    ended = threading.Event()
    folder = Path(task.meeting).parent

    def lost(error: RankLost) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # rank 0 cannot any more
        _end(error, ended.is_set())

    channel = RankChannel(connection, f"rank 0 of {config.worker_id}", lost)
    try:
        _RankHost(task, channel, ended).run()
        channel.join(STOP_WAIT_S)
    except Exception as error:  # rank 0 waits for this rank in a collective: it must hear of it in another way
        logger.critical("rank %d of %s ends", task.rank, config.worker_id, exc_info=error)
        told = error if isinstance(error, PrfaasError) else RankLost(f"{type(error).__name__}: {error}")
        channel.send(RankFailed(told))
        os._exit(EXIT_RANK_ENDED)


def _end(error: RankLost, was_asked: bool) -> None:
    """Rank 0 is gone; ``was_asked``: it said so."""
    if was_asked:
        os._exit(0)
    logger.warning("%s: this rank ends", error)
    os._exit(EXIT_RANK_ENDED)


class _RankHost:
    """Owns everything in the process."""

    def __init__(self, task: RankTask, channel: RankChannel, ended: threading.Event) -> None:
        """``ended`` is set when rank 0 asks for the end."""
        self._task = task
        self._channel = channel
        self._steps: queue.SimpleQueue[tuple[RankStep, tuple[StoredPages, ...]] | None] = queue.SimpleQueue()
        self._ended = ended

    def run(self) -> None:
        task, config, channel = self._task, self._task.config, self._channel
        sending, receiving = RankSending(channel), RankReceiving(channel)
        channel.hear(RankStep, lambda step: self._steps.put((step, sending.take_stores())))
        channel.start()  # before ``RankReady`` rank 0 may try steps out, and the line may break
        group = RankGroup.join(task.rank, task.size, Path(task.meeting), device_of(config.engine), COLLECTIVE_TIMEOUT_S)
        follower = RankFollower.load_model(config.engine, config.model, group, cache_dir=config.model_cache_dir)
        gc.collect()
        gc.freeze()
        layout, clock = follower.layout.kv_layout(), WallClock()
        kv_transfer = config.kv_transfer
        transport = open_transport(config, follower.fingerprint, follower.pool, clock)
        codecs = LinkCodecs(clock, lambda to_cluster: kv_transfer.link(config.cluster_id, to_cluster).codecs)
        codec_for = codecs.codec_of_write if kv_transfer.may_encode else None
        sender = KvSender(transport, clock, sending.closed, layout, sending.link_speed, codec_for)
        receiver = KvReceiver(
            transport, clock, receiving.committed, receiving.released, kv_transfer.lease_s, layout, task.rank
        )
        sending.attach(sender)
        receiving.attach(receiver)
        RankPages(transport.region, layout, task.rank).serve(channel)
        channel.hear(StopRank, lambda _: self._close(sender, receiver, transport))
        threading.Thread(
            target=self._tick, args=(transport, sender, receiver, codecs), name="rank-ticks", daemon=True
        ).start()
        channel.send(RankReady(KvEnd(layout, transport.describe())))
        while (step_and_stores := self._steps.get()) is not None:
            step, stores = step_and_stores
            follower.compute(step, sending.step_stores(stores))
            sending.step_ended(stores)

    def _close(self, sender: KvSender, receiver: KvReceiver, transport: Transport) -> None:
        """On the line's thread; the answer leaves when it has returned, and then the process ends."""
        self._ended.set()
        sender.close()
        receiver.close()
        transport.close()
        self._steps.put(None)

    def _tick(self, transport: Transport, sender: KvSender, receiver: KvReceiver, codecs: LinkCodecs) -> None:
        clock = WallClock()
        while not self._ended.wait(TICK_S):
            sender.expire(clock.now())
            receiver.expire(clock.now())
            stats = transport.stats()
            codecs.tick(stats)
            try:
                self._channel.send(
                    RankCounts(stats, sender.bytes_sent, receiver.bytes_received, receiver.num_quarantined)
                )
            except RankLost:
                return  # the line's thread ends the process
