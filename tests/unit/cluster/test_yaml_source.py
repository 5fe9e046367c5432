"""Lines of keys, the traps of YAML that are closed, and errors that say where."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.yaml_source import YamlSource, overridden, read_yaml
from core.errors import InvalidConfig


def read(tmp_path: Path, text: str) -> YamlSource:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_every_key_has_its_line(tmp_path: Path) -> None:
    source = read(tmp_path, "a: 1\nb:\n  c:\n    - d: 2\n    - e\n")

    assert dict(source.lines) == {"a": 1, "b": 2, "b.c": 3, "b.c[0]": 4, "b.c[0].d": 4, "b.c[1]": 5}


def test_a_missing_key_is_looked_for_in_the_sections_around_it(tmp_path: Path) -> None:
    source = read(tmp_path, "a: 1\nb:\n  c: 3\n")

    assert source.where("b.x[3].y").endswith("a.yaml:2")
    assert source.where("x").endswith("a.yaml")


def test_errors_say_file_line_and_key_in_a_section(tmp_path: Path) -> None:
    source = read(tmp_path, "plan:\n  b:\n    c: 3\n")

    with pytest.raises(InvalidConfig, match=r"a\.yaml:3: plan\.b\.c: is wrong"), source.errors("plan"):
        raise InvalidConfig("b.c", "is wrong")


def test_a_key_that_an_option_set_has_no_line(tmp_path: Path) -> None:
    source = read(tmp_path, "b:\n  c: 3\n")

    with pytest.raises(InvalidConfig, match=r"^--set b\.c: is wrong"), source.errors(overridden_keys=["b"]):
        raise InvalidConfig("b.c", "is wrong")


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    values = read(tmp_path, "a: 48e9\nb: 1.5e-3\nc: off\nd: 12\ne: 1e\nf: true\n").values

    assert values == {"a": 48e9, "b": 1.5e-3, "c": "off", "d": 12, "e": "1e", "f": True}
    assert isinstance(values["d"], int)


def test_what_holds_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="mapping"):
        read(tmp_path, "- 1\n")
    with pytest.raises(InvalidConfig, match="given twice"):
        read(tmp_path, "a: 1\na: 2\n")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_an_override_changes_a_copy() -> None:
    values = {"a": {"b": [1, 2]}}

    assert overridden(values, "a.b[1]=5e3") == {"a": {"b": [1, 5e3]}}
    assert values == {"a": {"b": [1, 2]}}
