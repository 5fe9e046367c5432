"""What computes an engine's steps, as its config and device allow: pages, attention, graphs, layers, streams."""

from __future__ import annotations

import logging

import torch

from core.errors import InvalidConfig
from engine.attention import create_backend
from engine.attention_choice import AttentionChoice, choose_attention
from engine.config import APART_MODES, EngineConfig
from engine.experts import ExpertsChoice, choose_experts, experts_case, install_experts
from engine.model_loader import LoadedModel
from engine.model_runner import ModelRunner, SpeedUps
from engine.page_pool import PagePool
from engine.phase_streams import PhaseStreams, one_stream, two_streams
from engine.prompt_graphs import token_buckets
from engine.rank_steps import RankLeader

logger = logging.getLogger(__name__)


def make_pool(config: EngineConfig, loaded: LoadedModel) -> PagePool:
    """Of the model's pages. Raises ``InvalidConfig`` if its device has no room for them."""
    device = loaded.device
    try:
        return PagePool(loaded.layout, loaded.num_pages, device)
    except RuntimeError as error:
        if device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
            raise  # on a CPU there is no error of its own for this
        asked = [name for name in ("num_pages", "kv_cache_bytes") if getattr(config, name) is not None]
        gib = loaded.num_pages * loaded.layout.bytes_per_page / (1 << 30)
        raise InvalidConfig(
            f"engine.{(*asked, 'gpu_memory_utilization')[0]}",
            f"must leave room for the page pool: {loaded.num_pages} pages take {gib:.1f} GiB, more than {device} "
            "has left; give less, and where workers share a GPU give each its engine.kv_cache_bytes",
        ) from error


def make_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    pool: PagePool,
    leader: RankLeader | None = None,
    *,
    runs_beside: bool = False,
) -> tuple[ModelRunner, AttentionChoice]:
    """What computes steps, tried out and as fast as it gets; every rank makes its own, all at the same time.

    ``runs_beside``: steps are run between the layers of others. Raises ``UnsupportedModel`` with the reason.
    """
    choice = choose_attention(config.attention, loaded.attention)
    logger.info("attention by %s: %s", choice.name, choice.reason)
    code_folder = config.compile_cache
    interrupts = config.prefill_order == "slack"
    twice = (interrupts or runs_beside) and loaded.layout.num_ranks == 1
    device = loaded.device.type
    graphs = config.max_batch_size if config.switched_on("decode_graphs", device) else 0
    experts = _experts(loaded, graphs)
    urgent = create_backend(choice.name, pool, code_folder) if twice else None
    runner = ModelRunner(loaded.model, pool, create_backend(choice.name, pool, code_folder), urgent, leader)
    runner.self_test()
    compile_layers, why_not = config.switched_on("compile", device), "engine.compile says so"
    if loaded.quantisation is not None and not loaded.quantisation.dequantised and config.compile == "auto":
        compile_layers, why_not = False, f"{loaded.quantisation.label}: their libraries' layers run as they are"
    cascade, why_never = config.cascade_attention, "engine.cascade_attention says so"
    if cascade == "auto" and not config.prefix_cache:
        cascade, why_never = "never", "without engine.prefix_cache no pages are shared"
    elif cascade == "auto" and device != "cuda":
        cascade, why_never = "never", "on CPU it is slower"
    sizes, why_no_prompts = _prompt_graph_sizes(config, loaded, experts) if graphs else ((), "")
    wishes = SpeedUps(
        compile=compile_layers,
        graph_batch_size=graphs,
        max_model_len=loaded.description.max_model_len,
        max_batch_size=config.max_batch_size,
        eager_reason=why_not,
        experts=experts,
        cascade=cascade,
        cascade_reason=why_never,
        prompt_graph_sizes=sizes,
        prompt_graph_reason=why_no_prompts,
    )
    if wishes.compile or wishes.graph_batch_size:
        runner.speed_up(wishes)
    if interrupts and urgent is None:
        runner.forgo_interruption("steps are not held up between layers: other ranks could not follow")
    return runner, choice


def _prompt_graph_sizes(
    config: EngineConfig, loaded: LoadedModel, experts: ExpertsChoice | None
) -> tuple[tuple[int, ...], str]:
    """(tokens of the steps with prompts to capture, why there are none or fewer than was asked for)."""
    most = min(config.prompt_graph_tokens, config.max_batch_tokens)
    if not most:
        return (), ""
    if config.colocated_mode == "partitioned":
        return (), "no prompt graphs: a graph runs on the multiprocessors for which it was captured"
    if loaded.quantisation is not None and not loaded.quantisation.dequantised:
        return (), "no prompt graphs: rows that fill a graph up may change how others are quantised"
    sizes = token_buckets(most)
    captured = tuple(size for size in sizes if experts is None or not experts.needs_host(size))
    if experts is not None and captured != sizes:
        return captured, f"no prompt graphs of more than {experts.batched_tokens} tokens: {experts.reason}"
    return captured, ""


def _experts(loaded: LoadedModel, graph_batch_size: int) -> ExpertsChoice | None:
    """How experts are multiplied, installed; None: as transformers does by itself."""
    quantisation = loaded.quantisation
    if not graph_batch_size or (quantisation is not None and not quantisation.dequantised):
        return None  # quantised experts have functions of their own
    case = experts_case(loaded.model, loaded.device, loaded.attention.capability, graph_batch_size)
    if case is None:
        return None
    choice = choose_experts(case)
    install_experts(loaded.model, choice)
    logger.info("%s: %s", choice.text, choice.reason)
    return choice


def streams_for(config: EngineConfig, device: torch.device) -> PhaseStreams | None:
    """Where decoding runs beside prompts; None: they share steps."""
    if config.colocated_mode not in APART_MODES:
        return None
    if config.colocated_mode == "layered":
        return one_stream("")
    if device.type == "cuda":
        return two_streams(device)
    streams = one_stream("a CPU has no multiprocessors to part: a decoding step follows every layer of a prompt")
    logger.warning("engine.colocated_mode: partitioned: %s", streams.reason)
    return streams
