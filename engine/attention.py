"""How does a query see keys and values that lie in pages? The attention seam and its two references in torch.

A step's tokens are packed without padding: segment after segment, [num_tokens, num_heads, dim]. ``prepare`` turns the
segments into what every layer of that step shares; then each layer stores its K/V and attends.

Both implementations cut the step into *tiles*, several sequences with one query each (decode) or one sequence with
several queries (a prefill chunk), and fetch a tile's keys from the pages in one gather:

    tile queries  [num_sequences * num_queries, num_heads, dim]
    tile keys     [num_sequences, num_kv_heads, num_keys, dim]      contiguous, which is what makes matmul fast on CPU

Beside the two there are ``native`` for CPUs (attention_native.py), ``flashinfer`` (attention_flashinfer.py) and
``varlen`` (attention_varlen.py); which one runs is decided in attention_choice.py.

The two differ in what follows. ``matmul`` multiplies, with grouped heads folded into the query axis, and can do
everything. On CPU it takes half the time of scaled_dot_product_attention in a decode batch of 32 (a fifteenth of that
function's own ``enable_gqa``), and for prompts 0.6 to 0.9 of its time. On a processor that cannot multiply the pages'
type it multiplies in float32. ``sdpa`` calls torch's fused kernels, for GPUs.

Invariants:
- A sequence never reads another one's pages. Keys that pad a shorter sequence of a tile repeat its own last token, so
  not even a NaN in a neighbour's page can reach it.
- Nothing here waits for the device; a GPU runs behind the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from engine.cache_layout import LayerCache
from engine.config import DEFAULT_CODE_FOLDER
from engine.cpu_kernel import load_kernel
from engine.packed_linear import operators_work
from engine.page_pool import PagePool
from engine.shared_prefixes import SharedPrefix
from engine.uploads import upload

# A tile more costs about as much time as this many padding keys (measured with 3 K/V heads of 64 on CPU).
MAX_PADDING_KEYS = 1024
# Scores of a matmul tile are materialised, [num_heads, this, num_keys]: 128 keeps them in the processor's cache and
# wastes little above the diagonal; 64 to 256 are within a third of it.
MAX_MATMUL_QUERIES = 128
# Keys of a static tile, which is padded to the longest sequence there may be: beyond it, gathering padding costs more
# than a graph saves.
MAX_STATIC_KEYS = 1 << 16


@dataclass(frozen=True, slots=True)
class Segment:
    """``num_tokens`` consecutive tokens of one sequence, from position ``start`` on; ``page_ids`` holds at least
    the pages of positions 0 .. end - 1."""

    start: int
    num_tokens: int
    page_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a model asks of its attention beside shapes and window."""

    scaling: float
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: torch.Tensor | None = None  # [num_heads] logits that take part in the softmax and give nothing


class StepAttention(Protocol):
    """One step, seen by its layers. ``index`` is a position in the layout's layers."""

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the step's K [tokens, kv_heads, key_dim] and V [tokens, kv_heads, value_dim] to their pages. Once the
        layer has attended, other layers' may lie in their memory (prompt_graphs.py)."""
        ...

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """Causal attention of the step's queries [tokens, heads, key_dim] over everything that their sequences have
        stored so far, this step's tokens included: [tokens, heads, value_dim]. Call ``store`` first."""
        ...


class StaticAttention(StepAttention, Protocol):
    """One decode step after another over memory that stays where it is, so that a CUDA graph may hold its kernels."""

    def fill(self, segments: Sequence[Segment]) -> None:
        """From now on the step's sequences are these, one token each; there are always as many. Its kernels, and those
        that were captured, then compute on them."""
        ...


class CascadeAttention(StepAttention, Protocol):
    """As ``StaticAttention``, for steps in which neighbours begin with the same pages: these are read once for all of
    them, what follows for each, and the two results are merged. Which layers do so is the backend's to say."""

    def fill(self, segments: Sequence[Segment], shared: Sequence[SharedPrefix]) -> None:
        """As ``StaticAttention``'s. ``shared``: one group after the other, the last one up to the last segment."""
        ...


