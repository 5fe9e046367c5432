"""How is one StepPlan computed by a transformers model that was not written for pages?

1. transformers looks its attention function up by name. ``paged_attention`` is registered under ``ATTENTION_NAME``; the
   model's own layers call it with q, k and v after norms and rotary embedding, and it builds no mask for that name.
2. Our keyword ``forward_batch`` travels through the model's ``**kwargs`` to that function: the batch is an argument of
   the call, not a global, so engines in one process do not meet.
3. All tokens of a step are packed into one row, [1, tokens], with their positions: no padding (step_packing.py). Each
   layer stores its K/V in pages, reports that, and attends to the pages.
4. ``logits_to_keep`` gives only the wanted positions' logits, through the model's own head (with its scaling and
   softcapping).
5. On a GPU projections are merged (merged_linear.py), the layers compiled (compiled_layers.py), with attention as one
   operator (attention_op.py), decode steps captured as graphs (decode_graphs.py), and what lies between the attentions
   of short steps with prompts (prompt_graphs.py). ``speed_up`` does that, tries it out, and leaves it where it does not
   work, with the reason.

What a model asks of its attention beyond causal order, window, scaling, softcap and sinks is refused, not ignored:
``probe_layers`` sees what each layer passes, and ``self_test`` compares with the model's own eager attention.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from core.errors import InvalidConfig, UnsupportedModel
from engine.attention import AttentionBackend, AttentionOptions, StepAttention
from engine.attention_choice import LayerAttention
from engine.attention_op import Desk, DeskBatch, number_layers
from engine.cache_layout import LayerCache
from engine.compiled_layers import CompiledLayers, generator_missing
from engine.decode_graphs import DecodeGraphs
from engine.experts import ExpertsChoice, model_own_experts
from engine.page_pool import PagePool
from engine.prompt_graphs import PromptGraphs
from engine.rank_steps import RankLeader
from engine.shared_prefixes import CascadeTerms
from engine.step_packing import Chunk, PackedStep, fill_pending, pack
from engine.step_plan import StepItem, StepPlan
from engine.uploads import upload

logger = logging.getLogger(__name__)

ATTENTION_NAME = "prfaas_paged"
# Keywords that models hand down to every attention function and that change nothing here: either they repeat what the
# batch says already, or they are for other attention functions.
_WITHOUT_EFFECT = frozenset({"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache"})
_MOST_LAYERS_AHEAD = 2  # of the GPU, where a step may be held up
_MAX_REASON = 300  # characters
_SELF_TEST_CHUNKS = (13, 9, 1)  # the second begins inside a page, the third is a decode step
# Largest distance of logits from the model's own, relative to their spread; unrelated ones are 1.4 apart. Rounding
# gives a tenth of these, except that in bfloat16 it may turn a router to another expert (0.2).
_SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class ForwardBatch(Protocol):
    """What travels through the model as ``forward_batch``."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The attention output, [tokens, heads, value_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call of its attention function."""

    layer: int  # the model's number of the layer
    query: torch.Tensor  # [tokens, heads, key_dim]
    key: torch.Tensor  # [tokens, kv_heads, key_dim]
    value: torch.Tensor  # [tokens, kv_heads, value_dim]
    options: AttentionOptions
    window: int | None
    unknown: tuple[str, ...]  # names of keywords that are given and that we know nothing of


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, key_dim]; key and value likewise
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch | DeskBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; the signature is theirs. Returns [1, tokens, heads, dim]."""
    if isinstance(forward_batch, DeskBatch):  # compiled; which keywords the layers give was seen by the probe
        scale = scaling or query.shape[-1] ** -0.5
        return forward_batch.call(module, query, key, value, s_aux, scale, softcap), None
    if forward_batch is None:
        raise UnsupportedModel(f"{type(module).__name__} does not hand keywords down to its attention function")
    unknown = [name for name, given in others.items() if _matters(name, given)]
    if attention_mask is not None:
        unknown.append("attention_mask")
    call = AttentionCall(
        layer=_layer_number(module),
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        options=AttentionOptions(scaling or query.shape[-1] ** -0.5, softcap, s_aux),
        window=sliding_window,
        unknown=tuple(unknown),
    )
    return forward_batch.attend(call).unsqueeze(0), None


def _matters(name: str, given: object) -> bool:
    return given is not None and given is not False and name not in _WITHOUT_EFFECT


def _layer_number(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel(f"{type(module).__name__} does not know its layer's number")
    return layer


def _no_mask(*_: object, **__: object) -> None:
    """The backend hides what is to be hidden; a mask over the packed row would be wrong and large."""


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


class _Probe:
    """Takes note of what every layer asks, and attends to nothing."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.unknown:
            raise UnsupportedModel(f"layer {call.layer} asks its attention for {', '.join(call.unknown)}")
        if call.layer in self.layers:
            raise UnsupportedModel(f"layer {call.layer} attends more than once in one forward pass")
        if call.query.shape[1] % call.key.shape[1]:
            raise UnsupportedModel(f"layer {call.layer}: query heads are no multiple of its key/value heads")
        cache = LayerCache(
            layer=call.layer,
            num_kv_heads=call.key.shape[1],
            key_dim=call.key.shape[2],
            value_dim=call.value.shape[2],
            dtype=str(call.key.dtype).removeprefix("torch."),
            window=call.window,
        )
        options = call.options
        self.layers[call.layer] = LayerAttention(cache, call.query.shape[1], options.softcap, options.sinks is not None)
        return call.value.new_zeros(*call.query.shape[:2], call.value.shape[2])


