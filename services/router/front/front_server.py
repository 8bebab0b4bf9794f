"""The HTTP server of the front."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from services.router.front.front_protocol import FrontProtocol


class FrontServer(uvicorn.Server):
    """Says when it begins to end: clients that can come back are sent away at once, others get their time."""

    def __init__(self, app: ASGIApp, on_shutdown: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=FrontProtocol,
                ws="none",  # no route speaks it, and its connections would have other limits
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
                server_header=False,
            )
        )
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._on_shutdown()
        await super().shutdown(sockets)
