"""Finds stop strings in text that comes in pieces, and never lets a part of one out.

One Knuth-Morris-Pratt automaton per stop string: linear in the text, whatever the pieces, and the automaton's state is
the longest suffix of the text so far that may still become the stop string, so it is also what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopString:
    """A stop string as an automaton. Its table costs a pass over it, so all choices and readers share one."""

    __slots__ = ("fallback", "text")

    def __init__(self, text: str) -> None:
        """`text` is not empty."""
        self.text = text
        self.fallback = [0] * len(text)
        """Says how many characters still match where this many matched and the next one does not."""
        length = 0
        for position in range(1, len(text)):
            while length and text[position] != text[length]:
                length = self.fallback[length - 1]
            if text[position] == text[length]:
                length += 1
            self.fallback[position] = length

    def step(self, matched: int, character: str) -> int:
        """Returns how many characters match after this one, where `matched`, which are not all, did before it."""
        while matched and self.text[matched] != character:
            matched = self.fallback[matched - 1]
        return matched + (self.text[matched] == character)


class StopStringMatcher:
    """Gets text, and gives out what is safe to show. Where several stop strings end, the one that ends first counts.

    The first end counts, not the first start: only so is the result the same however the text was cut into pieces.
    """

    def __init__(self, stop_strings: Sequence[StopString]) -> None:
        """`stop_strings` is not empty."""
        self._stop_strings = stop_strings
        self._matched = [0] * len(stop_strings)
        """The length of the longest suffix of the text so far that is a prefix of each stop string."""
        self._held = ""
        self.stopped = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """Returns what may be shown after `text` came; sets `stopped` if a stop string ends in it. Not after `stopped`.

        With `may_stop` False, stop strings that end in this text do not count.
        """
        assert not self.stopped
        for position, character in enumerate(text):
            longest = 0
            for number, stop in enumerate(self._stop_strings):
                matched = stop.step(self._matched[number], character)
                if matched == len(stop.text):
                    longest = max(longest, matched if may_stop else 0)
                    matched = stop.fallback[-1]  # one that does not count may overlap one that does
                self._matched[number] = matched
            if longest:
                self.stopped = True
                visible = (self._held + text[: position + 1])[:-longest]
                self._held = ""
                return visible
        self._held += text
        visible = self._held[: len(self._held) - max(self._matched)]
        self._held = self._held[len(visible) :]
        return visible

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
