"""Which requests may enter, and where in line: checked before anything is spent on them. Pure.

Places in line: first come, first served among HTTP requests. A choice's place is the number of its request plus how
many choices of the request stand before it: each further choice lets one more request pass that came later. So a
request with hundreds of choices has but its first two ahead of the next request, and its last one waits for a bounded
number of others.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import (
    CapacityError,
    ContextLengthError,
    DeadlineError,
    InvalidRequestError,
    MeshError,
    NotReadyError,
    OverloadedError,
)
from services.router.engine import GenerationRequest
from services.router.scheduling.settings import SchedulerSettings

MAX_RETRY_AFTER_S = 60
"""No client is sent away for longer: the estimate is from few samples, and the mesh may have grown by then."""
PLACE_SHIFT = 32
"""Behind the place stands the order of arrival, which makes it unique."""
WAITING_SHARE = 8
"""A request counts towards the others' queue with at most one part in this many of it."""
RESERVED_SHARE = 0.75
"""The share of all reservable tokens that the choices of one request may reserve."""


def num_blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Returns how many blocks hold this many tokens."""
    return -(-num_tokens // block_tokens)


class CompletionRate:
    """Requests completed per second, over the latest few."""

    def __init__(self, num_samples: int = 32) -> None:
        self._times_s: deque[float] = deque(maxlen=num_samples)

    def note(self, now_s: float) -> None:
        """Notes that a request has ended and made room."""
        self._times_s.append(now_s)

    def per_s(self, now_s: float) -> float:
        """Returns 0.0 while fewer than two have ended. The time since the latest counts, so that a standstill shows."""
        if len(self._times_s) < 2:
            return 0.0
        return (len(self._times_s) - 1) / max(now_s - self._times_s[0], 1e-3)


def retry_after_s(num_waiting: int, completions_per_s: float) -> int:
    """Returns in how many seconds the line ahead would be served, in [1, MAX_RETRY_AFTER_S]."""
    if num_waiting == 0:
        return 1
    if completions_per_s * MAX_RETRY_AFTER_S <= num_waiting:
        return MAX_RETRY_AFTER_S
    return max(1, math.ceil(num_waiting / completions_per_s))


def lateness(request: GenerationRequest, age_s: float, pool_blocks: Sequence[int], block_tokens: int) -> MeshError:
    """Returns why a request took too long, as well as the blocks of the open pipelines tell."""
    num_blocks = num_blocks_for(request.max_num_tokens, block_tokens)
    if not pool_blocks:
        return NotReadyError(f"the request timed out after {age_s:.0f} s: no pipeline is open")
    if num_blocks > max(pool_blocks):
        return CapacityError(
            f"the request timed out after {age_s:.0f} s: it needs {num_blocks} cache blocks, the largest pipeline has "
            f"{max(pool_blocks)}"
        )
    return DeadlineError(f"the request timed out after {age_s:.0f} s")


def group_of(request: GenerationRequest) -> str:
    """Returns the name of its HTTP request, or its own."""
    return request.group or request.request_id


@dataclass(slots=True)
class _Group:
    """The choices of one HTTP request."""

    number: int
    num_entered: int = 0
    num_inside: int = 0
    reserved_tokens: int = 0


class Admission:
    """The door. It gives each request that it lets in a place in line, and reserves its tokens: two requests cannot
    both take the last ones."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._max_waiting = settings.max_waiting
        self._max_reserved_tokens = settings.max_reserved_tokens
        self._block_tokens = settings.block_tokens
        self.reserved_tokens = 0
        """Prompt and max_tokens of everything that was let in and has not ended."""
        self._groups: dict[str, _Group] = {}
        """Those of which a choice is inside."""
        self._num_groups = 0
        self._num_arrived = 0

    def admit(
        self, request: GenerationRequest, *, num_waiting: int, largest_pool_blocks: int | None, completions_per_s: float
    ) -> int:
        """Lets a request in, and returns its place in line; or raises.

        `largest_pool_blocks` is None while no pipeline is open: then any size may wait for one.
        Raises InvalidRequestError, ContextLengthError (can never fit), OverloadedError (not now).
        """
        self._check_size(request, largest_pool_blocks)
        if num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{num_waiting} requests are waiting, which is all the queue holds; try again later",
                retry_after_s(num_waiting, completions_per_s),
            )
        num_tokens = request.max_num_tokens
        if self.reserved_tokens and self.reserved_tokens + num_tokens > self._max_reserved_tokens:
            raise OverloadedError(
                f"{self.reserved_tokens} tokens are reserved of {self._max_reserved_tokens}, and this request may need "
                f"{num_tokens}; try again later",
                retry_after_s(max(1, num_waiting), completions_per_s),
            )
        group, share = self._groups.get(group_of(request)), int(RESERVED_SHARE * self._max_reserved_tokens)
        if group is not None and group.reserved_tokens + num_tokens > share:
            raise InvalidRequestError(
                f"the choices of one request may have {share} tokens in all (prompts and max_tokens of each); these "
                f"need more than {group.reserved_tokens}: ask for fewer choices or prompts, or for fewer max_tokens",
                "max_tokens",
            )
        return self.readmit(request)

    def _check_size(self, request: GenerationRequest, largest_pool_blocks: int | None) -> None:
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        if num_prompt_tokens < 1:
            raise InvalidRequestError("the prompt has no token; at least 1 is needed", "prompt")
        if max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {max_tokens}; at least 1 is needed", "max_tokens")
        num_blocks = num_blocks_for(request.max_num_tokens, self._block_tokens)
        if largest_pool_blocks is not None and num_blocks > largest_pool_blocks:
            raise ContextLengthError(
                f"{num_prompt_tokens} prompt tokens + {max_tokens} max_tokens = {request.max_num_tokens} tokens need "
                f"{num_blocks} cache blocks of {self._block_tokens} tokens; the largest pipeline has "
                f"{largest_pool_blocks} ({largest_pool_blocks * self._block_tokens} tokens)",
                "max_tokens",
            )

    def readmit(self, request: GenerationRequest) -> int:
        """Lets a request in that was inside before a restart. Returns its place in line."""
        group = self._group(request)
        self._num_arrived += 1
        place = group.number + group.num_entered << PLACE_SHIFT | self._num_arrived
        group.num_entered += 1
        self._count(request)
        return place

    def recount(self, requests: Iterable[GenerationRequest]) -> None:
        """Counts anew, from all that are inside."""
        self.reserved_tokens = 0
        for group in self._groups.values():
            group.num_inside = group.reserved_tokens = 0
        for request in requests:
            self._count(request)
        self._groups = {name: group for name, group in self._groups.items() if group.num_inside}

    def release(self, request: GenerationRequest) -> None:
        """Gives back what a request that was let in had reserved: it has ended, however."""
        self._count(request, -1)
        assert self.reserved_tokens >= 0, "more tokens released than reserved"
        if not self._groups[group_of(request)].num_inside:
            del self._groups[group_of(request)]

    def _group(self, request: GenerationRequest) -> _Group:
        name = group_of(request)
        if name not in self._groups:
            self._num_groups += 1
            self._groups[name] = _Group(self._num_groups)
        return self._groups[name]

    def _count(self, request: GenerationRequest, times: int = 1) -> None:
        group = self._group(request)
        group.num_inside += times
        group.reserved_tokens += times * request.max_num_tokens
        self.reserved_tokens += times * request.max_num_tokens


def num_ahead(waiting: Iterable[GenerationRequest], newcomer: GenerationRequest | None, max_waiting: int) -> int:
    """Counts choices in line, as far as a newcomer is concerned: all of its own request, of any other its share."""
    share = max(1, max_waiting // WAITING_SHARE)
    by_group = Counter(group_of(request) for request in waiting)
    own = by_group.pop(group_of(newcomer), 0) if newcomer is not None else 0
    return own + sum(min(count, share) for count in by_group.values())
