"""Tiny decoders with random float32 weights, one for each family that the engine must serve as transformers would.

The weights are large enough (``initializer_range``) for greedy tokens to vary and to depend on every earlier token;
windows are shorter than the prompts of the tests, so that a window which is ignored changes tokens. No token ends a
sequence. Building one takes about 20 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 256
MAX_LEN = 256
WINDOW = 11

_SHAPE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LEN,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,  # tied random weights repeat their last token for ever
    }
)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_LEN,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        **{**_SHAPE, "num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": WINDOW},
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    )


def _gemma3() -> PreTrainedConfig:
    return Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": WINDOW},
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        **{**_SHAPE, "head_dim": 8, "sliding_window": WINDOW},
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _deepseek_v3() -> PreTrainedConfig:
    """Keys of 12 and values of 8: the two halves of a page differ."""
    return DeepseekV3Config(
        **{**_SHAPE, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )


FAMILIES: Mapping[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "llama": lambda: LlamaConfig(**_SHAPE),
        "qwen2": lambda: Qwen2Config(**_SHAPE),
        "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
        "mistral": lambda: MistralConfig(**_SHAPE, head_dim=8, sliding_window=WINDOW),
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": lambda: Phi3Config(**_SHAPE, sliding_window=WINDOW),
        "gpt2": _gpt2,
        "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **_SHAPE, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        ),
        "gpt_oss": _gpt_oss,
        "deepseek_v3": _deepseek_v3,
    }
)


def save_tiny_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's model to ``folder`` as transformers would, and return the folder."""
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = factory.from_config(FAMILIES[family](), dtype=torch.float32)
        _roughen(model)
    model.save_pretrained(folder)
    return folder


def _roughen(model: torch.nn.Module) -> None:
    """Random numbers where initialisation left zeros and ones: biases, norms and sinks must matter too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def generate(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers itself goes on with, greedily, in float32 with its eager attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return generate_with(model, prompt, num_tokens)


def generate_with(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """As ``generate``, with a model that is loaded already."""
    row = torch.tensor([prompt])
    output = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=num_tokens, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
