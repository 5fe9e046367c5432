"""What is loaded is served as the model itself would compute it, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from core.errors import InvalidConfig, UnsupportedModel
from core.request import SamplingParams, SequenceId
from engine import model_runner
from engine.attention import AttentionOptions, Segment, StepAttention, create_backend
from engine.config import EngineConfig
from engine.model_loader import LoadedModel, load_model, weights_digest
from engine.model_runner import ModelRunner
from engine.model_source import ModelSource, SourceKind, resolve
from engine.packed_linear import operators_work
from engine.page_pool import PagePool
from engine.step_plan import StepItem, StepPlan
from tests.tiny_models import MAX_LEN, VOCAB_SIZE, WINDOW, save_tiny_model

CONFIG = EngineConfig(device="cpu", threads=1, dtype="float32", page_size=4, num_pages=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def load(folder: Path, config: EngineConfig = CONFIG) -> LoadedModel:
    return load_model(resolve(str(folder)), config)


def runner_of(loaded: LoadedModel) -> ModelRunner:
    pool = PagePool(loaded.layout, loaded.num_pages, loaded.device)
    return ModelRunner(loaded.model, pool, create_backend("matmul", pool))


def item(name: str, tokens: Sequence[int], start: int, page_ids: tuple[int, ...], *, samples: bool = True) -> StepItem:
    known = array("q", tokens)
    return StepItem(SequenceId(name), tuple(tokens), start, page_ids, samples, SamplingParams(), known, len(known))


def saved_with(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a model whose config.json differs."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


# ---- running ----


def test_logits_come_in_the_plans_order_for_sampling_items_only(llama: Path) -> None:
    runner = runner_of(load(llama))
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    prompts = {"long": list(range(30, 50)), "part": [3, 4, 5], "one": [9], "short": [7, 8]}
    plan = StepPlan(
        (
            item("one", prompts["one"], 0, (9,)),
            item("long", prompts["long"], 0, (8, 7, 6, 5, 4)),
            item("part", prompts["part"], 0, (1, 2), samples=False),
            item("short", prompts["short"], 0, (3,)),
        )
    )

    logits = runner.run(plan)

    assert logits.shape == (3, VOCAB_SIZE)
    for row, name in zip(logits, ("one", "long", "short"), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompts[name]])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_a_step_in_which_nothing_samples_gives_no_rows(llama: Path) -> None:
    runner = runner_of(load(llama))

    assert runner.run(StepPlan((item("a", [1, 2, 3], 0, (0,), samples=False),))).shape == (0, VOCAB_SIZE)


def test_each_layer_is_reported_once_in_order_when_its_pages_are_written(llama: Path) -> None:
    runner = runner_of(load(llama))
    seen: list[tuple[int, list[bool]]] = []

    def note(index: int) -> None:
        written = [bool(runner.pool.keys(i)[5].any()) for i in range(runner.pool.layout.num_layers)]
        seen.append((index, written))

    runner.run(StepPlan((item("a", [1, 2, 3, 4], 0, (5,)),)), note)

    assert seen == [(0, [True, False]), (1, [True, True])]


# ---- loading ----


def test_the_layout_is_what_the_layers_store(tmp_path: Path) -> None:
    layout = load(save_tiny_model("gemma3", tmp_path / "gemma3")).layout

    assert [layer.window for layer in layout.layers] == [WINDOW, WINDOW, None, WINDOW]
    assert {(layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.dtype) for layer in layout.layers} == {
        (2, 8, 8, "float32")
    }


def test_equal_folders_have_equal_fingerprints(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "elsewhere")

    assert load(tmp_path / "elsewhere").fingerprint == load(llama).fingerprint


def test_whatever_changes_the_bytes_of_a_page_changes_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    ours = load(llama).fingerprint
    other_weights = load(save_tiny_model("llama", tmp_path / "other", seed=1)).fingerprint
    other_numbers = load(saved_with(llama, tmp_path / "numbers", rms_norm_eps=0.1)).fingerprint

    assert other_weights == replace(ours, revision=other_weights.revision) != ours
    assert other_numbers == replace(ours, model=other_numbers.model) != ours
    assert load(llama, replace(CONFIG, page_size=8)).fingerprint == replace(ours, page_size=8)
    assert load(llama, replace(CONFIG, dtype="bfloat16")).fingerprint.dtype == "bfloat16"


def test_weights_digest_sees_a_byte_that_it_samples_and_the_size(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(10_000))
    digest = weights_digest(tmp_path)

    weights.write_bytes(bytes(9_999) + b"\1")
    assert weights_digest(tmp_path) != digest
    weights.write_bytes(bytes(10_001))
    assert weights_digest(tmp_path) != digest


def test_dummy_weights_follow_the_seed_and_leave_the_global_one(llama: Path) -> None:
    source = resolve(f"dummy:{llama}")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (load_model(source, replace(CONFIG, dummy_seed=seed)) for seed in (1, 1, 2))

    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    embeddings = [loaded.model.get_input_embeddings().weight for loaded in (first, again, other)]  # type: ignore[union-attr]
    assert torch.equal(embeddings[0], embeddings[1])  # type: ignore[arg-type]
    assert not torch.equal(embeddings[0], embeddings[2])  # type: ignore[arg-type]


def test_bfloat16_is_the_default_on_a_cpu_that_computes_it(llama: Path) -> None:
    expected = "bfloat16" if operators_work(torch.bfloat16) else "float32"
    assert load(llama, replace(CONFIG, dtype="auto")).fingerprint.dtype == expected


def test_pages_come_from_bytes_unless_their_number_is_given(llama: Path) -> None:
    page_bytes = load(llama).layout.bytes_per_page

    assert load(llama, replace(CONFIG, num_pages=None, kv_cache_bytes=10 * page_bytes + 1)).num_pages == 10
    assert load(llama, replace(CONFIG, num_pages=7, kv_cache_bytes=10 * page_bytes)).num_pages == 7
    assert load(llama, replace(CONFIG, num_pages=None)).num_pages == (1 << 30) // page_bytes  # on a CPU
    with pytest.raises(InvalidConfig, match=rf"engine.kv_cache_bytes.*{page_bytes}"):
        load(llama, replace(CONFIG, num_pages=None, kv_cache_bytes=page_bytes - 1))


def test_max_model_len_is_the_models_limit_or_what_the_pool_holds(llama: Path) -> None:
    def length(**settings: Any) -> int:
        return load(llama, replace(CONFIG, **settings)).description.max_model_len

    assert length(num_pages=100) == MAX_LEN
    assert length(num_pages=10) == 40
    assert length(num_pages=100, max_model_len=50) == 50
    with pytest.raises(InvalidConfig, match="the model's limit of 256"):
        length(num_pages=100, max_model_len=MAX_LEN + 1)
    with pytest.raises(InvalidConfig, match="the page pool of 40 tokens"):
        length(num_pages=10, max_model_len=41)


def test_longrope_is_served_up_to_where_its_factors_change(tmp_path: Path) -> None:
    phi3 = save_tiny_model("phi3", tmp_path / "phi3")
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = saved_with(
        phi3,
        tmp_path / "longrope",
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )

    assert load(folder).description.max_model_len == 64


def test_eos_tokens_come_from_every_file_that_names_one(llama: Path, tmp_path: Path) -> None:
    folder = saved_with(llama, tmp_path / "eos", eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))

    assert load(folder).description.eos_token_ids == (7, 9)
    assert load(llama).description.eos_token_ids == ()


# ---- refusing ----


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="t5 is an encoder-decoder model"):
        load(tmp_path)


def test_recurrent_layers_are_refused_by_number(tmp_path: Path) -> None:
    from transformers import Lfm2Config

    config = Lfm2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    config.save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="layers 0, 2 never call the attention function"):
        load_model(resolve(f"dummy:{tmp_path}"), CONFIG)


def test_rope_that_depends_on_the_longest_sequence_is_refused(llama: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

    with pytest.raises(UnsupportedModel, match="rope_type dynamic"):
        load(saved_with(llama, tmp_path / "dynamic", rope_parameters=rope))


def test_a_window_that_no_layer_is_told_of_is_refused(llama: Path, tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"]

    with pytest.raises(UnsupportedModel, match="layer 1 has a sliding window, but does not say how wide"):
        load(saved_with(llama, tmp_path / "window", layer_types=types))


def test_what_transformers_cannot_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')

    with pytest.raises(UnsupportedModel, match="no_such_thing"):
        load(tmp_path)


def test_a_model_without_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)

    with pytest.raises(UnsupportedModel, match="transformers cannot load it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"position_bias": torch.zeros(1)}, "asks its attention for position_bias"),
        ({"block_indices": 3, "is_causal": True}, "asks its attention for block_indices"),
        ({"attention_mask": torch.zeros(1)}, "asks its attention for attention_mask"),
    ],
)
def test_unknown_wishes_of_a_layer_are_refused(given: dict[str, object], complaint: str) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    row = torch.zeros(1, 2, 3, 4)
    arguments: dict[str, Any] = {"attention_mask": None, "forward_batch": model_runner._Probe(), **given}

    with pytest.raises(UnsupportedModel, match=complaint):
        model_runner.paged_attention(module, row, row, row, **arguments)


def test_a_model_that_drops_our_keyword_is_refused() -> None:
    row = torch.zeros(1, 2, 3, 4)

    with pytest.raises(UnsupportedModel, match="does not hand keywords down"):
        model_runner.paged_attention(torch.nn.Module(), row, row, row, None)


# ---- the self-test ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_passes_and_leaves_our_attention_in_place(llama: Path, dtype: str) -> None:
    runner = runner_of(load(llama, replace(CONFIG, dtype=dtype)))

    runner.self_test()

    assert runner.run(StepPlan((item("a", [1, 2], 0, (0,)),))).shape == (1, VOCAB_SIZE)


class _Broken:
    """A backend that forgets all but the newest chunk."""

    def __init__(self, pool: PagePool) -> None:
        self._backend = create_backend("matmul", pool)

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        return self._backend.prepare([replace(s, start=0, page_ids=s.page_ids[s.start // 4 :]) for s in segments])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_refuses_a_path_that_computes_something_else(llama: Path, dtype: str) -> None:
    loaded = load(llama, replace(CONFIG, dtype=dtype))
    pool = PagePool(loaded.layout, loaded.num_pages)

    with pytest.raises(UnsupportedModel, match="does not compute what the model's own attention does"):
        ModelRunner(loaded.model, pool, _Broken(pool)).self_test()


def test_the_self_test_needs_a_few_pages(llama: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"engine.num_pages: must be at least 6"):
        runner_of(load(llama, replace(CONFIG, num_pages=5))).self_test()


def test_two_runners_of_one_process_do_not_meet(llama: Path, tmp_path: Path) -> None:
    ours, theirs = runner_of(load(llama)), runner_of(load(save_tiny_model("llama", tmp_path / "b", seed=3)))
    plan = StepPlan((item("a", [1, 2, 3], 0, (0,)),))
    alone = ours.run(plan)
    theirs.run(plan)

    assert torch.equal(ours.run(plan), alone)
    assert not torch.equal(theirs.run(plan), alone)


def test_options_default_to_the_head_size_scaling() -> None:
    calls: list[model_runner.AttentionCall] = []

    class Batch:
        def attend(self, call: model_runner.AttentionCall) -> torch.Tensor:
            calls.append(call)
            return call.query

    module = torch.nn.Module()
    module.layer_idx = 3  # type: ignore[assignment]
    row = torch.zeros(1, 2, 5, 16)
    out, weights = model_runner.paged_attention(module, row, row[:, :1], row[:, :1], None, forward_batch=Batch())

    assert (out.shape, weights) == ((1, 5, 2, 16), None)
    assert calls[0].options == AttentionOptions(scaling=0.25)
    assert (calls[0].layer, calls[0].key.shape) == (3, (5, 1, 16))


def test_the_source_may_be_made_by_hand(llama: Path) -> None:
    assert load_model(ModelSource("mine", SourceKind.FOLDER, llama), CONFIG).description.vocab_size == VOCAB_SIZE
