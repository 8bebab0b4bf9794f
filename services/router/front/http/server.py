"""The HTTP server of the front."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from services.router.front.http.connection_answers import ConnectionLimits, refuse_connection
from services.router.front.http.protocol import FrontConfig
from services.router.front.metrics import ConnectionMetrics

PATIENCE_S = 4.0
"""For replies that are under way when the server is to end."""
LOOK_S = 0.1
ACCEPTED_AT_ONCE = 2
"""New connections in one turn of the loop. asyncio takes so many, in each of the three or four turns that it needs for
one, before the first of them can make room for itself: the whole queue at once would take all descriptors there are."""
QUEUED = 1024
"""Connections that wait in the kernel meanwhile."""
CUT_S = 5.0
"""After which uvicorn cuts connections; by then each has been told."""


class FrontServer(uvicorn.Server):
    """Says when it begins to end: clients that can come back are sent away at once, others get their time."""

    def __init__(
        self,
        app: ASGIApp,
        on_shutdown: Callable[[], None],
        give_up: Callable[[], None] = lambda: None,
        may_finish: Callable[[], bool] = lambda: True,
        limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008  # it cannot be changed
        metrics: ConnectionMetrics | None = None,
        refusing_app: ASGIApp = refuse_connection,
    ) -> None:
        """`give_up` is to end what is still under way after PATIENCE_S, or once `may_finish` says that nothing more
        comes. `refusing_app` answers where there is one connection too many."""
        super().__init__(
            FrontConfig(
                app,
                limits,
                metrics,
                refusing_app,
                ws="none",  # no route speaks it, and its connections would have other limits
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(CUT_S),
                server_header=False,
                backlog=ACCEPTED_AT_ONCE,
            )
        )
        self._on_shutdown = on_shutdown
        self._give_up = give_up
        self._may_finish = may_finish

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)  # asyncio has one number for this and for how many it takes at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._on_shutdown()
        ending = asyncio.create_task(self._end_rest())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_rest(self) -> None:
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if not self._may_finish():
                break
            await asyncio.sleep(LOOK_S)
        self._give_up()
