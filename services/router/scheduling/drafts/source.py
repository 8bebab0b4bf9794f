"""Where drafts come from: the interface. Whatever is guessed, tokens are the same; it is only a matter of speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.ids import RequestId


@dataclass(frozen=True, slots=True)
class Guess:
    """What is likely to come next."""

    token_ids: tuple[int, ...] = ()
    """It may be empty."""
    grade: int = 0
    """How sure the source is, by a measure of its own: how often a grade is right is learned from what comes."""


class DraftSource(Protocol):
    """Guesses tokens. It is asked once for nearly every token, between two steps: it must answer in microseconds."""

    def propose(self, request: RequestId, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
        """Returns at most `most` tokens that may follow `prompt` and `generated`, of which it has seen a beginning."""
        ...

    def forget(self, request: RequestId) -> None:
        """Hears that the request has ended."""
        ...