def probe_layers(model: PreTrainedModel) -> tuple[LayerAttention, ...]:
    """What each layer would store and ask, from one tiny forward pass. Raises ``UnsupportedModel``."""
    probe = _Probe()
    row = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            _forward(model, row, torch.arange(2, device=model.device)[None], torch.tensor([1]), probe)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"a forward pass without a cache object fails: {error}") from error
    config = model.config.get_text_config()
    missing = sorted(set(range(config.num_hidden_layers)) - probe.layers.keys())
    if missing:
        raise UnsupportedModel(
            f"layers {_ranges(missing)} never call the attention function (recurrent layers, or an attention of "
            "their own), so their state cannot be paged"
        )
    layers = tuple(probe.layers[number] for number in sorted(probe.layers))
    _check_windows([layer.cache for layer in layers], getattr(config, "layer_types", None))
    return layers


def _check_windows(layers: Sequence[LayerCache], layer_types: Sequence[str] | None) -> None:
    """Some models hide by mask alone and hand no window down; the self-test is too short to notice."""
    for layer, layer_type in zip(layers, layer_types or (), strict=False):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layer {layer.layer} has attention of the kind {layer_type}")
        if layer_type == "sliding_attention" and layer.window is None:
            raise UnsupportedModel(f"layer {layer.layer} has a sliding window, but does not say how wide")


