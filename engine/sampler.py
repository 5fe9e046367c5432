"""Which token comes next? A pure function of (logits, parameters, tokens so far, seed, output position).

Nothing is remembered between calls and no random state exists, so a sequence that is preempted, or resumed on another
worker, draws what it would have drawn. A row's token does not depend on the rows beside it.

Order, as vLLM's: log-probabilities of the untouched logits; then what a grammar forbids (token_masks.py) and min_tokens
(end and stop tokens) to -inf, logit_bias, repetition, frequency and presence penalties; greedy rows take the maximum
here (the lowest id among equals); the others go on with temperature, min_p, top_k, top_p and the draw.

``launch`` asks the device for a step's tokens and waits for nothing; ``Sampled.read`` waits for them. In between the
next step may be launched: where an item's last token is still being sampled (``StepItem.pending_row``), it is read on
the device, from the step before.

The filters do not sort the vocabulary (only top_p may have to, where the distribution is flat). Each raises a *cutoff*
below which a row's weights become 0, so tokens of equal weight stay or go together, whatever order ties come in; the
draw is an inverse CDF over what is left, in the order of token ids. On a GPU the nucleus is found by halving: looking
whether a guess was wide enough would make the host wait.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType

import numpy as np
import torch

from core.request import SamplingParams, TokenLogprob
from engine.step_plan import SampledToken, StepItem
from engine.token_masks import Masks, TokenMasks
from engine.uploads import upload

# Below this, dividing by the temperature overflows and the draw is the maximum anyway (vLLM's bound).
_MIN_TEMPERATURE = 1e-5
# How many of the largest weights are looked at for top_p, before a whole row is sorted. Real nuclei are mostly far
# smaller than the first guess; the second is for flat distributions (a row of 49k on one core: 0.3, 0.7 and 3.6 ms).
_NUCLEUS_GUESSES = (256, 4096)
_ABOVE_ONE = 0x3F800001  # the bits of the smallest float32 above 1
_HALVINGS = 30  # of that many integers
# The draw sums this many weights at a time, then searches one such run: two short scans in place of a long one.
_RUN = 256

_Cells = tuple[torch.Tensor, torch.Tensor]  # row indices, token ids; one pair for each cell


class Sampled:
    """The tokens of one step, which the device may still be computing. ``failed``: rows that no token can be chosen for
    |-> why; what stands there means nothing."""

    def __init__(
        self, token_ids: torch.Tensor, logprobs: _Logprobs | None, failed: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.token_ids = token_ids  # on the device, [items]
        self.failed = failed
        self._logprobs = logprobs
        on_device = (token_ids,) if logprobs is None else (token_ids, logprobs.chosen, *logprobs.best)
        self._host = tuple(_to_host(tensor) for tensor in on_device)
        self._ready: torch.cuda.Event | None = None
        if token_ids.device.type == "cuda":
            self._ready = torch.cuda.Event(enable_timing=True)
            self._ready.record()

    @property
    def is_ready(self) -> bool:
        """Whether ``read`` waits for nothing."""
        return self._ready is None or bool(self._ready.query())

    def seconds_since(self, mark: torch.cuda.Event) -> float:
        """What the device took from ``mark`` until they were there; not before that."""
        assert self._ready is not None, "there are no marks on a CPU"
        return float(mark.elapsed_time(self._ready)) / 1e3

    def read_ids(self) -> list[int]:
        """Wait until they are there; the tokens alone."""
        if self._ready is not None:
            self._ready.synchronize()
        token_ids: list[int] = self._host[0].tolist()
        return token_ids

    def read(self) -> list[SampledToken]:
        """Wait until they are there, and return them in the order of the items."""
        token_ids = self.read_ids()
        logprobs = {} if self._logprobs is None else self._logprobs.by_row(token_ids, *self._host[1:])
        return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queue its copy; on CPU it is there already."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Sampler:
    """Chooses one token for each row of logits. ``eos_token_ids`` end a sequence unless it has ``ignore_eos``.
    ``masks``: of what grammars allow; None: no item has one."""

    def __init__(self, eos_token_ids: Iterable[int] = (), masks: TokenMasks | None = None) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._masks = masks

    @property
    def mask_seconds(self) -> float:
        """Spent so far on masks, and on waiting for tokens that they need."""
        return 0.0 if self._masks is None else self._masks.seconds

    def sample(self, logits: torch.Tensor, items: Sequence[StepItem]) -> list[SampledToken]:
        """One token for each of ``items``, whose logits are the rows of ``logits`` [len(items), vocab], any float
        dtype and device. ``logits`` is left as it is."""
        return self.launch(logits, items).read()

    def launch(self, logits: torch.Tensor, items: Sequence[StepItem], before: Sampled | None = None) -> Sampled:
        """Ask for what ``sample`` gives, and wait for nothing but, with a grammar, for the step before. ``before``:
        that step's tokens, for items with a ``pending_row``."""
        assert logits.shape[0] == len(items), f"{logits.shape[0]} rows of logits for {len(items)} items"
        if not items:
            return Sampled(torch.empty(0, dtype=torch.int64, device=logits.device), None)
        masks = self._grammar_masks(items, before)
        previous = None if before is None else before.token_ids
        token_ids = _choose(self._edited(logits, items, previous, masks), items)
        return Sampled(token_ids, _logprobs(logits, items, token_ids), {} if masks is None else masks.failed)

    def _grammar_masks(self, items: Sequence[StepItem], before: Sampled | None) -> Masks | None:
        if self._masks is None:
            return None

        def pending() -> list[int]:
            assert before is not None, "an item waits for a token of the step before"
            return before.read_ids()

        return self._masks.masks(items, pending)

    def _edited(
        self,
        logits: torch.Tensor,
        items: Sequence[StepItem],
        previous: torch.Tensor | None,
        masks: Masks | None,
    ) -> torch.Tensor:
        """The logits after masks, biases and penalties; the same tensor if there are none."""
        masked = [self._masked_ids(item) for item in items]
        biased = [item.sampling.logit_bias for item in items]
        repeated = [item.sampling.repetition_penalty != 1.0 for item in items]
        counted = [bool(item.sampling.frequency_penalty or item.sampling.presence_penalty) for item in items]
        bounded = masks is not None and bool(masks.rows)
        if not (bounded or any(masked) or any(biased) or any(repeated) or any(counted)):
            return logits
        scores = logits.to(torch.float32, copy=True)
        if bounded:
            assert masks is not None, "as tested"
            _forbid(scores, masks)
        if any(masked):
            scores[_cells(masked, scores)] = -torch.inf
        if any(biased):
            values = [bias for row in biased for token_id, bias in row.items() if token_id < scores.shape[1]]
            cells = _cells([tuple(row) for row in biased], scores)
            scores[cells] += upload(values, torch.float32, scores.device)
        if any(repeated):
            _penalise_repetition(scores, items, repeated, previous)
        if any(counted):
            _penalise_counts(scores, items, counted, previous)
        return scores

    def _masked_ids(self, item: StepItem) -> tuple[int, ...]:
        """Tokens that would end the sequence before its ``min_tokens`` are out."""
        sampling = item.sampling
        if item.position >= sampling.min_tokens:
            return ()
        return sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids + self._eos_token_ids


