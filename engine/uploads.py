"""How do a step's small arrays reach the device without anybody waiting for it?

A copy from ordinary host memory makes the host wait until the GPU has done all that was asked of it before. From pinned
memory it is queued like a kernel; torch's allocator keeps the pinned block until the copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def upload(
    values: NDArray[Any] | Sequence[Any], dtype: torch.dtype, device: torch.device, *, keep: bool = False
) -> torch.Tensor:
    """``values`` as a tensor on ``device``. On CPU it is a copy too. ``keep``: pinned, but left in host memory."""
    host = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else torch.tensor(values)
    if device.type != "cuda":
        return host.to(dtype, copy=True)
    pinned = torch.empty(host.shape, dtype=dtype, pin_memory=True)
    pinned.copy_(host)
    return pinned if keep else pinned.to(device, non_blocking=True)
