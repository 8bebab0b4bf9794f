"""A node is ended by SIGTERM and started again as soon as it has gone, as a deployment does."""

from __future__ import annotations

from chaos.faults.stop import Stop


class Restart(Stop):
    """As `stop`, but the victims come back at once."""

    name = "restart"
    comes_back = True
