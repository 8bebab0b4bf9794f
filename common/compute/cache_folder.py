"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import structlog

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
