"""Which codec does a write get? The choice is pure; the owner of what it is made from measures the links.

    queued ──> demand: raw bytes/s that prefill makes, and what waits to be sent ──┐
    stats  ──> goodput of the link, bytes/s as on the wire                        ──┼──> choose_codec ──> codec, reason
           ──> cost of each codec: raw bytes/s that a thread encodes, ratio       ──┘

A codec carries ``min(threads * encode rate, goodput * ratio)`` raw bytes/s, raw carries the goodput. The first of the
allowed ones, in the order of what they lose, that carries the demand is taken; raw is first. Where none does it is the
one that carries most, if it is clearly more than now.

Hysteresis: one that loses more is left only when one that loses less would carry the demand with a reserve; a choice
stays for ``STAY_S`` at least. Under a codec the link may look slower than it is (encoding here or decoding there is
the limit, which the sender cannot tell apart), so every ``PROBE_S`` raw has a turn and the link is measured afresh.

Invariants: raw whenever nothing else is allowed, nothing was measured yet, or raw fits; equal inputs give equal
choices; every change is logged with its reason and counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from types import MappingProxyType

from core.clock import Clock
from core.request import ClusterId, WorkerId
from kv_transfer.codec import Codec, CodecUse, can_encode
from kv_transfer.link_estimate import RecentRate
from kv_transfer.transport import LayerPages, LinkStats, PeerIdentity, Write

logger = logging.getLogger(__name__)

FITS = 0.9  # share of what a codec carries that demand may take
FITS_AGAIN = 0.7  # the same for one that loses less than the current one
GAIN = 1.1  # how much more another one must carry when none fits
DRAIN_S = 2.0  # what waits to be sent is wanted within this time
DEMAND_WINDOW_S = 1.0
GOODPUT_WINDOW_S = 0.5  # seconds in which bytes were moving
MEASURED_S = 0.2  # of them make a measurement
STAY_S = 1.0
PROBE_S = 30.0
COST_MEMORY_S = 120.0  # an older cost is not believed: the machine may have been busy with something else
_COST_WINDOW_BYTES = 64 << 20
_MB = 1e6


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What encoding costs, over about the last ``_COST_WINDOW_BYTES`` of it; older bytes fade."""

    raw_bytes: float
    wire_bytes: float
    encode_s: float  # of one thread

    @property
    def encode_rate(self) -> float:
        """Raw bytes/s of one thread."""
        return self.raw_bytes / self.encode_s if self.encode_s > 0 else math.inf

    @property
    def ratio(self) -> float:
        """Raw bytes for each byte on the wire."""
        return self.raw_bytes / self.wire_bytes

    def add(self, raw_bytes: int, wire_bytes: int, encode_s: float) -> CodecCost:
        """With so much more encoded; what encoded nothing changes nothing."""
        if raw_bytes <= 0 or wire_bytes <= 0:
            return self
        kept = math.exp(-raw_bytes / _COST_WINDOW_BYTES)
        return CodecCost(
            self.raw_bytes * kept + raw_bytes,
            self.wire_bytes * kept + wire_bytes,
            self.encode_s * kept + max(0.0, encode_s),
        )


def _assume(encode_rate: float, ratio: float) -> CodecCost:
    num_bytes = float(1 << 20)  # little: the first real bytes outweigh it
    return CodecCost(num_bytes, num_bytes / ratio, num_bytes / encode_rate)


# Before any was used: bfloat16 keys and values of SmolLM2-135M on one core of the CPU that this was written on.
ASSUMED_COSTS: Mapping[Codec, CodecCost] = MappingProxyType(
    {Codec.LOSSLESS: _assume(0.4e9, 1.4), Codec.INT8: _assume(2.0e9, 1.98), Codec.FP8: _assume(1.3e9, 1.98)}
)


@dataclass(frozen=True, slots=True)
class CodecChoice:
    codec: Codec
    reason: str


