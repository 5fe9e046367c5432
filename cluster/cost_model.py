"""How many seconds will it take? Prefill, a decode step and a transfer, predicted from what was measured.

    prefill     a k + b n + c n (cached + n/2)          n uncached tokens in k engine steps; the last term counts the
                                                        attended pairs
    decode step a + b batch + c (tokens of context)     of all sequences of the batch
    transfer    t0 + (queued + bytes) / beta            between two clusters, unless the link itself is known

The shapes are DistServe's (PAPERS.md B.3: tokens, squared tokens and a constant for prefill, batch and context for
decode) with a cached prefix as in Mooncake's flops(n) (C.2). Each begins at the roofline of model and device and is
then fitted to what workers measure (cost_fit.py). Policies see a frozen ``CostView``, which also says how wrong it has
been: the errors are those of the predictions that were in use when the measurement came.

One ``CostModel`` in each gateway owns the samples and may keep them in a file, so that a restart does not forget. What
runs on the same device with the same model shares a *profile*, a name that the caller gives.

Invariants: predictions are finite, never negative, and grow with every number of tokens or bytes; equal samples in
equal order give equal predictions, also when a restart lies between them; a file that cannot be read costs the
memory, never the start.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.compute import StepSample
from core.errors import InvalidConfig
from core.link import LinkEstimate
from core.request import ClusterId
from engine.cost_fit import Sample, Samples, fit

logger = logging.getLogger(__name__)

FORMAT = "prfaas cost model"
VERSION = 1
ERRORS_KEPT = 256
ASSUMED_LINK_BYTES_PER_S = 1.25e9  # 10 Gbit/s, where nothing is configured or measured
ASSUMED_TRANSFER_T0_S = 1e-3

ClusterPair = tuple[ClusterId, ClusterId]  # from, to


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a device, as far as seconds are concerned; the rates are those that are sustained, not the peak's."""

    weight_flops: float  # FLOP of one token outside attention: two for each weight that it meets
    attention_flops: float  # FLOP of one token that attends to one token, in all layers
    weight_bytes: float  # read by every step
    kv_bytes_per_token: float  # read by a decode step for each token of context
    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        assert min(self.flops_per_s, self.bytes_per_s) > 0, f"a device computes and reads: {self}"

    def prefill(self) -> tuple[float, float, float]:
        """Coefficients a, b, c of prefill: the weights are read once, the rest is compute."""
        return (
            self.weight_bytes / self.bytes_per_s,
            self.weight_flops / self.flops_per_s,
            self.attention_flops / self.flops_per_s,
        )

    def decode(self) -> tuple[float, float, float]:
        """Coefficients a, b, c of a decode step: weights and context are read, the weights' products computed."""
        return (
            self.weight_bytes / self.bytes_per_s,
            self.weight_flops / self.flops_per_s,
            self.kv_bytes_per_token / self.bytes_per_s,
        )


@dataclass(frozen=True, slots=True)
class CostError:
    """How far off the last ``ERRORS_KEPT`` predictions were, relative to what was measured. 0 before the first."""

    samples: int = 0
    p50: float = 0.0  # of |predicted - measured| / measured
    p90: float = 0.0
    bias: float = 0.0  # median of (predicted - measured) / measured: above 0 is too pessimistic


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Coefficients of one kind of work, seconds per unit of each feature, and how good they were."""

    coefficients: tuple[float, ...]
    samples: int = 0  # measurements behind it since the first start; 0: the roofline
    error: CostError = CostError()

    def seconds(self, features: tuple[float, ...]) -> float:
        seconds = 0.0
        for coefficient, feature in zip(self.coefficients, features, strict=True):
            if feature > 0:
                seconds += coefficient * feature
        return seconds


def prefill_features(uncached: float, cached: float) -> tuple[float, float, float]:
    """1, tokens, and pairs of tokens that attend: each new token to the cached ones and to half of the new ones."""
    return 1.0, float(uncached), uncached * (cached + uncached / 2)


def decode_features(batch: float, context_tokens: float) -> tuple[float, float, float]:
    return 1.0, float(batch), float(context_tokens)


def transfer_features(num_bytes: float) -> tuple[float, float]:
    return 1.0, float(num_bytes)


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Predictions for the workers of one profile. ``step_tokens``: of prompts that one engine step computes at most."""

    prefill_cost: LinearCost
    decode_cost: LinearCost
    step_tokens: float = math.inf

    def prefill(self, uncached: float, cached: float = 0) -> float:
        """Seconds to compute ``uncached`` tokens behind ``cached`` ones; 0 if there is nothing to compute."""
        if uncached <= 0:
            return 0.0
        further_steps = math.ceil(uncached / self.step_tokens) - 1 if self.step_tokens < math.inf else 0
        of_one_step = self.prefill_cost.seconds(prefill_features(uncached, cached))
        return of_one_step + further_steps * self.prefill_cost.coefficients[0]

    def decode_step(self, batch: float, context_tokens: float) -> float:
        """Seconds of a step that makes one token for each of ``batch`` sequences of so many tokens together."""
        return self.decode_cost.seconds(decode_features(batch, context_tokens)) if batch > 0 else 0.0


