"""Who is to blame: what is raised while one request is handled ends that request, and not the mesh. Pure."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from services.router.scheduling.request import Request

Attend = Callable[[str], None]
"""Told whose turn it is, before anything is done for it; the empty string once nobody's is."""


class Blame:
    """Keeps the requests whose handling raised, until their owner ends them."""

    def __init__(self, attend: Attend = lambda name: None) -> None:
        self.attend = attend
        self._broken: dict[Request, Exception] = {}
        self._handled: list[Request] = []
        """Innermost last: one may be handled for the sake of another, who needs its blocks."""

    def handling(self, request: Request) -> Handling:
        """A context in which an exception is kept with the request and goes no further. What ends the process is
        passed on, and the request stays the one that was attended to."""
        return Handling(self, request)

    def has(self, request: Request) -> bool:
        """Whether its handling raised: its owner ends it in a moment, and nothing more is to be done for it."""
        return request in self._broken

    def take(self) -> list[tuple[Request, Exception]]:
        """Requests whose handling raised since the last call, with the first that each of them raised."""
        broken, self._broken = self._broken, {}
        return list(broken.items())

    def begin(self, request: Request) -> None:
        """It is its turn."""
        self._handled.append(request)
        self.attend(request.request_id)

    def end(self, request: Request, error: BaseException | None) -> bool:
        """Its turn is over; whether the error is dealt with."""
        if error is not None and not isinstance(error, Exception):
            return False
        self._handled.pop()
        self.attend(self._handled[-1].request_id if self._handled else "")
        if error is not None:
            self._broken.setdefault(request, error)
        return True


class Handling:
    """See `Blame.handling`. A class, since a generator would cost more than what it guards."""

    __slots__ = ("_blame", "_request")

    def __init__(self, blame: Blame, request: Request) -> None:
        self._blame, self._request = blame, request

    def __enter__(self) -> None:
        self._blame.begin(self._request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return self._blame.end(self._request, error)
