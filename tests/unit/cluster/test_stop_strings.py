"""Stop strings in a stream: nothing of them leaks, nothing else is held back, cuts do not matter."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.stop_strings import StopStrings


def run(stop: list[str], pieces: list[str], *, include: bool = False) -> tuple[list[str], str | None]:
    watcher = StopStrings(stop, include=include)
    shown = []
    for piece in pieces:
        text, matched = watcher.push(piece)
        shown.append(text)
        if matched is not None:
            return shown, matched
    return [*shown, watcher.flush()], None


def first_match(stop: list[str], text: str) -> tuple[int, str] | None:
    """(end, pattern) of the match complete first, the longest of several; by trying every end."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return end, max(found, key=len)
    return None


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
)
def test_the_first_complete_match_ends_the_text_however_it_was_cut(stop, pieces):
    shown, matched = run(stop, pieces)
    text = "".join(pieces)
    expected = first_match(stop, text)
    if expected is None:
        assert ("".join(shown), matched) == (text, None)
    else:
        end, pattern = expected
        assert ("".join(shown), matched) == (text[: end - len(pattern)], pattern)


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text(alphabet="ab", max_size=12),
)
def test_only_what_may_become_a_stop_string_is_held_back(stop, text):
    watcher = StopStrings(stop, include=False)
    fed = shown = ""
    for char in text:
        piece, matched = watcher.push(char)
        fed += char
        shown += piece
        if matched is not None:
            return
        held = fed[len(shown) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stop)


def test_the_stop_string_is_given_whole_when_included():
    assert run(["STOP"], ["go S", "TO", "P now"], include=True) == (["go ", "", "STOP"], "STOP")


def test_a_prefix_that_came_to_nothing_is_given():
    assert run(["STOP"], ["ST", "AY"]) == (["", "STAY", ""], None)


def test_flush_gives_what_was_held():
    assert run(["STOP"], ["go STO"]) == (["go ", "STO"], None)