# What is taken where nothing is known of a worker: about an 8B Llama in bfloat16 on an H100 (ARCHITECTURE.md, 8).
UNKNOWN_COMPUTE = ComputeCost(LinearCost((8e-3, 2.7e-5, 9e-10)), LinearCost((6.7e-3, 5.5e-5, 1e-7)), 2048)


_UNKNOWN_TRANSFER = LinearCost((ASSUMED_TRANSFER_T0_S, 1 / ASSUMED_LINK_BYTES_PER_S))


@dataclass(frozen=True, slots=True)
class CostView:
    """Everything that the model knew at one moment; the sole source of seconds for policies."""

    profiles: Mapping[str, ComputeCost]
    transfers: Mapping[ClusterPair, LinearCost]

    def compute(self, profile: str) -> ComputeCost:
        """Of the workers of a profile; ``UNKNOWN_COMPUTE`` if it was never named."""
        return self.profiles.get(profile, UNKNOWN_COMPUTE)

    def transfer(
        self, pair: ClusterPair, num_bytes: float, queued_bytes: float = 0, link: LinkEstimate | None = None
    ) -> float:
        """Seconds until ``num_bytes`` have arrived, behind ``queued_bytes`` that wait for the same link.

        ``link`` is what the sending worker knows of this very link, fresher than the pair's fit, and counts what is
        queued there itself. A pair that was never named is taken for ``ASSUMED_LINK_BYTES_PER_S``.
        """
        if num_bytes <= 0:
            return 0.0
        known = None if link is None else link.seconds(int(queued_bytes + num_bytes))
        if known is not None:
            return known
        t0_s, byte_s = self.transfers.get(pair, _UNKNOWN_TRANSFER).coefficients
        return t0_s + byte_s * (queued_bytes + num_bytes)


@dataclass(frozen=True, slots=True)
class CostLine:
    """One fit, by name. ``work``: prefill, decode or transfer; ``of``: a profile, or two clusters."""

    work: str
    of: str
    cost: LinearCost


def cost_lines(costs: CostView) -> Iterator[CostLine]:
    """Everything that a view knows, in order of names."""
    for profile, compute in sorted(costs.profiles.items()):
        yield CostLine("prefill", profile, compute.prefill_cost)
        yield CostLine("decode", profile, compute.decode_cost)
    for (source, target), transfer in sorted(costs.transfers.items()):
        yield CostLine("transfer", f"{source} to {target}", transfer)


NO_COSTS = CostView(MappingProxyType({}), MappingProxyType({}))  # nothing is known


