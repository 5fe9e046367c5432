from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from core.errors import Incompatible
from core.fingerprint import CacheFingerprint

OURS = CacheFingerprint(model="m", revision="r", dtype="bfloat16", page_size=16, layout="l")


def test_equal_fingerprints_pass() -> None:
    OURS.require_equal(dataclasses.replace(OURS))


@pytest.mark.parametrize(
    ("name", "value"), [("model", "x"), ("revision", "x"), ("dtype", "x"), ("page_size", 32), ("layout", "x")]
)
def test_a_difference_is_named(name: str, value: Any) -> None:
    with pytest.raises(Incompatible) as error:
        OURS.require_equal(dataclasses.replace(OURS, **{name: value}))
    assert (error.value.field, error.value.theirs) == (name, str(value))
