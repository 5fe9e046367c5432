"""The signposts lead somewhere: links resolve, and every file that docs/house.md names says what it answers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
HOUSE = ROOT / "docs" / "house.md"
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _targets(page: Path) -> list[Path]:
    return [page.parent / link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_resolve(page: Path) -> None:
    assert [str(target) for target in _targets(page) if not target.exists()] == []


def test_files_of_the_house_open_with_a_docstring() -> None:
    modules = [target for target in _targets(HOUSE) if target.suffix == ".py"]

    assert len(modules) > 20
    assert [str(m) for m in modules if not ast.get_docstring(ast.parse(m.read_text(encoding="utf-8")))] == []


def test_readme_names_the_test_command_of_ci() -> None:
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
