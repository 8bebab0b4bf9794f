"""How many files and sockets this process may have open."""

from __future__ import annotations

import contextlib
import resource

WANTED = 1 << 16
"""More than any mesh of this kind needs; without a bound a container's limit of a billion would be asked for."""


def raise_descriptor_limit() -> None:
    """As far as the system lets a process by itself: a shell's usual 1,024 are for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid it; what there is must do then
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """What this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED if soft == resource.RLIM_INFINITY else soft