def _ranges(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return f"{text}, ..." if len(numbers) > 8 else text


def _forward(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    wanted: torch.Tensor,
    forward_batch: ForwardBatch | DeskBatch,
) -> torch.Tensor:
    """Logits [len(wanted), vocab] of the packed row's tokens at the indices ``wanted``."""
    # A model that does not know the keyword would hand it down to its layers and compute every position's logits.
    selects = "logits_to_keep" in signature(model.forward).parameters
    output = model(
        input_ids=token_ids,
        position_ids=positions,
        use_cache=False,
        forward_batch=forward_batch,
        **({"logits_to_keep": wanted} if selects else {}),
    )
    logits: torch.Tensor = output.logits[0]
    return logits if selects else logits[wanted]


class _PagedBatch:
    """The step, as the layers of the model meet it."""

    def __init__(
        self,
        step: StepAttention,
        index_of: Mapping[int, int],
        on_layer_stored: Callable[[int], None] | None,
    ) -> None:
        self._step = step
        self._index_of = index_of
        self._on_layer_stored = on_layer_stored

    def attend(self, call: AttentionCall) -> torch.Tensor:
        index = self._index_of[call.layer]
        self._step.store(index, call.key, call.value)
        if self._on_layer_stored is not None:
            self._on_layer_stored(index)
        return self._step.attend(index, call.query, call.options)

    def attend_packed(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """The same, as compiled layers ask (attention_op.py)."""
        options = AttentionOptions(scaling, softcap, sinks)
        return self.attend(AttentionCall(layer, query, key, value, options, window=None, unknown=()))


@dataclass(frozen=True, slots=True)
class SpeedUps:
    """What ``speed_up`` may try."""

    compile: bool
    graph_batch_size: int  # sequences of the largest decode graph; 0: none
    max_model_len: int  # tokens that a sequence may have in a graph
    max_batch_size: int  # sequences of any step
    eager_reason: str = "engine.compile says so"  # if ``compile`` is off
    experts: ExpertsChoice | None = None  # of the model's experts, installed; None: it has none to choose for
    cascade: str = "never"  # engine.cascade_attention
    cascade_reason: str = "engine.cascade_attention says so"  # if it is never
    prompt_graph_sizes: tuple[int, ...] = ()  # tokens of steps with prompts that are captured, if decode steps are
    prompt_graph_reason: str = ""  # why there are none, or fewer, although they were asked for


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """How steps are computed."""

    compiled: bool
    reason: str  # why it is not compiled; empty if it is
    graph_batch_sizes: tuple[int, ...]
    graph_reason: str  # why decode steps, or the largest of them, are not captured; empty if they all are
    experts: str = ""  # by what tokens and experts are multiplied; empty: by what transformers takes, or there are none
    order_reason: str = ""  # why no step is held up between layers although that was asked for
    cascade: bool = False  # decode steps read shared prefixes once where that pays
    cascade_reason: str = ""  # why not, if they are captured; empty if they do
    prompt_graph_tokens: int = 0  # of the largest step with prompts that runs in graphs; 0: none does
    prompt_graph_reason: str = ""  # why none does, or no larger one, although that was asked for


class ModelRunner:
    """Computes steps of ``model``, whose K/V goes to ``pool`` through ``backend``."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: PagePool,
        backend: AttentionBackend,
        urgent: AttentionBackend | None = None,
        leader: RankLeader | None = None,
    ) -> None:
        """``urgent``: another of the same kind, for steps that are run between two layers of a step; None: none are.
        ``leader``: tells the other ranks of this worker what is run; None: there are none, or this is not the first."""
        self.pool = pool
        self._leader = leader
        self._model = model
        self._backend = backend
        self._urgent = urgent
        self._launched: deque[torch.cuda.Event] = deque()  # after the latest layers of the outer one
        self._index_of = {layer.layer: index for index, layer in enumerate(pool.layout.layers)}
        self._desk = Desk()
        self._compiled: CompiledLayers | None = None  # None: eager
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        self._cascade_terms: CascadeTerms | None = None  # None: shared prefixes are read for each sequence
        self.mode = ForwardMode(False, "speed_up was not asked for", (), "speed_up was not asked for")
        self.num_fallbacks = 0  # times that it went back to eager
        self.num_cascade_steps = 0  # decode steps that have read shared prefixes once
        self.saved_tokens = 0  # of sequences of the step that was run last: read for another one, and not again

    def run(
        self,
        plan: StepPlan,
        on_layer_stored: Callable[[int], None] | None = None,
        previous: torch.Tensor | None = None,
        *,
        beside: bool = False,
    ) -> torch.Tensor:
        """Compute a step: logits [num sampling items, vocab] in the order of ``plan.sampling_items``; on a GPU it is
        only queued. The logits are valid until the next step is.

        ``on_layer_stored(index)`` is called when the K/V of all the step's tokens has been written in
        ``layout.layers[index]`` (on a GPU: has been queued), before that layer attends, or at the end of a graph.
        ``previous``: the tokens of the step before, on the device, for items with a ``pending_row``.

        ``beside``: another step is under way, between whose layers this one is run: its K/V and logits are its own.
        """
        packed = pack([_chunk(item) for item in plan.items], self._cascade_terms)
        if self._leader is not None:
            self._leader.begin(packed, previous)
        return self._run(packed, on_layer_stored, previous, beside)

    def run_packed(
        self, packed: PackedStep, on_layer_stored: Callable[[int], None] | None, previous: torch.Tensor | None
    ) -> torch.Tensor:
        """As ``run``, of what rank 0 has sent."""
        return self._run(packed, on_layer_stored, previous)

    @property
    def is_divided(self) -> bool:
        """Other processes compute each step too: one that fails here has parted from them."""
        return self.pool.layout.num_ranks > 1

    def keep_close(self) -> None:
        """Wait until a GPU is at most ``_MOST_LAYERS_AHEAD`` layers behind: what is launched now comes after those.
        To be called once a layer."""
        self.note_layer()
        if len(self._launched) > _MOST_LAYERS_AHEAD:
            self._launched.popleft().synchronize()

    def note_layer(self) -> None:
        """A layer was launched, on the current stream of a GPU."""
        if self.pool.device.type == "cuda":
            launched = torch.cuda.Event()
            launched.record()
            self._launched.append(launched)

    def is_close(self) -> bool:
        """Whether a GPU is at most ``_MOST_LAYERS_AHEAD`` layers behind; does not wait."""
        while len(self._launched) > _MOST_LAYERS_AHEAD:
            if not self._launched[0].query():
                return False
            self._launched.popleft()
        return True

    @torch.inference_mode()
    def _run(
        self,
        packed: PackedStep,
        on_layer_stored: Callable[[int], None] | None,
        previous: torch.Tensor | None = None,
        beside: bool = False,
    ) -> torch.Tensor:
        if self._graphs is not None:
            logits = self._graphs.run(packed, previous)
            if logits is not None:
                once = self._graphs.reads_once(packed)
                self.num_cascade_steps += once
                self.saved_tokens = packed.shared_pages * self.pool.layout.page_size if once else 0
                for index in range(self.pool.layout.num_layers if on_layer_stored is not None else 0):
                    on_layer_stored(index)  # type: ignore[misc]  # the range is empty if it is None
                return logits
        backend = self._backend
        if beside:
            assert self._urgent is not None, "steps are run one after the other"
            backend = self._urgent
        self.saved_tokens = 0
        if self._prompt_graphs is not None:
            logits = self._prompt_graphs.run(packed, previous, backend, on_layer_stored)
            if logits is not None:
                return logits
        device = self.pool.device
        row = upload(packed.token_ids, torch.int64, device)
        fill_pending(row, packed, previous)
        attention = backend.prepare(packed.segments)
        positions = upload(packed.positions, torch.int64, device)
        wanted = upload(packed.wanted, torch.int64, device)
        try:
            return self._forward(row[None], positions[None], wanted, attention, on_layer_stored)
        except Exception as error:
            if self._compiled is not None:
                self.go_eager(f"a compiled step failed: {_in_short(error)}")
            raise

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor,
        attention: StepAttention,
        on_layer_stored: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        batch = _PagedBatch(attention, self._index_of, on_layer_stored)
        if self._compiled is None:
            return _forward(self._model, token_ids, positions, wanted, batch)
        outer, self._desk.attend = self._desk.attend, batch.attend_packed
        try:
            return _forward(self._model, token_ids, positions, wanted, DeskBatch(self._desk))
        finally:
            self._desk.attend = outer

    @property
    def may_be_held_up(self) -> bool:
        """Another step may be run between two layers of one."""
        return self._urgent is not None

    def forgo_interruption(self, reason: str) -> None:
        """Note that no step may be held up although that was asked for; counted, logged, seen in ``mode``."""
        self.num_fallbacks += 1
        self.mode = replace(self.mode, order_reason=reason)
        logger.warning("engine.prefill_order: %s", reason)

    def wait(self) -> None:
        """Until the device has done all that was queued, or has failed too."""
        if self.pool.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.pool.device)
            except RuntimeError as error:
                logger.error("the device failed: %s", _in_short(error))

    # ---- speed ----

    def speed_up(self, wishes: SpeedUps, backend: str = "inductor") -> None:
        """Compile and capture what can be, and compare it with the model's own attention as ``self_test`` does.

        Writes to the pool, so it must run before anything is stored. ``backend`` is torch.compile's. What does not
        work is left, and ``mode`` says why. Raises ``UnsupportedModel`` as ``self_test``.
        """
        compile_reason = "" if wishes.compile else wishes.eager_reason
        lacking = generator_missing(self.pool.device.type) if wishes.compile and backend == "inductor" else None
        if lacking is not None:
            self.go_eager(lacking)
            compile_reason = lacking
        elif wishes.compile:
            number_layers(self._model)
            self._compiled = CompiledLayers(self._model, backend)
            compile_reason = self._try_compiled(wishes.experts)
        experts = "" if wishes.experts is None else wishes.experts.text
        self.mode = ForwardMode(not compile_reason, compile_reason, (), "engine.decode_graphs says so", experts)
        if wishes.graph_batch_size:
            self._capture(wishes)
        mode = self.mode
        logger.info(
            "the model runs %s; decode graphs for batches of %s; prompt graphs for up to %d tokens%s; %s",
            "compiled" if mode.compiled else f"eagerly: {mode.reason}",
            ", ".join(map(str, mode.graph_batch_sizes)) or f"none: {mode.graph_reason}",
            mode.prompt_graph_tokens,
            f" ({mode.prompt_graph_reason})" if mode.prompt_graph_reason else "",
            "shared prefixes are read once where it pays" if mode.cascade else mode.cascade_reason or mode.graph_reason,
        )

    def _try_compiled(self, experts: ExpertsChoice | None) -> str:
        """Why the compiled layers are not to be used; empty if they are."""
        assert self._compiled is not None, "made by the caller"
        if not self._compiled.num_layers:
            self._compiled = None
            return "the model's layers were not found"
        try:
            self.self_test()
            if experts is not None and experts.batched_tokens >= max(_SELF_TEST_CHUNKS):
                self._compile_larger_steps(experts.batched_tokens + 1)
        except Exception as error:  # dynamo and inductor raise whatever a model provokes
            if self._compiled is not None:
                self.go_eager(f"{_in_short(error)}")
            reason = self.mode.reason
            self.self_test()
            return reason
        return ""

    def _compile_larger_steps(self, num_tokens: int) -> None:
        """Above the border between two functions of experts layers are other code, of which the self-test's steps were
        too small to need any: no prompt is to wait for it."""
        page_size, scratch_page = self.pool.layout.page_size, self.pool.num_pages - 1
        pages = (scratch_page,) * -(-num_tokens // page_size)  # what they attend to does not matter
        self._run(pack([Chunk([0] * num_tokens, 0, pages, True)]), None)

    def go_eager(self, reason: str) -> None:
        """Leave compiled code and graphs for good; counted, logged and seen in ``mode``."""
        if self._compiled is not None:
            self._compiled.undo()
        self._compiled = self._graphs = self._prompt_graphs = self._cascade_terms = None
        self.num_fallbacks += 1
        self.mode = replace(
            self.mode,
            compiled=False,
            reason=reason,
            graph_batch_sizes=(),
            graph_reason=reason,
            cascade=False,
            prompt_graph_tokens=0,
        )
        logger.warning("the model runs eagerly from now on: %s", reason)

    def _capture(self, wishes: SpeedUps) -> None:
        device = self.pool.device
        batch_size, reason = wishes.graph_batch_size, ""
        if wishes.experts is not None and wishes.experts.graph_batch_size < batch_size:
            batch_size = wishes.experts.graph_batch_size
            reason = f"of more than {batch_size} sequences: {wishes.experts.reason}"
            logger.warning("decode steps are not captured: %s", reason)
        if not batch_size:
            self.mode = replace(self.mode, graph_reason=reason)
            return
        try:
            graphs = DecodeGraphs(
                self._forward,
                self._urgent or self._backend,  # they may run at the same time as an eager step of the other
                device,
                batch_size,
                wishes.max_model_len,
                scratch_page=self.pool.num_pages - 1,
                record=device.type == "cuda",
            )
        except Exception as error:
            reason = f"capturing failed: {_in_short(error)}"
            self.num_fallbacks += 1
            logger.warning("decode steps are not captured: %s", reason)
            self.mode = replace(self.mode, graph_reason=reason)
            return
        if not graphs.buckets or graphs.buckets[-1] != batch_size:
            self.mode = replace(self.mode, graph_reason="the attention backend has no static steps of that size")
            return
        self._graphs = graphs
        self.mode = replace(self.mode, graph_batch_sizes=graphs.buckets, graph_reason=reason)
        self._capture_prompts(wishes)
        self.self_test()
        reason = self._capture_cascade(graphs, wishes)
        self.mode = replace(self.mode, cascade=not reason, cascade_reason=reason)

    def _capture_prompts(self, wishes: SpeedUps) -> None:
        self.mode = replace(self.mode, prompt_graph_reason=wishes.prompt_graph_reason)
        if not wishes.prompt_graph_sizes:
            return
        try:
            self._prompt_graphs = PromptGraphs(
                self._forward,
                self.pool.device,
                wishes.prompt_graph_sizes,
                wishes.max_batch_size,
                record=self.pool.device.type == "cuda",
            )
        except Exception as error:
            reason = f"steps with prompts are not captured: {_in_short(error)}"
            self.num_fallbacks += 1
            logger.warning("engine.prompt_graph_tokens: %s", reason)
            self.mode = replace(self.mode, prompt_graph_reason=reason)
            return
        self.mode = replace(self.mode, prompt_graph_tokens=self._prompt_graphs.sizes[-1])

    def _capture_cascade(self, graphs: DecodeGraphs, wishes: SpeedUps) -> str:
        """Why shared prefixes are not read once; empty if they are."""
        if wishes.cascade == "never":
            return f"no cascade attention: {wishes.cascade_reason}"
        terms = CascadeTerms.of(self.pool.layout, whatever_it_saves=wishes.cascade == "always")
        if terms is None:
            return "no cascade attention: all layers have sliding windows"
        try:
            if not graphs.capture_cascade():
                return "no cascade attention: the attention backend has none, or a step holds one sequence"
        except Exception as error:
            reason = f"no cascade attention: capturing failed: {_in_short(error)}"
            self.num_fallbacks += 1
            logger.warning("engine.cascade_attention: %s", reason)
            return reason
        self._cascade_terms = terms
        return ""

    def self_test(self) -> None:
        """Compare a prompt computed in chunks through pages with the model's own eager attention.

        Uses pages from the end of the pool backwards, so it must run before anything is stored. Raises
        ``UnsupportedModel`` if the logits differ by more than rounding explains.
        """
        page_size, num_tokens = self.pool.layout.page_size, sum(_SELF_TEST_CHUNKS)
        num_pages = -(-num_tokens // page_size)
        if num_pages > self.pool.num_pages:
            raise InvalidConfig("engine.num_pages", f"must be at least {num_pages}, to try the model out")
        page_ids = tuple(range(self.pool.num_pages - 1, self.pool.num_pages - 1 - num_pages, -1))
        token_ids = [(37 * i + 11) % self._model.config.get_text_config().vocab_size for i in range(num_tokens)]
        paged, ends, start = [], [], 0
        for size in _SELF_TEST_CHUNKS:
            # A copy: the next step may write where these are.
            packed = pack([Chunk(token_ids[start : start + size], start, page_ids, True)])
            paged.append(self._run(packed, None).clone())
            start += size
            ends.append(start - 1)
        expected = self._eager_logits(token_ids, ends)
        error = _distance(torch.cat(paged), expected)
        tolerance = _SELF_TEST_TOLERANCE[expected.dtype]
        if not error <= tolerance:
            raise UnsupportedModel(
                f"the paged path does not compute what the model's own attention does: its logits are off by "
                f"{error:.2g} of their spread, and {tolerance:g} is allowed"
            )

    @torch.inference_mode()
    def _eager_logits(self, token_ids: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        model: Any = self._model
        model.set_attn_implementation("eager")
        try:
            row = torch.tensor([token_ids], device=self.pool.device)
            with torch.compiler.set_stance("force_eager"), model_own_experts(model):
                logits: torch.Tensor = model(input_ids=row, use_cache=False).logits[0]
        finally:
            model.set_attn_implementation(ATTENTION_NAME)
        return logits[list(wanted)]


def _chunk(item: StepItem) -> Chunk:
    return Chunk(item.token_ids, item.start, item.page_ids, item.samples, item.pending_row)


def _in_short(error: Exception) -> str:
    """Compilers say a lot; the log has it all."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the standard deviation of ``expected``; worst row."""
    difference = (actual.float() - expected.float()).square().mean(-1).sqrt()
    return float((difference / expected.float().std(-1).clamp(min=1e-12)).max())
