from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.api_keys import ApiKeys
from core.errors import InvalidConfig, WrongKey


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# of the web site\nfirst\n\n  second  \n")
    return path


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer second"},
        {"x-api-key": "first"},
        {"authorization": "Basic Zm9v", "x-api-key": "second"},
    ],
)
def test_a_key_of_the_file_lets_in(headers: dict[str, str], file: Path) -> None:
    ApiKeys(str(file)).check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "first"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer firs"},
        {"authorization": "Bearer firstx"},
        {"authorization": "Bearer # of the web site"},
        {"x-api-key": "FIRST"},
    ],
)
def test_anything_else_does_not(headers: dict[str, str], file: Path) -> None:
    with pytest.raises(WrongKey) as caught:
        ApiKeys(str(file)).check(headers)

    assert "first" not in str(caught.value)


def test_without_a_file_nobody_needs_one() -> None:
    keys = ApiKeys(None)

    keys.check({})
    assert not keys.needed


@pytest.mark.parametrize("content", ["", "\n# only a comment\n"])
def test_a_file_without_keys_is_an_error_of_the_configuration(content: str, file: Path) -> None:
    file.write_text(content)

    with pytest.raises(InvalidConfig, match=r"api_keys_file: .* holds no key"):
        ApiKeys(str(file))


def test_a_file_that_is_not_there_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"api_keys_file: .* cannot be read"):
        ApiKeys(str(tmp_path / "none"))


def _replace(file: Path, content: str) -> None:
    """As kubelet does: another file takes the name."""
    new = file.with_name("new")
    new.write_text(content)
    os.replace(new, file)


def test_a_replaced_file_holds_at_once(file: Path) -> None:
    keys = ApiKeys(str(file))
    _replace(file, "third\n")

    keys.check({"x-api-key": "third"})
    with pytest.raises(WrongKey):
        keys.check({"x-api-key": "first"})


def test_a_file_that_is_spoilt_or_gone_shuts_nobody_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(str(file))
    _replace(file, "")

    keys.check({"x-api-key": "first"})
    file.unlink()
    keys.check({"x-api-key": "first"})

    assert "cannot be used, the ones before stay in use" in caplog.text
    assert "first" not in caplog.text
