"""Which tokens run next. Pure: no socket, clock, log or torch."""
