"""Standard streams of a process that was started without some of them, as daemons and schedulers do it."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Opens each of them that is closed, on nothing. The next file or socket would else take its number, and get what
    is meant for a terminal. To be called before anything else is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