class CostModel:
    """Takes measurements, gives views. Sole owner of the samples; for one thread, the gateway's loop.

    Taking a measurement costs microseconds. The first ``view`` after one fits anew, which costs milliseconds: it is
    made once a second or so and lent to every decision until the next.
    """

    def __init__(self, path: Path | None = None) -> None:
        """``path``: where ``save`` puts it and what is read now, if it is there; None: nothing is kept."""
        self._path = path
        self._compute: dict[str, tuple[_Line, _Line]] = {}  # profile |-> prefill, decode
        self._step_tokens: dict[str, float] = {}
        self._transfers: dict[ClusterPair, _Line] = {}
        self._remembered = _read(path) if path is not None else {}
        self._view: CostView | None = None  # None: something was learnt since it was made

    def add_profile(self, profile: str, roofline: Roofline, step_tokens: float = math.inf) -> None:
        """Name what workers may be, and where its costs begin. Again with another roofline: samples are kept."""
        self._step_tokens[profile] = step_tokens
        prefill, decode = self._compute.get(profile, (None, None))
        self._compute[profile] = (
            self._line(f"prefill {profile}", roofline.prefill(), prefill),
            self._line(f"decode {profile}", roofline.decode(), decode),
        )
        self._view = None

    def add_link(self, pair: ClusterPair, capacity: float | None = None) -> None:
        """Name an ordered pair of clusters. ``capacity``: configured bytes/s; None: not known."""
        name = f"transfer {json.dumps(pair)}"
        self._transfers[pair] = self._line(name, _transfer_prior(capacity), self._transfers.get(pair))
        self._view = None

    def observe_prefill(self, profile: str, uncached: int, cached: int, seconds: float) -> None:
        """A worker computed ``uncached`` tokens behind ``cached`` ones. What nobody can measure tells nothing."""
        if uncached > 0 and cached >= 0:
            self._observe(self._compute[profile][0], prefill_features(uncached, cached), seconds)

    def observe_decode_step(self, profile: str, batch: int, context_tokens: int, seconds: float) -> None:
        """A worker made one token for each of ``batch`` sequences."""
        if batch > 0 and context_tokens >= 0:
            self._observe(self._compute[profile][1], decode_features(batch, context_tokens), seconds)

    def observe_step(self, profile: str, step: StepSample) -> None:
        """A worker computed a step. One that held prompts and decoding sequences alike tells nothing: whose its seconds
        are is not known."""
        if step.is_prefill:
            features = (1.0, float(step.prefill_tokens), step.prefill_pairs)
            self._observe(self._compute[profile][0], features, step.seconds)
        elif step.is_decode:
            self.observe_decode_step(profile, step.decode_batch, step.decode_context, step.seconds)

    def observe_transfer(self, pair: ClusterPair, num_bytes: int, seconds: float) -> None:
        """A transfer that had the link's full speed took so long; ``pair`` was added before."""
        if num_bytes > 0:
            self._observe(self._transfers[pair], transfer_features(num_bytes), seconds)

    def view(self) -> CostView:
        """What is known now. The same object until something is learnt."""
        if self._view is None:
            self._view = CostView(
                MappingProxyType(
                    {
                        name: ComputeCost(prefill.cost(), decode.cost(), self._step_tokens[name])
                        for name, (prefill, decode) in self._compute.items()
                    }
                ),
                MappingProxyType({pair: line.cost() for pair, line in self._transfers.items()}),
            )
        return self._view

    def save(self) -> None:
        """Put everything into the file, whole or not at all. Nothing is done without a path. Raises OSError."""
        self.saving()()

    def saving(self) -> Callable[[], None]:
        """What ``save`` would write now, to be called on any thread: it waits for the disk. Raises OSError there."""
        path = self._path
        if path is None:
            return lambda: None
        lines = dict(self._remembered)
        for name, line in self._lines():
            lines[name] = line.to_json()
        return lambda: _write(path, {"format": FORMAT, "version": VERSION, "lines": lines})

    def _lines(self) -> list[tuple[str, _Line]]:
        compute = [
            (f"{kind} {profile}", line)
            for profile, both in self._compute.items()
            for kind, line in zip(("prefill", "decode"), both, strict=True)
        ]
        return compute + [(f"transfer {json.dumps(pair)}", line) for pair, line in self._transfers.items()]

    def _line(self, name: str, prior: tuple[float, ...], known: _Line | None) -> _Line:
        """One that begins at ``prior``, with the samples that are known of it or that the file had."""
        if known is not None:
            return _Line(prior, known.samples, known.errors)
        return _Line.from_json(name, prior, self._remembered.pop(name, None))

    def _observe(self, line: _Line, features: tuple[float, ...], seconds: float) -> None:
        if 0 < seconds < math.inf and all(math.isfinite(x) for x in features):
            line.observe(features, seconds)
            self._view = None


