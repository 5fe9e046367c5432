"""Does a streamed text hold a stop string, and how much of it may already be shown?

Invariants:
- no character of a stop string is ever shown (unless ``include`` asks for the whole of it), so whatever could still
  become one is held back; nothing else is;
- the match that is complete first wins, of several that complete at one character the longest, so the answer does
  not depend on how the text was cut into tokens;
- the work for a character is constant (amortised), however long the text and the stop strings are.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches the text of one continuation. After a match or ``flush`` it is spent."""

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._matchers = [_Matcher(pattern) for pattern in stop]
        self._include = include
        self._held = ""  # a suffix of the text, proper prefix of some stop string

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string if ``text`` completed one (what follows it is lost)."""
        for position, char in enumerate(text):
            matched = max((m.pattern for m in self._matchers if m.advance(char)), key=len, default=None)
            if matched is not None:
                shown = self._held + text[: position + 1]
                self._held = ""
                return (shown if self._include else shown[: -len(matched)]), matched
        whole = self._held + text
        shown_chars = len(whole) - max((m.num_matched for m in self._matchers), default=0)
        self._held = whole[shown_chars:]
        return whole[:shown_chars], None

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt over a stream: ``num_matched`` characters of the pattern end the text so far."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.num_matched = 0
        self._fallback = _borders(pattern)

    def advance(self, char: str) -> bool:
        """Take one more character; True when the pattern is complete."""
        while self.num_matched and self.pattern[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched - 1]
        if self.pattern[self.num_matched] == char:
            self.num_matched += 1
        return self.num_matched == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """``[i]``: length of the longest proper prefix of ``pattern[:i + 1]`` that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return borders
