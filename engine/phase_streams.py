"""On which streams, and on which multiprocessors, are prompts and decoding computed?

One stream, in turns; or, with ``engine.colocated_mode: partitioned`` on a GPU, two at the same time. Then decoding has
a stream of higher priority and may use whatever is free, and prompts run on one of some *partitions*: streams that are
bound to a part of the multiprocessors (CUDA's green contexts), so that the rest always is decoding's. The partition is
chosen for each step of prompts (colocated_mode.py). Where the driver makes no green contexts there is one partition,
the whole device, and ``reason`` says why.

Decoding's stream is made the current one of the engine's thread, so everything else of the engine runs on it too:
captured graphs get its priority. What prompts compute is read by decoding only after the host has waited for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

SHARES = (31 / 32, 7 / 8, 3 / 4, 5 / 8)  # of the multiprocessors; activations are kept for each, so they are few
_HIGH = -1  # priority of a stream; 0 is the lowest


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of the device."""

    share: float  # of its multiprocessors
    stream: Any  # torch.cuda.Stream; None: the current one


class PhaseStreams:
    """Where prompts and decoding run. ``partitions``: the largest first, never empty."""

    def __init__(self, partitions: Sequence[Partition], decoding: Any, reason: str) -> None:
        """``decoding``: its stream; None: both run on the current one. ``reason``: why there are no more partitions."""
        self.partitions = tuple(partitions)
        self.reason = reason
        self._decoding = decoding

    @property
    def overlaps(self) -> bool:
        """Whether prompts and decoding are computed at the same time."""
        return self._decoding is not None

    def prompts(self, index: int) -> AbstractContextManager[Any]:
        """What is launched within is computed on that partition."""
        stream = self.partitions[index].stream
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def decoding(self) -> AbstractContextManager[Any]:
        """What is launched within is decoding."""
        return nullcontext() if self._decoding is None else torch.cuda.stream(self._decoding)


def one_stream(reason: str) -> PhaseStreams:
    """Prompts and decoding take turns."""
    return PhaseStreams((Partition(1.0, None),), None, reason)


def two_streams(device: torch.device) -> PhaseStreams:
    """Of a GPU. Changes the calling thread's current stream, which has to be the engine's."""
    torch.cuda.synchronize(device)
    decoding = torch.cuda.Stream(device, priority=_HIGH)
    torch.cuda.set_stream(decoding)
    partitions = [Partition(1.0, torch.cuda.Stream(device))]
    reason = ""
    try:
        partitions += _green_partitions(device)
    except Exception as error:  # a driver or bindings without green contexts refuse in many ways
        reason = f"no partitions of multiprocessors: {type(error).__name__}: {error}"
        logger.warning("prompts and decoding share all multiprocessors; %s", reason)
    return PhaseStreams(partitions, decoding, reason)


def _green_partitions(device: torch.device) -> list[Partition]:
    """Streams whose kernels run on the first so many multiprocessors, the most first; the rest is left to others."""
    from cuda.bindings import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    (number,) = _done(driver.cuDeviceGet(index))
    (whole,) = _done(driver.cuDeviceGetDevResource(number, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    partitions: list[Partition] = []
    for share in SHARES:
        wanted = int(share * whole.sm.smCount)
        parts, _, _ = _done(driver.cuDevSmResourceSplitByCount(1, whole, 0, wanted))
        (description,) = _done(driver.cuDevResourceGenerateDesc([parts[0]], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        (context,) = _done(driver.cuGreenCtxCreate(description, number, flags))
        (stream,) = _done(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        external = torch.cuda.ExternalStream(int(stream), device=torch.device("cuda", index))
        partitions.append(Partition(parts[0].sm.smCount / whole.sm.smCount, external))
    return partitions


def _done(answer: Any) -> tuple[Any, ...]:
    """The results of a call of the driver. Raises ``RuntimeError`` if it failed."""
    error, *results = answer
    if error.value:
        raise RuntimeError(f"the driver says {error.name}")
    return tuple(results)
