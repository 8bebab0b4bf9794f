"""Which node does what. Pure: no socket, clock, log or torch."""