class _Line:
    """Samples of one kind of work and the coefficients that fit them."""

    def __init__(self, prior: tuple[float, ...], samples: Samples, errors: deque[float]) -> None:
        self._prior = prior
        self.samples = samples
        self.errors = errors  # (predicted - measured) / measured, of the latest
        self._told = LinearCost(fit(prior, samples))  # what the last view said
        self._learnt = False  # is there a sample that it did not know?

    def observe(self, features: tuple[float, ...], seconds: float) -> None:
        self.errors.append((self._told.seconds(features) - seconds) / seconds)
        self.samples.add(features, seconds)
        self._learnt = True

    def cost(self) -> LinearCost:
        coefficients = fit(self._prior, self.samples) if self._learnt else self._told.coefficients
        self._told = LinearCost(coefficients, self.samples.num_seen, _error(self.errors))
        self._learnt = False
        return self._told

    def ratios(self) -> tuple[float, ...]:
        """Measured over predicted seconds of the samples, ascending."""
        predicted = ((sample.seconds, self._told.seconds(sample.features)) for sample in self.samples)
        return tuple(sorted(seconds / expected for seconds, expected in predicted if expected > 0))

    def to_json(self) -> dict[str, Any]:
        samples = [[sample.number, sample.seconds, *sample.features] for sample in self.samples]
        return {"samples": samples, "errors": list(self.errors)}

    @classmethod
    def from_json(cls, name: str, prior: tuple[float, ...], data: object) -> _Line:
        """From what ``to_json`` made, or anew if it is something else."""
        samples: list[Sample] = []
        errors: list[float] = []
        if data is not None:
            try:
                samples, errors = _parse_line(data, len(prior))
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                logger.warning("cost model: what was kept of %r cannot be used, it begins anew: %s", name, error)
        return cls(prior, Samples(samples), deque(errors, ERRORS_KEPT))


def _parse_line(data: Any, num_features: int) -> tuple[list[Sample], list[float]]:
    samples = []
    for number, seconds, *features in data["samples"]:
        sample = Sample(tuple(float(x) for x in features), float(seconds), int(number))
        if len(sample.features) != num_features or not all(0 <= x < math.inf for x in sample.features):
            raise ValueError(f"{features} are no {num_features} features")
        if not 0 < sample.seconds < math.inf or sample.number < 0:
            raise ValueError(f"sample {number} of {seconds} s")
        samples.append(sample)
    errors = [float(error) for error in data["errors"]]
    if not all(math.isfinite(error) for error in errors):
        raise ValueError("an error that is no number")
    return samples, errors


def _error(errors: deque[float]) -> CostError:
    if not errors:
        return CostError()
    sizes = sorted(abs(error) for error in errors)
    count = len(sizes)
    return CostError(count, sizes[(count - 1) // 2], sizes[(count - 1) * 9 // 10], sorted(errors)[(count - 1) // 2])


def _transfer_prior(capacity: float | None) -> tuple[float, float]:
    return ASSUMED_TRANSFER_T0_S, 1 / (capacity or ASSUMED_LINK_BYTES_PER_S)


@dataclass(frozen=True, slots=True)
class SavedCosts:
    """What a service has learnt of workers. ``prefill_ratios`` and ``decode_ratios``: the measured seconds over those
    that the fit predicts, of each step that it keeps: what a line through them leaves out. Empty: none was measured."""

    compute: ComputeCost
    prefill_ratios: tuple[float, ...] = ()
    decode_ratios: tuple[float, ...] = ()


def saved_costs(path: Path) -> SavedCosts:
    """What a live service has learnt of its workers and kept in the file at ``path``; of several kinds of workers that
    of which it knows most. ``InvalidConfig`` if there is none."""
    lines = _read(path)
    known = {name.removeprefix("prefill ") for name in lines if name.startswith("prefill ")}
    known &= {name.removeprefix("decode ") for name in lines if name.startswith("decode ")}
    if not known:
        raise InvalidConfig(str(path), "holds no costs of workers (router.costs_file of a service that ran)")
    priors = (UNKNOWN_COMPUTE.prefill_cost.coefficients, UNKNOWN_COMPUTE.decode_cost.coefficients)
    found: list[tuple[int, str, SavedCosts]] = []
    for profile in sorted(known):
        prefill, decode = (
            _Line.from_json(f"{work} {profile}", prior, lines[f"{work} {profile}"])
            for work, prior in zip(("prefill", "decode"), priors, strict=True)
        )
        compute = ComputeCost(prefill.cost(), decode.cost())
        num_samples = len(prefill.samples) + len(decode.samples)
        found.append((num_samples, profile, SavedCosts(compute, prefill.ratios(), decode.ratios())))
    return max(found, key=lambda entry: entry[:2])[2]


def _read(path: Path) -> dict[str, Any]:
    """name of a line |-> what it was saved as; nothing, with a warning, if the file is not what ``_write`` made."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f"it is not version {VERSION} of {FORMAT!r}")
        if not isinstance(data.get("lines"), dict):
            raise ValueError("it has no lines")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("cost model: %s cannot be used, costs begin at the roofline: %s", path, error)
        return {}
    return dict(data["lines"])


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
