"""What does a request get for what its client leaves open? What the operator says, else what the model's makers do.

A checkpoint's ``generation_config.json`` holds the numbers that its makers found it to answer well with. vLLM and
SGLang take them for defaults, and so do we: a client that says nothing gets the same kind of answer everywhere.
``do_sample`` is not among them, as there: a request that wants the most likely token says ``temperature: 0``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from cluster.config import SamplingDefaultsConfig
from core.errors import InvalidConfig, InvalidRequest
from core.request import SamplingParams

_FILE = "generation_config.json"
# Our name |-> the model's, of what a default may be given for.
_NAMES: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_WHOLE = ("max_tokens", "top_k")


def left_open(given: Collection[str]) -> frozenset[str]:
    """The parameters that have defaults and are not among the names in ``given``."""
    return frozenset(_NAMES) - frozenset(given)


def with_defaults(
    sampling: SamplingParams, open_names: frozenset[str], defaults: SamplingParams, room: int
) -> SamplingParams:
    """``sampling`` with its ``open_names`` as ``defaults`` has them. A default of ``max_tokens`` gives way to the
    client's ``min_tokens``, and to ``room``: tokens that the model's context has left."""
    values = {name: getattr(defaults, name) for name in open_names}
    if values.get("max_tokens") is not None:
        values["max_tokens"] = min(room, max(values["max_tokens"], sampling.min_tokens))
    return replace(sampling, **values)


def sampling_defaults(config: SamplingDefaultsConfig, folder: Path) -> tuple[SamplingParams, str]:
    """(the defaults of a service whose model lies in ``folder``, which of them come from where, for people).

    Raises ``InvalidConfig`` for a file of the model's that says what no request may.
    """
    set_here = {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    of_model = {
        name: value
        for name, value in (_of_model(folder / _FILE) if config.from_model else {}).items()
        if name not in set_here
    }
    try:
        defaults = SamplingParams(**(of_model | set_here))
    except InvalidRequest as error:  # of the model: what was set here is checked already
        raise _wrong(folder / _FILE, f"{_NAMES[error.field]} {error.message}") from error
    return defaults, "; ".join(filter(None, (_told(set_here, "sampling_defaults"), _told(of_model, _FILE))))


def _told(values: Mapping[str, float], origin: str) -> str:
    return f"{', '.join(f'{name} {value:g}' for name, value in values.items())} ({origin})" if values else ""


def _of_model(file: Path) -> dict[str, float]:
    """What the file says, under our names; nothing if there is no file."""
    if not file.is_file():
        return {}
    try:
        says = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _wrong(file, f"is no JSON: {error}") from error
    if not isinstance(says, dict):
        raise _wrong(file, "must hold a JSON object")
    values: dict[str, float] = {}
    for name, theirs in _NAMES.items():
        value = says.get(theirs)
        if value is None:
            continue
        kind = int if name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _wrong(file, f"{theirs} must be a {'whole ' if name in _WHOLE else ''}number, got {value!r}")
        values[name] = max(value, 0) if name == "top_k" else value  # some write -1 for "no limit"
    return values


def _wrong(file: Path, what: str) -> InvalidConfig:
    return InvalidConfig(
        "sampling_defaults.from_model", f"cannot be true with this model: {file}: {what}. Set it to false"
    )