def choose_codec(
    allowed: Collection[Codec],
    demand: float,
    goodput: float | None,
    costs: Mapping[Codec, CodecCost],
    encoders: int,
    current: Codec,
) -> CodecChoice:
    """The codec of the next writes on one link.

    demand: raw bytes/s to be carried. goodput: bytes/s that the link moves; None: not known. costs: of every allowed
    codec but raw. encoders: threads that encode for this link at once. current: what the last writes had.
    """
    others = sorted(set(allowed) - {Codec.RAW})
    if not others:
        return CodecChoice(Codec.RAW, "only raw is allowed")
    if goodput is None:
        return CodecChoice(Codec.RAW, "the link is to be measured with raw bytes")
    carried = {Codec.RAW: goodput}
    for codec in others:
        carried[codec] = min(encoders * costs[codec].encode_rate, goodput * costs[codec].ratio)
    wanted = f"{demand / _MB:.1f} MB/s are wanted, the link moves {goodput / _MB:.1f} MB/s"
    for codec, most in carried.items():
        if demand <= most * (FITS if codec >= current else FITS_AGAIN):
            return CodecChoice(codec, f"{wanted}: {codec.name.lower()} carries {most / _MB:.1f} MB/s, which fits")
    stay = current if current in carried else Codec.RAW
    best = max(carried, key=lambda codec: carried[codec])
    if carried[best] <= GAIN * carried[stay]:
        best = stay
    return CodecChoice(best, f"{wanted}: nothing fits, {best.name.lower()} carries {carried[best] / _MB:.1f} MB/s")


class CodecMeter:
    """What one link is asked for and what it does. Written by its owner alone, who locks."""

    def __init__(self) -> None:
        self._stats: LinkStats | None = None
        self._ticked_at: float | None = None
        self._queued_bytes = 0  # since the last tick
        self._made = RecentRate(DEMAND_WINDOW_S)
        self._goodput = RecentRate(GOODPUT_WINDOW_S)
        self._measured_s = 0.0
        self._costs: dict[Codec, tuple[CodecCost, float]] = {}  # codec |-> (cost, instant of its last use)

    @property
    def encoders(self) -> int:
        """Threads that encode for the link: each connection has one."""
        return max(1, self._stats.connections) if self._stats else 1

    @property
    def demand(self) -> float:
        """Raw bytes/s: what prefill makes, and what waits, spread over ``DRAIN_S``."""
        waiting = self._stats.bytes_queued if self._stats else 0
        return (self._made.rate or 0.0) + waiting / DRAIN_S

    @property
    def goodput(self) -> float | None:
        """Bytes/s on the wire while there was something to send; None: not measured, or not since ``forget``."""
        return self._goodput.rate if self._measured_s >= MEASURED_S else None

    def costs(self, now: float) -> Mapping[Codec, CodecCost]:
        """What is known, or else assumed, of every codec but raw."""
        fresh = {codec: cost for codec, (cost, used_at) in self._costs.items() if now - used_at <= COST_MEMORY_S}
        return {**ASSUMED_COSTS, **fresh}

    def forget_goodput(self) -> None:
        self._goodput, self._measured_s = RecentRate(GOODPUT_WINDOW_S), 0.0

    def queued(self, num_bytes: int) -> None:
        """Raw bytes were given to the link."""
        self._queued_bytes += num_bytes

    def tick(self, stats: LinkStats, now: float) -> None:
        """What the link counts now, several times a second. Counters that went back have begun anew."""
        before = self._stats
        if before is None or stats.bytes_sent < before.bytes_sent or stats.busy_s < before.busy_s:
            before = LinkStats(stats.peer, stats.path)
        if self._ticked_at is not None:
            self._made = self._made.add(self._queued_bytes, now - self._ticked_at)
            self._queued_bytes = 0
        num_bytes, busy_s = stats.bytes_sent - before.bytes_sent, stats.busy_s - before.busy_s
        if num_bytes > 0:
            self._goodput = self._goodput.add(num_bytes, busy_s)
            self._measured_s += busy_s
        earlier = {use.codec: use for use in before.encoded}
        for use in stats.encoded:
            self._add_cost(use, earlier.get(use.codec, CodecUse(use.codec, 0, 0, 0.0)), now)
        self._stats, self._ticked_at = stats, now

    def _add_cost(self, use: CodecUse, before: CodecUse, now: float) -> None:
        raw_bytes = use.raw_bytes - before.raw_bytes
        if raw_bytes <= 0:
            return
        cost, used_at = self._costs.get(use.codec, (ASSUMED_COSTS[use.codec], now))
        if now - used_at > COST_MEMORY_S:
            cost = ASSUMED_COSTS[use.codec]
        new = cost.add(raw_bytes, use.wire_bytes - before.wire_bytes, use.encode_s - before.encode_s)
        self._costs[use.codec] = (new, now)


@dataclass(frozen=True, slots=True)
class CodecState:
    """What the links to one worker use now, for status and metrics."""

    worker_id: WorkerId  # the receiving end
    choice: CodecChoice
    changes: Mapping[Codec, int]  # codec |-> times that it was changed to
    demand: float  # raw bytes/s
    goodput: float | None


