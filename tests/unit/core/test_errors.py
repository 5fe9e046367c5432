from __future__ import annotations

import inspect
import re

from core import errors


def test_the_tree_drawn_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)(\w+)( {2,}.*)?$", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        path = [*path[:depth], match[2]]
        drawn[match[2]] = path[-2] if depth else "Exception"
    classes = {name: cls.__base__.__name__ for name, cls in inspect.getmembers(errors, inspect.isclass)}
    assert drawn == classes


def test_wrong_fields_and_keys_lead_their_message() -> None:
    assert str(errors.InvalidRequest("max_tokens", "must be at least 1")) == "max_tokens: must be at least 1"
    assert str(errors.InvalidConfig("engine.dtype", "unknown")) == "engine.dtype: unknown"


def test_a_failed_sequence_says_whether_another_worker_may_try() -> None:
    assert errors.SequenceFailed("x", retryable=True).retryable
    assert not errors.SequenceFailed("x", retryable=False).retryable