class AttentionBackend(Protocol):
    """Reads and writes the pages of one pool."""

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        """What the layers of one step share. ``segments`` are in the order in which the tokens are packed; it is
        faster if segments of one token come together, the short sequences first."""
        ...

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        """Memory for steps of ``num_sequences`` sequences of at most ``max_tokens`` tokens; the largest is asked for
        first. None: this backend cannot, or it would cost more than it gives."""
        ...

    def allocate_cascade(self, num_sequences: int, max_tokens: int) -> CascadeAttention | None:
        """As ``allocate``, which was called with the same before. None: this backend reads pages for each sequence."""
        ...


@dataclass(frozen=True, slots=True)
class _Tile:
    """``len(starts)`` sequences with ``num_queries`` packed tokens each, from ``first_token`` on."""

    first_token: int
    num_queries: int
    starts: tuple[int, ...]  # position of each sequence's first query
    page_ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> slice:
        """The tile's tokens in the packed batch."""
        return slice(self.first_token, self.first_token + len(self.starts) * self.num_queries)


@dataclass(frozen=True, slots=True)
class _TileKeys:
    """Where a tile's keys lie in one kind of layer, and which of them each query may see.

    The queries see keys ``[0, mask_from)`` all, and the rest as ``mask`` says (added to the scores).
    """

    num_keys: int
    key_rows: torch.Tensor  # rows of the layer's memory that make up [sequences, kv_heads, num_keys, key_dim]
    value_rows: torch.Tensor
    mask: torch.Tensor | None  # [sequences, queries, num_keys - mask_from]; None: everything is visible
    mask_from: int


_Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _TileKeys, AttentionOptions], torch.Tensor]


class TiledBackend:
    """The backend of both implementations; ``core`` computes one tile, of at most ``max_queries`` queries a sequence.

    ``core`` maps q [n, kv_heads, group, queries, key_dim], k [n, kv_heads, keys, key_dim] and v to
    [n, kv_heads, group, queries, value_dim].
    """

    def __init__(self, pool: PagePool, core: _Core, max_queries: int | None) -> None:
        self._pool = pool
        self._core = core
        self._max_queries = max_queries
        self._kinds = tuple(replace(layer, layer=0) for layer in pool.layout.layers)

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        tiles = tuple(_tiles(segments, self._max_queries))
        return _TiledStep(self._pool, self._core, self._kinds, segments, tiles)

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        if num_sequences * max_tokens > MAX_STATIC_KEYS:
            return None
        return _StaticTile(self._pool, self._core, self._kinds, num_sequences, max_tokens)

    def allocate_cascade(self, num_sequences: int, max_tokens: int) -> CascadeAttention | None:
        plain = self.allocate(num_sequences, max_tokens)
        if plain is None or self._pool.device.type != "cpu":  # the shapes change with the groups, as in no graph
            return None
        from engine.attention_cascade import TiledCascade

        return TiledCascade(self._pool, plain)


