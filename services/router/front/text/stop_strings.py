"""Finds stop strings in text that comes in pieces, and never lets a part of one out.

One Knuth-Morris-Pratt automaton a stop string: linear in the text, whatever the pieces, and the automaton's state is
the longest suffix of the text so far that may still become the stop string, so it is also what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopString:
    """A stop string with its table of fallbacks, which costs a pass over it: one for all choices and readers."""

    __slots__ = ("fallback", "text")

    def __init__(self, text: str) -> None:
        """`text` is not empty."""
        self.text = text
        self.fallback = [0] * len(text)
        """Says how many characters still match where so many matched and the next one does not."""
        length = 0
        for position in range(1, len(text)):
            while length and text[position] != text[length]:
                length = self.fallback[length - 1]
            if text[position] == text[length]:
                length += 1
            self.fallback[position] = length


class _Automaton:
    """Walks one stop string along the text."""

    __slots__ = ("_fallback", "_stop", "matched")

    def __init__(self, stop: StopString) -> None:
        self._stop = stop.text
        self._fallback = stop.fallback
        self.matched = 0
        """The length of the longest suffix of the text so far that is a prefix of the stop string."""

    def step(self, character: str) -> bool:
        """Is True if `character` completes the stop string."""
        matched = self.matched
        while matched and self._stop[matched] != character:
            matched = self._fallback[matched - 1]
        if self._stop[matched] == character:
            matched += 1
        self.matched = matched
        return matched == len(self._stop)

    def pass_over(self) -> None:
        """Passes over the stop string that was completed: it does not count, and another may overlap it."""
        self.matched = self._fallback[-1]


class StopStringMatcher:
    """Gets text, and gives out what is safe to show. Where several stop strings end, the one that ends first counts.

    The first end counts, not the first start: only so is the result the same however the text was cut into pieces.
    """

    def __init__(self, stop_strings: Sequence[StopString]) -> None:
        """`stop_strings` is not empty."""
        self._automata = [_Automaton(stop) for stop in stop_strings]
        self._held = ""
        self.stopped = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """Returns what may be shown after `text` came; sets `stopped` if a stop string ends in it. Not after `stopped`.

        With `may_stop` False, stop strings that end in this text do not count.
        """
        assert not self.stopped
        for position, character in enumerate(text):
            longest = 0
            for automaton in self._automata:
                if not automaton.step(character):
                    continue
                if may_stop:
                    longest = max(longest, automaton.matched)
                else:
                    automaton.pass_over()
            if longest:
                self.stopped = True
                visible = (self._held + text[: position + 1])[:-longest]
                self._held = ""
                return visible
        self._held += text
        num_held = max(automaton.matched for automaton in self._automata)
        visible = self._held[: len(self._held) - num_held]
        self._held = self._held[len(visible) :]
        return visible

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
