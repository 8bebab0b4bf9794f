"""The HTTP server of the front."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn


class FrontServer(uvicorn.Server):
    """Says when it begins to end: clients that can come back are sent away at once, others get their time."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._on_shutdown()
        await super().shutdown(sockets)
