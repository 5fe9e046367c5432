"""Which of transformers' functions multiplies a step's tokens with their experts, so that no decode step waits for the
host?

transformers has two that compute the same (``integrations/moe.py``):

    grouped_mm   tokens sorted by expert, one product of groups: reads each expert that is met once. Its kernel finds
                 the groups on the device only in bfloat16 on Hopper and datacenter Blackwell; elsewhere it, or what
                 transformers puts in its place in compiled code, copies their sizes to the host.
    batched_mm   gathers the weights of every pair of token and expert and multiplies them pair by pair: nothing is
                 asked of the host, but those weights are copied.

A CUDA graph can hold no copy to the host. So batched_mm is for few tokens where grouped_mm would need one, and for none
where it would not: there it was slower at every size (docs/engine.md). ``choose_experts`` says which is taken when, and
``install_experts`` registers a function with transformers that goes by it: the number of tokens is a shape, known to
whoever launches or captures a step. Experts that a model computes by code of its own are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.model_costs import expert_share

_NAME = "prfaas_experts_up_to_"  # and the number of tokens
# Compute capabilities (their first number) on which torch copies nothing to the host for a grouped product in bfloat16
# (``_grouped_mm_cuda`` of ATen).
_GROUPED_ON_DEVICE = (9, 10)
# Most bytes of weights that one layer may copy for a step; 0.3 ms on an H100. Above, it is better to ask the host.
_MOST_COPIED_BYTES = 256 << 20

ExpertsForward = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertsCase:
    """What the choice depends on."""

    device: str  # torch's type of it: cpu, cuda
    capability: tuple[int, int] | None  # of a CUDA device
    dtype: str  # of the experts' weights
    token_bytes: int  # of the weights of all experts that one token meets in one layer
    graph_batch_size: int  # sequences of the largest decode step that is to be captured


@dataclass(frozen=True, slots=True)
class ExpertsChoice:
    """Steps of up to ``batched_tokens`` tokens take batched_mm, larger ones grouped_mm."""

    batched_tokens: int
    graph_batch_size: int  # sequences of the largest decode step that needs no host; 0: none
    reason: str
    groups_on_device: bool = False  # grouped_mm needs no host either

    def needs_host(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens asks the host for something."""
        return num_tokens > self.batched_tokens and not self.groups_on_device

    @property
    def text(self) -> str:
        """For people."""
        if not self.batched_tokens:
            return "experts by grouped_mm"
        return f"experts by batched_mm up to {self.batched_tokens} tokens"


def choose_experts(case: ExpertsCase) -> ExpertsChoice:
    """Pure. Of several ranks all come to the same choice: their parts are equal."""
    major = None if case.capability is None else case.capability[0]
    if case.dtype == "bfloat16" and major in _GROUPED_ON_DEVICE:
        return ExpertsChoice(0, case.graph_batch_size, "grouped_mm finds its groups on the device", True)
    host = f"grouped_mm asks the host for its groups in {case.dtype} on this device"
    most = _MOST_COPIED_BYTES // max(case.token_bytes, 1)
    if most >= case.graph_batch_size:
        return ExpertsChoice(case.graph_batch_size, case.graph_batch_size, host)
    copied = f"batched_mm would copy {case.token_bytes >> 20} MiB of weights a token in every layer"
    return ExpertsChoice(most, most, f"{host}, and {copied}")


def experts_case(
    model: PreTrainedModel, device: torch.device, capability: tuple[int, int] | None, graph_batch_size: int
) -> ExpertsCase | None:
    """None: ``model`` has no experts that transformers lets us choose a function for."""
    largest, dtype = 0, model.dtype
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):  # of every class that takes such a function
            weights = list(module.parameters(recurse=False))
            size = sum(weight.numel() * weight.element_size() for weight in weights)
            largest, dtype = max((largest, dtype), (size, weights[0].dtype), key=lambda pair: pair[0])
    if not largest:
        return None
    token_bytes = round(largest * expert_share(model.config.get_text_config()))
    return ExpertsCase(device.type, capability, str(dtype).removeprefix("torch."), token_bytes, graph_batch_size)


def install_experts(model: PreTrainedModel, choice: ExpertsChoice) -> None:
    """Have the experts of ``model`` computed by ``choice``."""
    name = f"{_NAME}{choice.batched_tokens}"
    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, _by_size(choice.batched_tokens))
    model.set_experts_implementation(name)


def _by_size(batched_tokens: int) -> ExpertsForward:
    batched: ExpertsForward = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    grouped: ExpertsForward = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def compute(experts: torch.nn.Module, hidden_states: torch.Tensor, *routing: Any, **named: Any) -> torch.Tensor:
        chosen = batched if hidden_states.shape[0] <= batched_tokens else grouped
        return chosen(experts, hidden_states, *routing, **named)

    return compute


@contextmanager
def model_own_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within, experts for which a choice was installed are computed by the model's own code, one after the other."""
    before: Any = model.get_experts_implementation()
    if not any(str(name).startswith(_NAME) for name in before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
