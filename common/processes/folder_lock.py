"""One holder a folder: an advisory lock on a file in it, gone with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from common.errors import ConfigurationError, FencedError


class FolderLock:
    """Held until `close`, or until this process ends. The file may be removed: `look_after` makes it again."""

    def __init__(self, path: Path, holder: str, descriptor: int) -> None:
        """Made by `lock_folder`."""
        self._path = path
        self._holder = holder
        self._descriptor = descriptor

    def look_after(self) -> bool:
        """One `stat` while the file is there. True if it was gone and is there again.

        Raises FencedError if another process has locked a new one meanwhile, OSError if none can be made.
        """
        if _leads_to(self._path, self._descriptor):
            return False
        try:
            descriptor = _open_locked(self._path)
        except BlockingIOError:
            raise FencedError(
                f"another {self._holder} has taken {self._path.parent}, whose lock file was removed: this one exits"
            ) from None
        os.close(self._descriptor)
        self._descriptor = descriptor
        return True

    def close(self) -> None:
        """Lets another one have the folder."""
        os.close(self._descriptor)


def lock_folder(folder: Path, holder: str) -> FolderLock:
    """Make the folder and lock it for a `holder` (`router`, `mesh`).

    Raises ConfigurationError if another one holds it or it cannot be made.
    """
    path = folder / f"{holder}.lock"
    try:
        return FolderLock(path, holder, _open_locked(path))
    except BlockingIOError:
        raise ConfigurationError(
            f"another {holder} runs on STATE_DIR={folder}: give each mesh a folder of its own"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"STATE_DIR={folder} cannot be used: {error}") from None


def _open_locked(path: Path) -> int:
    """Makes the folder and the file where they are missing. Raises BlockingIOError where another process has the lock,
    and OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
