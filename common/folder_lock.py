"""One holder a folder: an advisory lock on a file in it, gone with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from common.errors import ConfigurationError


def lock_folder(folder: Path, holder: str) -> int:
    """Make the folder and lock it for a `holder` (`router`, `mesh`); the descriptor to close when it is done.

    Raises ConfigurationError if another one holds it or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / f"{holder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"STATE_DIR={folder} cannot be used: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigurationError(
            f"another {holder} runs on STATE_DIR={folder}: give each mesh a folder of its own"
        ) from None
    return descriptor
