"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

LOOK_S = 0.05
"""Between looks at whether another process has done with compiling."""

log = structlog.get_logger(__name__)


def default_cache_folder(environment: Mapping[str, str]) -> Path:
    """MOEMESH_CACHE, else ~/.cache/moemesh, else a folder of this user's own among the temporary files.

    A user of a container, say, may have no name and no home, or one that cannot be written to.
    """
    configured = environment.get("MOEMESH_CACHE")
    if configured:
        return Path(configured)
    home = Path(os.path.expanduser("~"))
    folder = home / ".cache" / "moemesh"
    if home.is_absolute() and _can_be_made(folder):
        return folder
    instead = Path(tempfile.gettempdir()) / f"moemesh-cache-{os.getuid()}"
    log.warning(
        "no_cache_folder",
        reason=f"no home directory that can be written to: compiled kernels go to {instead}, or to MOEMESH_CACHE",
    )
    return instead


def _can_be_made(folder: Path) -> bool:
    """Whether files can be made in it, once those of its parents that are missing are there."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(there, os.W_OK | os.X_OK)


def refuse_folder_of_others(folder: Path) -> None:
    """Raises PermissionError. Among the temporary files anybody may make a folder of that name and put code into it."""
    if folder.exists() and folder.stat().st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{folder} belongs to another user: MOEMESH_CACHE must name a folder of your own")


@contextmanager
def compiler_turn(
    folder: Path,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """While no other process compiles into this folder, which is made if need be. Raises OSError.

    One that takes longer than `patience_s`, because it was stopped, say, is not waited for: whoever compiles beside it
    does harm to nobody, since what is compiled is renamed into place.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    until_s = clock() + patience_s
    with (folder / "compile.lock").open("w") as lock:
        while not _is_locked(lock.fileno()):
            if clock() >= until_s:
                log.warning("compiler_not_waited_for", reason=f"another process compiles for over {patience_s:.0f} s")
                break
            sleep(LOOK_S)
        yield


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
