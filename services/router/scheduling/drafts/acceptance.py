"""How often guesses are right, learned from the tokens that came, whether or not they had been drafted. Pure.

A rate is that of one guessed token, if all before it in its guess were right. It depends on the grade of the guess and
on its place in it, and differs by request: each begins with what all have shown, and leaves that the sooner the
more is seen of itself. What is seen of long ago counts less and less.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.ids import RequestId

FIRST_RATE = 0.3
"""Of a first token, as long as nothing has been seen."""
PRIOR_WEIGHT = 4.0
"""Tokens for which counts what is taken from elsewhere: places before it, or other requests."""
REQUEST_MEMORY, COMMON_MEMORY = 24.0, 256.0
"""Tokens that one is seen for: those of before have faded."""
LAST_PLACE = 4
"""Places from 2^(LAST_PLACE - 1) on are one."""


@dataclass(slots=True)
class _Seen:
    """Guessed tokens of one grade and place, of late."""

    right: float = 0.0
    total: float = 0.0

    def note(self, is_right: bool, memory: float) -> None:
        fading = 1 - 1 / memory
        self.right = self.right * fading + is_right
        self.total = self.total * fading + 1

    def rate(self, prior: float) -> float:
        """Returns the share of right ones, where `prior` counts as PRIOR_WEIGHT tokens."""
        return (self.right + PRIOR_WEIGHT * prior) / (self.total + PRIOR_WEIGHT)


@dataclass(slots=True)
class _SeenByGrade:
    """What was seen by grade and place, of all requests or of one."""

    memory: float
    grades: dict[int, list[_Seen]] = field(default_factory=dict)

    def places(self, grade: int) -> list[_Seen]:
        if (places := self.grades.get(grade)) is None:
            places = self.grades[grade] = [_Seen() for _ in range(LAST_PLACE + 1)]
        return places


class Acceptance:
    """What was seen of requests, and of all together, in whatever pipeline they run."""

    def __init__(self) -> None:
        self._common = _SeenByGrade(COMMON_MEMORY)
        self._requests: dict[RequestId, _SeenByGrade] = {}

    def rates(self, request: RequestId, grade: int, num_tokens: int) -> list[float]:
        """Returns for each token of a guess how likely it is right if those before it are."""
        of_all, own = self._common.places(grade), self._requests.get(request)
        of_own = None if own is None else own.places(grade)
        by_place: list[float] = []
        common_rate = own_rate = FIRST_RATE
        for place in range(_place(num_tokens - 1) + 1):
            common_rate = of_all[place].rate(common_rate)
            if of_own is None:
                own_rate = common_rate
            else:
                # Where it has not come to yet, the places before say something too: it is tried if either is promising.
                own_rate = of_own[place].rate(common_rate if place == 0 else max(common_rate, own_rate))
            by_place.append(own_rate)
        return [by_place[_place(position)] for position in range(num_tokens)]

    def note(self, request: RequestId, grade: int, num_right: int, *, has_wrong: bool) -> None:
        """Notes that so many tokens of a guess were right, and whether the next one was wrong: else it was the last, or
        is not known yet."""
        if (own := self._requests.get(request)) is None:
            own = self._requests[request] = _SeenByGrade(REQUEST_MEMORY)
        for seen in (self._common, own):
            places = seen.places(grade)
            for position in range(num_right + has_wrong):
                places[_place(position)].note(position < num_right, seen.memory)

    def forget(self, request: RequestId) -> None:
        """Drops what was seen of a request; what all have shown stays."""
        self._requests.pop(request, None)


def _place(position: int) -> int:
    """Returns the place that a position counts as: 0, 1, 2 to 3, 4 to 7, ..."""
    return min(position.bit_length(), LAST_PLACE)
