from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import InvalidConfig, UnsupportedModel
from engine.rank_group import RankGroup
from engine.sharded_model import JoinedLinear, SummedLinear, require_degree, shard_model
from tests.tiny_models import FAMILIES


def model_of(family: str) -> Any:
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return factory.from_config(FAMILIES[family](), dtype=torch.float32)


def test_ranks_hold_slices_that_make_up_the_whole() -> None:
    whole = model_of("qwen3_moe")
    parts = [deepcopy(whole) for _ in range(2)]
    for rank, part in enumerate(parts):
        shard_model(part, RankGroup(rank, 2))
    of = [part.model.layers[1] for part in parts]
    layer = whole.model.layers[1]
    assert torch.equal(torch.cat([p.self_attn.k_proj.weight for p in of]), layer.self_attn.k_proj.weight)
    assert all(isinstance(p.self_attn.o_proj, SummedLinear) for p in of)
    assert torch.equal(torch.cat([p.self_attn.o_proj.weight for p in of], 1), layer.self_attn.o_proj.weight)
    assert torch.equal(of[1].input_layernorm.weight, layer.input_layernorm.weight)
    gate_and_up = [p.mlp.experts.gate_up_proj.chunk(2, 1) for p in of]  # of each rank, [experts, width / 2, hidden]
    rebuilt = torch.cat([torch.cat([half[i] for half in gate_and_up], 1) for i in range(2)], 1)
    assert torch.equal(rebuilt, layer.mlp.experts.gate_up_proj)
    assert all(isinstance(part.lm_head, JoinedLinear) for part in parts)
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), whole.lm_head.weight)
    assert torch.equal(parts[0].model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt2", "has no tensor-parallel plan"), ("phi3", "does not divide keys and values")]
)
def test_models_that_cannot_be_divided_by_heads_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        shard_model(model_of(family), RankGroup(0, 2))


@pytest.mark.parametrize(("size", "what"), [(3, "4 attention heads"), (4, "2 key/value heads")])
def test_a_degree_that_does_not_divide_the_heads_is_refused(size: int, what: str) -> None:
    with pytest.raises(InvalidConfig, match=f"tensor_parallel: must divide the model's {what}, got {size}"):
        require_degree(FAMILIES["llama"](), size)
