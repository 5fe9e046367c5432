"""How do several processes compute one model? Each holds a slice of the weights, and they add up what they get.

A *rank* is one process on one device. All ranks of a worker are on one host and meet in a folder there (a torch
``FileStore``); between GPUs they talk by NCCL, between CPUs by gloo. They are the whole world of torch.distributed in
their processes, so there is at most one group in a process.

Invariant: every rank calls the same collectives in the same order. Rank 0 decides what is computed (rank_steps.py), so
the order is its own. A rank that waits for one that never comes waits ``timeout_s`` at most; one that has died is found
out sooner (cluster/rank_host.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from core.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class RankGroup:
    """This process's place among the ranks of its worker; made by ``join``."""

    rank: int
    size: int

    @classmethod
    def join(cls, rank: int, size: int, meeting: Path, device: torch.device, timeout_s: float) -> RankGroup:
        """Meet the other ranks in the file ``meeting``, which no group used before. Blocks until all are there."""
        if dist.is_initialized():
            raise InvalidConfig("tensor_parallel", "this process is one rank already, and can be no second one")
        if device.type == "cuda":
            bound = torch.device("cuda", torch.cuda.current_device())
            # By it alone transformers knows which device a rank is to read its slices to (sharded_model.py).
            os.environ["LOCAL_RANK"] = str(bound.index)
            dist.init_process_group(
                "nccl",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=bound,
            )
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look its host's name up
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        return cls(rank, size)

    def leave(self) -> None:
        """End the group; over gloo the process may join another one. NCCL's ends with the process: its end is another
        collective, for which the other ranks may be gone."""
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``tensor``, in place, on every rank."""
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, value: int, device: torch.device) -> int:
        """The smallest ``value`` of all ranks, on every rank."""
        values = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)


def visible_gpus(num_ranks: int) -> list[str] | None:
    """What ``CUDA_VISIBLE_DEVICES`` is to be for each of so many processes, of the GPUs that this one sees; None: it
    sees none. Raises ``InvalidConfig`` if it sees fewer."""
    if not torch.cuda.is_available():
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if len(found) < num_ranks:
        raise InvalidConfig("tensor_parallel", f"is {num_ranks}, but this process sees {len(found)} GPUs")
    return found


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's ``x``; may be written over it."""
    if torch.compiler.is_compiling():
        world = dist.group.WORLD
        assert world is not None, "a rank is in a group"
        summed: torch.Tensor = functional.all_reduce(x, "sum", world)
        return summed
    dist.all_reduce(x)
    return x


def join_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Every rank's ``x`` [..., n] side by side, [..., ranks * n]."""
    num_ranks = dist.get_world_size()
    parts = x.new_empty(num_ranks, *x.shape)
    if x.numel():
        dist.all_gather(list(parts.unbind(0)), x.contiguous())
    return parts.movedim(0, -2).reshape(*x.shape[:-1], num_ranks * x.shape[-1])
