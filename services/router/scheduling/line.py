"""Places in line: first come, first served among HTTP requests, and what one of them may take from the others.

A choice's place is the number of its request plus how many choices of the request stand before it: each further choice
lets one more request pass that came later. So a request with hundreds of choices has but its first two ahead of the
next request, and its last one waits for a bounded number of others. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from services.router.engine import GenerationRequest

PLACE_SHIFT = 32
"""Behind the place stands the order of arrival, which makes it unique."""
WAITING_SHARE = 8
"""A request counts towards the others' queue with at most one part in so many of it."""
RESERVED_SHARE = 0.75
"""Of all tokens that may be reserved, what the choices of one request may reserve."""


def group_of(request: GenerationRequest) -> str:
    """The name of its HTTP request, or its own."""
    return request.group or request.request_id


@dataclass(slots=True)
class _Group:
    number: int
    num_taken: int = 0
    num_inside: int = 0


class Line:
    """Gives out places."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._num_groups = 0
        self._num_arrived = 0

    def take_place(self, request: GenerationRequest) -> int:
        """For a request that is let in."""
        name = group_of(request)
        if name not in self._groups:
            self._num_groups += 1
            self._groups[name] = _Group(self._num_groups)
        group = self._groups[name]
        self._num_arrived += 1
        place = group.number + group.num_taken << PLACE_SHIFT | self._num_arrived
        group.num_taken += 1
        group.num_inside += 1
        return place

    def leave(self, request: GenerationRequest) -> None:
        """It has ended. One that is not here is no error."""
        group = self._groups.get(group_of(request))
        if group is not None:
            group.num_inside -= 1
            if not group.num_inside:
                del self._groups[group_of(request)]


def num_ahead(waiting: Iterable[GenerationRequest], newcomer: GenerationRequest | None, max_waiting: int) -> int:
    """How many wait, as far as the newcomer's door is concerned: of its own request all, of any other one its share."""
    share = max(1, max_waiting // WAITING_SHARE)
    by_group = Counter(group_of(request) for request in waiting)
    own = by_group.pop(group_of(newcomer), 0) if newcomer is not None else 0
    return own + sum(min(count, share) for count in by_group.values())
