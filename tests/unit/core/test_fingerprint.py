from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from core.errors import Incompatible
from core.fingerprint import CacheFingerprint

OURS = CacheFingerprint(model="m", revision="r", dtype="bfloat16", page_size=16, layout="l")


@pytest.mark.parametrize("theirs", [dataclasses.replace(OURS), dataclasses.replace(OURS, page_size=64)])
def test_equal_fingerprints_and_other_page_sizes_pass(theirs: CacheFingerprint) -> None:
    OURS.require_compatible(theirs)
    assert OURS.compatible(theirs)


@pytest.mark.parametrize(("name", "value"), [("model", "x"), ("revision", "x"), ("dtype", "x"), ("layout", "x")])
def test_a_difference_is_named(name: str, value: Any) -> None:
    with pytest.raises(Incompatible) as error:
        OURS.require_compatible(dataclasses.replace(OURS, **{name: value}))
    assert (error.value.field, error.value.theirs) == (name, str(value))
    assert not OURS.compatible(dataclasses.replace(OURS, **{name: value}))