class _TiledStep:
    def __init__(
        self,
        pool: PagePool,
        core: _Core,
        kinds: tuple[LayerCache, ...],  # each layer without its number: layers of one kind share their row numbers
        segments: Sequence[Segment],
        tiles: tuple[_Tile, ...],
    ) -> None:
        self._pool = pool
        self._core = core
        self._kinds = kinds
        self._tiles = tiles
        self._slots = slots_of(segments, pool.layout.page_size, pool.device)
        self._keys: dict[tuple[int, LayerCache], _TileKeys] = {}  # (tile, kind of layer)

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.keys(index)[self._slots] = key
        self._pool.values(index)[self._slots] = value

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        outputs = [self._attend_tile(number, index, query, options) for number in range(len(self._tiles))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_tile(self, number: int, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        tile, layer = self._tiles[number], self._kinds[index]
        keys = self._tile_keys(number, layer)
        return _attend(self._pool.pages(index), layer, keys, query[tile.tokens], len(tile.starts), options, self._core)

    def _tile_keys(self, number: int, layer: LayerCache) -> _TileKeys:
        keys = self._keys.get((number, layer))
        if keys is None:
            keys = self._keys[number, layer] = _find_keys(self._tiles[number], layer, self._pool)
        return keys


def _attend(
    pages: torch.Tensor,
    layer: LayerCache,
    keys: _TileKeys,
    query: torch.Tensor,  # [sequences * queries, heads, key_dim]
    num_sequences: int,
    options: AttentionOptions,
    core: _Core,
) -> torch.Tensor:
    num_heads = query.shape[1]
    rows = pages.view(-1, _row_elements(layer))
    shape = (num_sequences, layer.num_kv_heads, keys.num_keys)
    k = rows.index_select(0, keys.key_rows).view(*shape, layer.key_dim)
    v = rows.index_select(0, keys.value_rows).view(*shape, layer.value_dim)
    group = num_heads // layer.num_kv_heads
    q = query.view(num_sequences, -1, layer.num_kv_heads, group, layer.key_dim)
    out = core(q.permute(0, 2, 3, 1, 4), k, v, keys, options)
    return out.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, layer.value_dim)


class _StaticTile:
    """Decode steps of ``num_sequences`` sequences as one tile that is always padded to the longest there may be."""

    def __init__(
        self, pool: PagePool, core: _Core, kinds: tuple[LayerCache, ...], num_sequences: int, max_tokens: int
    ) -> None:
        self._pool = pool
        self._core = core
        self._kinds = kinds
        self._num_sequences = num_sequences
        self._max_tokens = max_tokens
        first = [Segment(0, 1, (0,))] * num_sequences
        self._slots = slots_of(first, pool.layout.page_size, pool.device)
        self._keys = {kind: self._find_keys(first, kind) for kind in set(kinds)}

    def fill(self, segments: Sequence[Segment]) -> None:
        assert len(segments) == self._num_sequences, "the tile has its size for ever"
        for mine, new in zip(
            self._slots, slots_of(segments, self._pool.layout.page_size, self._pool.device), strict=True
        ):
            mine.copy_(new)
        for kind, keys in self._keys.items():
            new_keys = self._find_keys(segments, kind)
            keys.key_rows.copy_(new_keys.key_rows)
            keys.value_rows.copy_(new_keys.value_rows)
            assert keys.mask is not None, "made with one"
            assert new_keys.mask is not None, "made with one"
            keys.mask.copy_(new_keys.mask)

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.keys(index)[self._slots] = key
        self._pool.values(index)[self._slots] = value

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        layer = self._kinds[index]
        pages = self._pool.pages(index)
        return _attend(pages, layer, self._keys[layer], query, self._num_sequences, options, self._core)

    def _find_keys(self, segments: Sequence[Segment], kind: LayerCache) -> _TileKeys:
        tile = _Tile(0, 1, tuple(s.start for s in segments), tuple(s.page_ids for s in segments))
        num_keys = self._max_tokens if kind.window is None else min(kind.window, self._max_tokens)
        return _find_keys(tile, kind, self._pool, num_keys)


def _tiles(segments: Sequence[Segment], max_queries: int | None) -> Iterator[_Tile]:
    """Neighbours of one token share a tile while that pads little; a longer segment is cut to ``max_queries``."""
    token = index = 0
    while index < len(segments):
        segment = segments[index]
        if segment.num_tokens > 1:
            yield from _cut(token, segment, max_queries or segment.num_tokens)
            index, token = index + 1, token + segment.num_tokens
        else:
            shared = segments[index : index + _num_shared(segments[index:])]
            yield _Tile(token, 1, tuple(s.start for s in shared), tuple(s.page_ids for s in shared))
            index, token = index + len(shared), token + len(shared)


def _num_shared(segments: Sequence[Segment]) -> int:
    """How many of the first segments, all of one token, go well together."""
    longest = total = 0
    for count, segment in enumerate(segments):
        longest, total = max(longest, segment.end), total + segment.end
        if segment.num_tokens > 1 or longest * (count + 1) - total > MAX_PADDING_KEYS:
            return count
    return len(segments)


def _cut(first_token: int, segment: Segment, max_queries: int) -> Iterator[_Tile]:
    for offset in range(0, segment.num_tokens, max_queries):
        num_queries = min(max_queries, segment.num_tokens - offset)
        yield _Tile(first_token + offset, num_queries, (segment.start + offset,), (segment.page_ids,))


def slots_of(segments: Sequence[Segment], page_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(page id, offset in the page) of every packed token, two [tokens] tensors."""
    pages = [s.page_ids[position // page_size] for s in segments for position in range(s.start, s.end)]
    offsets = [position % page_size for s in segments for position in range(s.start, s.end)]
    return upload(pages, torch.int64, device), upload(offsets, torch.int64, device)


def _find_keys(tile: _Tile, layer: LayerCache, pool: PagePool, fixed_keys: int | None = None) -> _TileKeys:
    """``fixed_keys``: so many, and all under the mask, whatever the lengths."""
    page_size = pool.layout.page_size
    starts = torch.tensor(tile.starts)[:, None]  # [n, 1]
    ends = starts + tile.num_queries
    # A window that nothing has outgrown is none, and the cheaper mask will do.
    window = layer.window if layer.window is not None and layer.window < int(ends.max()) else None
    firsts = torch.zeros_like(starts) if window is None else (starts - window + 1).clamp(min=0)
    num_keys = fixed_keys or int((ends - firsts).max())
    positions = firsts + torch.arange(num_keys)  # [n, keys]; from ends[i] on it is padding
    page_ids = _block_table(tile.page_ids, -(-int(ends.max()) // page_size))
    stored = torch.minimum(positions, ends - 1)
    slots = page_ids.gather(1, stored // page_size) * page_size + stored % page_size  # [n, keys]
    mask_from = 0 if fixed_keys else _common_keys(tile, window, int((ends - firsts).min()))
    return _TileKeys(
        num_keys=num_keys,
        key_rows=_to_device(_rows(slots, layer, page_size, first_element=0, dim=layer.key_dim), pool),
        value_rows=_to_device(
            _rows(
                slots,
                layer,
                page_size,
                first_element=page_size * layer.num_kv_heads * layer.key_dim,
                dim=layer.value_dim,
            ),
            pool,
        ),
        mask=_mask(tile, starts, positions[:, mask_from:], window, pool) if mask_from < num_keys else None,
        mask_from=mask_from,
    )


def _common_keys(tile: _Tile, window: int | None, fewest_keys: int) -> int:
    """How many leading keys every query of the tile sees: those before the first query, unless a window moves."""
    if window is None or tile.num_queries == 1:
        return fewest_keys - tile.num_queries + 1
    return 0


def _block_table(page_ids: Sequence[tuple[int, ...]], num_pages: int) -> torch.Tensor:
    """[sequences, num_pages]; a shorter row is padded with page 0, which is never looked up."""
    return torch.tensor([(ids + (0,) * (num_pages - len(ids)))[:num_pages] for ids in page_ids])


def _row_elements(layer: LayerCache) -> int:
    """A gather fetches rows of the largest size of which both a key and a value are a whole number."""
    return math.gcd(layer.key_dim, layer.value_dim)


def _rows(slots: torch.Tensor, layer: LayerCache, page_size: int, first_element: int, dim: int) -> torch.Tensor:
    """Row numbers, head by head, of the vectors at ``slots`` (page * page_size + offset): flat
    [sequences, kv_heads, keys, dim // row]. ``first_element``: where in a page the half (K or V) begins."""
    row, num_heads = _row_elements(layer), layer.num_kv_heads
    page_elements = page_size * num_heads * (layer.key_dim + layer.value_dim)
    pages, offsets = slots // page_size, slots % page_size
    elements = pages * page_elements + first_element + offsets * dim  # of head 0; [n, keys]
    heads = torch.arange(num_heads)[:, None] * (page_size * dim)
    first_rows = (elements[:, None] + heads) // row  # [n, kv_heads, keys]
    return (first_rows[..., None] + torch.arange(dim // row)).flatten()


def _mask(
    tile: _Tile, starts: torch.Tensor, positions: torch.Tensor, window: int | None, pool: PagePool
) -> torch.Tensor:
    queries = (starts + torch.arange(tile.num_queries))[..., None]  # [n, queries, 1]
    hidden = positions[:, None] > queries
    if window is not None:
        hidden |= positions[:, None] <= queries - window
    mask = torch.zeros(hidden.shape, dtype=pool.pages(0).dtype).masked_fill_(hidden, -math.inf)
    return _to_device(mask, pool)


def _to_device(host: torch.Tensor, pool: PagePool) -> torch.Tensor:
    """Without waiting for the device."""
    return host if pool.device.type == "cpu" else host.pin_memory().to(pool.device, non_blocking=True)


def _matmul_core(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _TileKeys, options: AttentionOptions
) -> torch.Tensor:
    n, num_kv_heads, group, num_queries, dim = q.shape
    flat_q = q.reshape(n * num_kv_heads, group * num_queries, dim) * options.scaling
    scores = torch.bmm(flat_q, k.flatten(0, 1).transpose(1, 2))
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    scores = scores.view(n, num_kv_heads, group, num_queries, keys.num_keys)
    if keys.mask is not None:
        scores[..., keys.mask_from :] += keys.mask[:, None, None]
    weights = _softmax(scores, options.sinks).view(n * num_kv_heads, group * num_queries, keys.num_keys)
    return torch.bmm(weights, v.flatten(0, 1)).view(n, num_kv_heads, group, num_queries, v.shape[-1])


def _widened_matmul_core(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _TileKeys, options: AttentionOptions
) -> torch.Tensor:
    """For a processor without instructions for the type: there a product takes ten times as long as in float32."""
    return _matmul_core(q.float(), k.float(), v.float(), keys, options).to(q.dtype)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return scores.softmax(-1)
    n, num_kv_heads, group, num_queries, _ = scores.shape
    sink = sinks.to(scores.dtype).view(1, num_kv_heads, group, 1, 1).expand(n, -1, -1, num_queries, 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1].contiguous()


def _sdpa_core(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _TileKeys, options: AttentionOptions
) -> torch.Tensor:
    if options.softcap is not None or options.sinks is not None:
        return _matmul_core(q, k, v, keys, options)
    n, num_kv_heads, group, num_queries, dim = q.shape
    if num_queries == 1:
        # The group takes the place of the queries, so that no K/V head is repeated.
        mask = None if keys.mask is None else pad(keys.mask, (keys.mask_from, 0))[:, None]
        out = scaled_dot_product_attention(q.squeeze(3), k, v, attn_mask=mask, scale=options.scaling)
        return out.unsqueeze(3)
    assert n == 1, "a tile has one sequence or one query for each"
    # K/V heads take the place of the batch: a group shares its head by a stride of 0, without a copy.
    shape = (num_kv_heads, group, keys.num_keys)
    k, v = k[0, :, None].expand(*shape, dim), v[0, :, None].expand(*shape, v.shape[-1])
    causal = keys.mask_from == 1 and num_queries == keys.num_keys
    mask = None if causal or keys.mask is None else pad(keys.mask, (keys.mask_from, 0))
    out = scaled_dot_product_attention(q[0], k, v, attn_mask=mask, is_causal=causal, scale=options.scaling)
    return out.unsqueeze(0)


def _matmul_backend(pool: PagePool, code_folder: str) -> AttentionBackend:
    widen = pool.device.type == "cpu" and not operators_work(pool.pages(0).dtype)
    return TiledBackend(pool, _widened_matmul_core if widen else _matmul_core, MAX_MATMUL_QUERIES)


def _native_backend(pool: PagePool, code_folder: str) -> AttentionBackend:
    from engine.attention_native import NativeBackend

    return NativeBackend(pool, load_kernel(code_folder), _matmul_backend(pool, code_folder))


def _sdpa_backend(pool: PagePool, code_folder: str) -> AttentionBackend:
    return TiledBackend(pool, _sdpa_core, None)


def _varlen_backend(pool: PagePool, code_folder: str) -> AttentionBackend:
    from engine.attention_varlen import VarlenBackend

    return VarlenBackend(pool)


def _flashinfer_backend(pool: PagePool, code_folder: str) -> AttentionBackend:
    from engine.attention_flashinfer import FlashInferBackend

    return FlashInferBackend(pool)


BACKENDS: Mapping[str, Callable[[PagePool, str], AttentionBackend]] = MappingProxyType(
    {
        "native": _native_backend,
        "matmul": _matmul_backend,
        "sdpa": _sdpa_backend,
        "varlen": _varlen_backend,
        "flashinfer": _flashinfer_backend,
    }
)


def create_backend(name: str, pool: PagePool, code_folder: str = DEFAULT_CODE_FOLDER) -> AttentionBackend:
    """The backend of that name (``AttentionChoice.name``) for ``pool``; ``code_folder`` keeps what is compiled."""
    return BACKENDS[name](pool, code_folder)
