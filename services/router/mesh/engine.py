"""The Engine that the front sees: requests go to the mesh thread, tokens come back into asyncio queues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from common.errors import MoemeshError, NotReadyError, OverloadedError
from common.ids import RequestId
from services.router.control.readiness import judge_age
from services.router.engine import GenerationRequest, Readiness, Token
from services.router.mesh.loop import MeshLoop
from services.router.mesh.status import describe_mesh
from services.router.scheduling.admission import retry_after_s

Outcome = Token | MoemeshError
NOT_READY_GRACE_S = 10.0
"""While the mesh recovers, requests wait; once it has been down for this long, the door says so at once."""


class TokenMailbox:
    """Hands outcomes from the mesh thread to the coroutines that wait for them; one hand-over a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queues: dict[RequestId, asyncio.Queue[Outcome]] = {}

    def open(self, request_id: RequestId) -> asyncio.Queue[Outcome]:
        """Opens a queue for a request's outcomes; in the event loop."""
        queue: asyncio.Queue[Outcome] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def close(self, request_id: RequestId) -> None:
        """Closes it, in the event loop: what still comes for it is dropped."""
        self._queues.pop(request_id, None)

    def __call__(self, outcomes: list[tuple[RequestId, Outcome]]) -> None:
        """Hands them over, from the mesh thread, or from the disk's where there is a journal."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, outcomes)

    def _deliver(self, outcomes: list[tuple[RequestId, Outcome]]) -> None:
        for request_id, outcome in outcomes:
            queue = self._queues.get(request_id)
            if queue is not None:
                queue.put_nowait(outcome)


class SubmittedChoice(AsyncIterator[Token]):
    """A choice that is in the mesh from the moment this is made, also if it is never asked for a token.

    No generator: closing one that was not begun runs none of it, and the choice would run on.
    """

    def __init__(
        self, request_id: RequestId, queue: asyncio.Queue[Outcome], mailbox: TokenMailbox, mesh: MeshLoop
    ) -> None:
        self._request_id = request_id
        self._queue = queue
        self._mailbox = mailbox
        self._mesh = mesh
        self._has_ended = False

    async def __anext__(self) -> Token:
        """Returns the next token. Raises what the mesh says, and StopAsyncIteration after the last token."""
        if self._has_ended:
            raise StopAsyncIteration
        try:
            outcome = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(outcome, MoemeshError):
            self._end()
            raise outcome
        if outcome.finish_reason is not None:
            self._end()
        return outcome

    async def aclose(self) -> None:
        """Cancels it in the mesh, unless it has ended."""
        if not self._has_ended:
            self._end()
            self._mesh.cancel(self._request_id)

    def _end(self) -> None:
        self._has_ended = True
        self._mailbox.close(self._request_id)


class MeshEngine:
    """See `services.router.engine.Engine`."""

    def __init__(
        self,
        mesh: MeshLoop,
        mailbox: TokenMailbox,
        max_context_tokens: int,
        clock: Callable[[], float],
        *,
        max_waiting: int,
        takes_over: bool = False,
    ) -> None:
        """`max_waiting`: what the scheduler's queue holds. `takes_over`: a router ran before this one, whose nodes will
        be back in a moment."""
        self._grace_from_s = clock() if takes_over else None
        self._mesh = mesh
        self._mailbox = mailbox
        self.max_context_tokens = max_context_tokens
        self._clock = clock
        self._max_waiting = max_waiting

    def readiness(self) -> Readiness:
        """Reads the last status of the mesh thread, if it is fresh."""
        status = self._mesh.status
        return judge_age(status.readiness, status.published_s, self._clock())

    def describe_mesh(self) -> dict[str, Any]:
        """Describes the same status."""
        return describe_mesh(self._mesh.status, self.readiness())

    def check_room(self, num_choices: int) -> None:
        """Checks by the last status; see the protocol. The scheduler's door has the last word."""
        self._check_ready()
        status = self._mesh.status
        num_waiting = status.scheduler.num_ahead
        if num_waiting + num_choices - 1 >= self._max_waiting and num_waiting:
            raise OverloadedError(
                f"{num_waiting} requests are waiting of {self._max_waiting} that the queue holds, and this one has "
                f"{num_choices} choices; try again later",
                retry_after_s(num_waiting, status.completions_per_s),
            )

    def generate(self, request: GenerationRequest) -> SubmittedChoice:
        """Yields tokens as they come; see the protocol.

        The request is in line when this returns: the stages of a restored one may be back a moment later, and only what
        is in line gets its cache.
        """
        queue = self._mailbox.open(request.request_id)
        try:
            if not request.is_restored:
                self._check_ready()
            self._mesh.submit(request)
        except NotReadyError as error:
            queue.put_nowait(error)
        return SubmittedChoice(request.request_id, queue, self._mailbox, self._mesh)

    def _check_ready(self) -> None:
        status = self._mesh.status
        served_s = self._grace_from_s if status.served_s is None else status.served_s
        if served_s is None or self._clock() - served_s > NOT_READY_GRACE_S:
            raise NotReadyError(f"the mesh is not ready: {status.readiness.detail}")