# ---- masks and penalties: only the rows or cells concerned are read and written ----


def _forbid(scores: torch.Tensor, masks: Masks) -> None:
    """Lower to -inf what the masks do not allow. Tokens beyond a mask's are nothing that the tokenizer knows."""
    device, vocab = scores.device, scores.shape[1]
    words = upload(masks.bits, torch.int32, device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    forbidden = torch.ones(len(masks.rows), vocab, dtype=torch.bool, device=device)
    known = bits.flatten(1)[:, :vocab] == 0
    forbidden[:, : known.shape[1]] = known
    if len(masks.rows) == len(scores):
        scores.masked_fill_(forbidden, -torch.inf)
        return
    rows = upload(masks.rows, torch.int64, device)
    scores[rows] = scores[rows].masked_fill_(forbidden, -torch.inf)


def _cells(ids_by_row: Sequence[Sequence[int]], scores: torch.Tensor) -> _Cells:
    """Indices of cells (row, id). Ids beyond the vocabulary are left out: no logit stands for them."""
    vocab = scores.shape[1]
    pairs = [(row, token_id) for row, ids in enumerate(ids_by_row) for token_id in ids if token_id < vocab]
    rows, columns = upload(pairs, torch.int64, scores.device).reshape(-1, 2).unbind(1)
    return rows, columns


def _known_cells(
    items: Sequence[StepItem],
    concerned: Sequence[bool],
    first: Callable[[StepItem], int],
    scores: torch.Tensor,
    previous: torch.Tensor | None,
) -> _Cells:
    """Cells of the known tokens, from index ``first`` on, of the rows concerned, and of those that the step before is
    sampling; a token that occurs twice is named twice."""
    known = [
        _as_numpy(item.known_token_ids)[first(item) :] if on else _NO_TOKENS
        for item, on in zip(items, concerned, strict=True)
    ]
    rows = np.repeat(np.arange(len(items)), [len(ids) for ids in known])
    columns = np.concatenate(known)  # a copy: the scheduler's arrays must be free to grow again
    cells = upload(rows, torch.int64, scores.device), upload(columns, torch.int64, scores.device)
    pending = [(row, item.pending_row) for row, item in enumerate(items) if concerned[row]]
    pending = [(row, of) for row, of in pending if of is not None]
    if not pending:
        return cells
    assert previous is not None, "an item waits for a token of the step before"
    new_rows, of = upload(pending, torch.int64, scores.device).unbind(1)
    return torch.cat((cells[0], new_rows)), torch.cat((cells[1], previous[of]))


_NO_TOKENS = np.empty(0, dtype=np.int64)


def _as_numpy(token_ids: array[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.frombuffer(token_ids, dtype=np.int64)


def _penalise_repetition(
    scores: torch.Tensor, items: Sequence[StepItem], concerned: Sequence[bool], previous: torch.Tensor | None
) -> None:
    """Shrink the positive and push down the negative scores of every token of prompt and output."""
    cells = _known_cells(items, concerned, lambda item: 0, scores, previous)
    penalties = _column(items, lambda sampling: sampling.repetition_penalty, scores)[cells[0], 0]
    old = scores[cells]
    # A token named twice is written twice with the same value.
    scores[cells] = torch.where(old > 0, old / penalties, old * penalties)


def _penalise_counts(
    scores: torch.Tensor, items: Sequence[StepItem], concerned: Sequence[bool], previous: torch.Tensor | None
) -> None:
    """Lower output tokens' scores: by ``frequency_penalty`` for each occurrence, by ``presence_penalty`` once."""
    cells = _known_cells(items, concerned, lambda item: item.num_prompt_tokens, scores, previous)
    frequency = _column(items, lambda sampling: sampling.frequency_penalty, scores)[cells[0], 0]
    presence = _column(items, lambda sampling: sampling.presence_penalty, scores)[cells[0], 0]
    scores.index_put_(cells, -frequency, accumulate=True)
    scores[cells] = scores[cells] - presence


def _column(items: Sequence[StepItem], of: Callable[[SamplingParams], float], like: torch.Tensor) -> torch.Tensor:
    """One parameter of every item: [len(items), 1], float32."""
    values = [of(item.sampling) for item in items]
    return upload(values, torch.float32, like.device).unsqueeze(1)


# ---- the choice ----


def _takes_maximum(sampling: SamplingParams) -> bool:
    return sampling.temperature < _MIN_TEMPERATURE or sampling.top_k == 1


def _choose(scores: torch.Tensor, items: Sequence[StepItem]) -> torch.Tensor:
    """Token ids [S], int64."""
    drawn = [row for row, item in enumerate(items) if not _takes_maximum(item.sampling)]
    if not drawn:
        return scores.argmax(dim=-1)
    if len(drawn) == len(items):
        return _draw(_weights(scores, items), items)
    rows = upload(drawn, torch.int64, scores.device)
    drawn_items = [items[row] for row in drawn]
    token_ids = scores.argmax(dim=-1)
    token_ids[rows] = _draw(_weights(scores[rows], drawn_items), drawn_items)
    return token_ids


def _weights(scores: torch.Tensor, items: Sequence[StepItem]) -> torch.Tensor:
    """Unnormalised probabilities [S, vocab], each row's largest being 1, with the filtered tokens at 0."""
    weights = scores / _column(items, lambda sampling: sampling.temperature, scores)
    weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    samplings = [item.sampling for item in items]
    if any(sampling.min_p > 0 for sampling in samplings):
        _cut(weights, _column(items, lambda sampling: sampling.min_p, weights))
    # Rows without top_k and top_p are left out of the search for the largest weights.
    ranked = [row for row, sampling in enumerate(samplings) if sampling.top_k > 0 or sampling.top_p < 1]
    if len(ranked) == len(items):
        _cut_ranks(weights, items)
    elif ranked:
        rows = upload(ranked, torch.int64, weights.device)
        some = weights[rows]
        _cut_ranks(some, [items[row] for row in ranked])
        weights[rows] = some
    return weights


def _cut(weights: torch.Tensor, cutoff: torch.Tensor) -> None:
    """Zero, in place, what is below ``cutoff`` [S, 1]."""
    weights.masked_fill_(weights < cutoff, 0.0)


def _cut_ranks(weights: torch.Tensor, items: Sequence[StepItem]) -> None:
    """Apply top_k, then top_p to what top_k left."""
    vocab = weights.shape[1]
    top_ks = [min(item.sampling.top_k, vocab) or vocab for item in items]
    with_top_p = any(item.sampling.top_p < 1 for item in items)
    num_ranks = max([k for k in top_ks if k < vocab] + [_NUCLEUS_GUESSES[0] if with_top_p else 1])
    ranks = weights.topk(min(num_ranks, vocab), dim=-1).values  # [S, num_ranks], descending
    kth = upload([[k - 1] for k in top_ks], torch.int64, weights.device)
    limited = upload([[k < vocab] for k in top_ks], torch.bool, weights.device)
    if any(k < vocab for k in top_ks):
        _cut(weights, ranks.gather(1, kth.clamp(max=ranks.shape[1] - 1)).where(limited, 0.0))
    if with_top_p:
        top_p = _column(items, lambda sampling: sampling.top_p, weights)
        if weights.device.type == "cuda":
            _cut(weights, nucleus_cutoff_by_halving(weights, top_p))
        else:
            _cut(weights, _nucleus_cutoff(weights, ranks, top_p))


def _nucleus_cutoff(weights: torch.Tensor, ranks: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight [S, 1] in the smallest set of largest weights that holds ``top_p`` [S, 1] of the mass.

    ``ranks`` are each row's largest weights, descending; those that top_k cut off may be among them, for they come
    last. Rows whose set is not within ``ranks`` are searched further. The cutoff of a row without top_p is 0.
    """
    mass = weights.sum(dim=-1, keepdim=True, dtype=torch.float64) * top_p.where(top_p < 1, 0.0)
    cutoff = _last_needed(ranks, mass)
    vocab = weights.shape[1]
    rows = torch.arange(len(weights), device=weights.device)
    for num_ranks in (*_NUCLEUS_GUESSES[1:], vocab):
        rows = rows[ranks.sum(dim=-1, dtype=torch.float64) < mass[rows, 0]]
        if len(rows) == 0 or ranks.shape[1] == vocab:
            break
        ranks = weights[rows].topk(min(num_ranks, vocab), dim=-1).values
        cutoff[rows] = _last_needed(ranks, mass[rows])
    return cutoff.where(top_p < 1, 0.0)


def nucleus_cutoff_by_halving(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """What ``_nucleus_cutoff`` finds, in as many passes whatever the distribution, and without a look at the result.

    Weights are between 0 and 1, so their bits as integers are in their order: 31 halvings of the integers find the
    largest cutoff above which, itself included, there is enough mass.
    """
    mass = weights.sum(dim=-1, keepdim=True, dtype=torch.float64) * top_p.where(top_p < 1, 0.0)
    low = torch.zeros_like(top_p, dtype=torch.int32)  # enough
    high = torch.full_like(low, _ABOVE_ONE)  # too little
    for _ in range(_HALVINGS):
        middle = low + (high - low) // 2
        kept = weights.masked_fill(weights < middle.view(torch.float32), 0.0)
        enough = kept.sum(dim=-1, keepdim=True, dtype=torch.float64) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32).where(top_p < 1, 0.0)


def _last_needed(ranks: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The smallest [S, 1] of the largest weights that together hold ``mass`` [S, 1]."""
    larger = ranks.cumsum(dim=-1, dtype=torch.float64) - ranks  # mass of the weights before each
    # At least the first: a row of NaN needs none, and an index of -1 would kill a CUDA process.
    num_needed = (larger < mass).sum(dim=-1, keepdim=True).clamp(min=1)
    return ranks.gather(1, num_needed - 1)


# ---- the draw ----


def _draw(weights: torch.Tensor, items: Sequence[StepItem]) -> torch.Tensor:
    """One token id for each row [S], with probability in proportion to its weight; never one of weight 0."""
    num_rows, vocab = weights.shape
    if vocab % _RUN:
        weights = torch.nn.functional.pad(weights, (0, -vocab % _RUN))
    runs = weights.view(num_rows, -1, _RUN)  # [S, num_runs, _RUN]
    cdf = runs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [S, num_runs]
    uniform = upload([[_uniform(item)] for item in items], torch.float64, weights.device)
    target = uniform * cdf[:, -1:]
    run = _first_above(cdf, target)
    before = cdf.gather(1, (run - 1).clamp(min=0)).where(run > 0, 0.0)
    chosen = runs.gather(1, run.unsqueeze(2).expand(-1, 1, _RUN)).squeeze(1)  # [S, _RUN]
    return (run * _RUN + _first_above(chosen.cumsum(dim=-1, dtype=torch.float64), target - before)).squeeze(1)


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index [S, 1] of the first entry of ``cdf`` [S, N] above ``target`` [S, 1].

    Above, not equal: so an entry that adds nothing is never chosen. Rounding may put ``target`` at or beyond the
    total; then it is the entry that reaches the total.
    """
    first = (cdf <= target).sum(dim=-1, keepdim=True)
    last = (cdf < cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(first, last)


def _uniform(item: StepItem) -> float:
    """The draw of (seed, position), in [0, 1)."""
    seed = item.sampling.seed
    assert seed is not None, f"{item.sequence_id}: the gateway draws a seed for every request"
    digest = blake2b(struct.pack("<qq", seed, item.position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


# ---- log-probabilities ----


class _Logprobs:
    """Log-probabilities of the rows that want them, on the device; ``counts`` says how many of the best each wants."""

    def __init__(
        self, counts: Mapping[int, int], chosen: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._counts = counts
        self.chosen = chosen  # [rows]
        self.best = best  # ids and log-probabilities, [rows, most]

    def by_row(
        self, token_ids: Sequence[int], chosen: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
    ) -> dict[int, TokenLogprob]:
        """From the three tensors in host memory."""
        chosen_logprobs, best_ids, best_logprobs = chosen.tolist(), ids.tolist(), values.tolist()
        result: dict[int, TokenLogprob] = {}
        for index, (row, count) in enumerate(self._counts.items()):
            top = tuple(zip(best_ids[index][:count], best_logprobs[index][:count], strict=True))
            result[row] = TokenLogprob(token_ids[row], chosen_logprobs[index], top)
        return result


def _logprobs(logits: torch.Tensor, items: Sequence[StepItem], token_ids: torch.Tensor) -> _Logprobs | None:
    wanted = [(row, item.sampling.logprobs) for row, item in enumerate(items)]
    counts = {row: count for row, count in wanted if count is not None}
    if not counts:
        return None
    rows = upload(list(counts), torch.int64, logits.device)
    raw = logits[rows].to(torch.float32)
    totals = raw.logsumexp(dim=-1, keepdim=True)
    chosen = (raw.gather(1, token_ids[rows, None]) - totals)[:, 0]
    best = raw.topk(min(max(counts.values()), raw.shape[1]), dim=-1)
    return _Logprobs(counts, chosen, (best.indices, best.values - totals))
