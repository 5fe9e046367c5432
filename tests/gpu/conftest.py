"""Warnings are no errors on a GPU: compilers and drivers say what is theirs, and other versions say other things."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings("default"))
