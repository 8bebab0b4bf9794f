"""The HTTP server of the front."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from services.router.front.front_protocol import FrontProtocol

PATIENCE_S = 4.0
"""For replies that are under way when the server is to end."""
LOOK_S = 0.1
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
    ) -> None:
        """`give_up` is to end what is still under way after PATIENCE_S, or once `may_finish` says that nothing more
        comes."""
        super().__init__(
            uvicorn.Config(
                app,
                http=FrontProtocol,
                ws="none",  # no route speaks it, and its connections would have other limits
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(CUT_S),
                server_header=False,
            )
        )
        self._on_shutdown = on_shutdown
        self._give_up = give_up
        self._may_finish = may_finish

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