@dataclass(slots=True)
class _Peer:
    allowed: tuple[Codec, ...]
    meter: CodecMeter = field(default_factory=CodecMeter)
    choice: CodecChoice = CodecChoice(Codec.RAW, "nothing was sent yet")
    chosen_at: float = -math.inf  # when the codec last changed
    changes: dict[Codec, int] = field(default_factory=dict)


class LinkCodecs:
    """The codec of the links to every worker. Sole writer of their choices; thread-safe, waits for nothing."""

    def __init__(self, clock: Clock, allowed: Callable[[ClusterId], Sequence[str]]) -> None:
        """``allowed``: the configured ``LinkConfig.codecs`` of links to a cluster."""
        self._clock = clock
        self._allowed = allowed
        self._lock = Lock()
        self._peers: dict[WorkerId, _Peer] = {}

    def tick(self, stats: Iterable[LinkStats]) -> None:
        """``Transport.stats()``, several times a second: measure, and choose. Workers with no link are forgotten."""
        now = self._clock.now()
        together: dict[WorkerId, LinkStats] = {}
        for link in stats:
            known = together.get(link.peer.worker_id)
            together[link.peer.worker_id] = link if known is None else _sum(known, link)
        with self._lock:
            self._peers = {worker_id: peer for worker_id, peer in self._peers.items() if worker_id in together}
            for worker_id, link in together.items():
                peer = self._peers.get(worker_id)
                if peer is None:
                    codecs = tuple(Codec[name.upper()] for name in self._allowed(link.peer.cluster_id))
                    peer = self._peers[worker_id] = _Peer(codecs)
                peer.meter.tick(link, now)
                self._choose(worker_id, peer, now)

    def codec_of_write(self, peer: PeerIdentity, layers: Sequence[LayerPages], write: Write) -> Codec:
        """``codec_for``, as a ``KvSender`` asks."""
        return self.codec_for(peer.worker_id, layers, write.table.rows[:, 2].tolist())

    def codec_for(self, worker_id: WorkerId, layers: Sequence[LayerPages], sizes: Sequence[int]) -> Codec:
        """The codec of a write of strips of ``sizes`` bytes of ``layers`` to a worker; and it is queued now.

        RAW where the layers or strips do not suit the chosen one (``codec.can_encode``).
        """
        with self._lock:
            peer = self._peers.get(worker_id)
            if peer is None or peer.allowed == (Codec.RAW,):
                return Codec.RAW
            peer.meter.queued(len(layers) * sum(sizes))
            codec = peer.choice.codec
        if codec is Codec.RAW:
            return codec
        first = layers[0]
        alike = all((layer.dtype, layer.block_bytes) == (first.dtype, first.block_bytes) for layer in layers)
        return codec if alike and can_encode(codec, first.dtype, first.block_bytes, sizes) else Codec.RAW

    def states(self) -> tuple[CodecState, ...]:
        """Every worker that there is a link to, by its id."""
        with self._lock:
            return tuple(
                CodecState(worker_id, peer.choice, dict(peer.changes), peer.meter.demand, peer.meter.goodput)
                for worker_id, peer in sorted(self._peers.items())
            )

    def _choose(self, worker_id: WorkerId, peer: _Peer, now: float) -> None:
        current = peer.choice.codec
        if now - peer.chosen_at < STAY_S:
            return
        if current is not Codec.RAW and now - peer.chosen_at >= PROBE_S:
            peer.meter.forget_goodput()
        meter = peer.meter
        choice = choose_codec(peer.allowed, meter.demand, meter.goodput, meter.costs(now), meter.encoders, current)
        peer.choice = choice
        if choice.codec is not current:
            peer.chosen_at = now
            peer.changes[choice.codec] = peer.changes.get(choice.codec, 0) + 1
            old, new = current.name.lower(), choice.codec.name.lower()
            logger.info("kv links to %s: codec %s after %s: %s", worker_id, new, old, choice.reason)


def _sum(one: LinkStats, other: LinkStats) -> LinkStats:
    """Two links to one worker as if they were one."""
    encoded: dict[Codec, CodecUse] = {use.codec: use for use in one.encoded}
    for use in other.encoded:
        had = encoded.get(use.codec, CodecUse(use.codec, 0, 0, 0.0))
        encoded[use.codec] = CodecUse(
            use.codec,
            had.raw_bytes + use.raw_bytes,
            had.wire_bytes + use.wire_bytes,
            had.encode_s + use.encode_s,
        )
    return replace(
        one,
        connections=one.connections + other.connections,
        bytes_sent=one.bytes_sent + other.bytes_sent,
        bytes_queued=one.bytes_queued + other.bytes_queued,
        busy_s=max(one.busy_s, other.busy_s),
        encoded=tuple(encoded.values()),
    )
