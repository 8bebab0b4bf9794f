"""How much of requests is kept, for a restart and for clients that come back. Pure.

There are two accounts. What may be asked for again is kept until JOURNAL_RETENTION_S after its end, so a client that
asks for much of that would fill memory and disk in time; a plain request is there until its end only. A full account
does not keep the other's requests out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import OverloadedError

PLAIN_RETRY_AFTER_S = 1


@dataclass(slots=True)
class KeptAmount:
    """What one account holds."""

    num_requests: int = 0
    num_bytes: int = 0
    """Bodies count as they came, and so do the packed tokens of requests that have ended."""


class KeptBounds:
    """Counts both accounts. The caller that adds a request has checked it, and has waited for nothing in between."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.kept, self.plain = KeptAmount(), KeptAmount()
        self._forgotten_at: dict[str, float] = {}
        """Maps requests that have ended to the time at which each is forgotten, in that order."""

    def check(self, is_kept: bool, num_bytes: int, now_s: float) -> None:
        """Checks that there is room for one more request of this many bytes. Raises OverloadedError."""
        amount = self.kept if is_kept else self.plain
        if is_kept and amount.num_requests >= self._max_requests:
            raise OverloadedError(
                f"{amount.num_requests} resumable or idempotent requests are kept, which is all that "
                f"JOURNAL_MAX_REQUESTS={self._max_requests} lets this router keep; {self._way_out}",
                self._retry_after_s(is_kept, now_s),
            )
        if amount.num_bytes + num_bytes > self._max_bytes:
            what = "resumable or idempotent requests" if is_kept else "requests that are under way"
            raise OverloadedError(
                f"{amount.num_bytes} bytes of {what} are kept, and this one has {num_bytes}: together more than "
                f"JOURNAL_MAX_BYTES={self._max_bytes} lets this router keep; "
                f"{self._way_out if is_kept else 'try again later'}",
                self._retry_after_s(is_kept, now_s),
            )

    def add(self, is_kept: bool, num_bytes: int) -> None:
        """Counts one more request."""
        amount = self.kept if is_kept else self.plain
        amount.num_requests += 1
        amount.num_bytes += num_bytes

    def remove(self, is_kept: bool, num_bytes: int) -> None:
        """Counts one request less, which was added with this many bytes."""
        amount = self.kept if is_kept else self.plain
        amount.num_requests -= 1
        amount.num_bytes -= num_bytes
        assert amount.num_requests >= 0 <= amount.num_bytes, "more removed than added"

    def note_end(self, reply_id: str, forgotten_at_s: float) -> None:
        """Notes when a kept request is forgotten. Call it in the order of their ends, with the wall clock."""
        self._forgotten_at[reply_id] = forgotten_at_s

    def forget_end(self, reply_id: str) -> None:
        """Forgets the end of a request; one that has not ended is not an error."""
        self._forgotten_at.pop(reply_id, None)

    @property
    def _way_out(self) -> str:
        return "send it as a plain one, delete others with DELETE /v1/requests/{id}, or try again later"

    def _retry_after_s(self, is_kept: bool, now_s: float) -> int:
        """Returns the time until the request that ended first is forgotten."""
        first_s = next(iter(self._forgotten_at.values()), None)
        if not is_kept or first_s is None:
            return PLAIN_RETRY_AFTER_S
        return max(1, math.ceil(first_s - now_s))
