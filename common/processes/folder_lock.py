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
        if _identity(os.stat(self._descriptor)) == _identity_at(self._path):
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = _open(self._path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
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
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = _open(path)
    except OSError as error:
        raise ConfigurationError(f"STATE_DIR={folder} cannot be used: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigurationError(
            f"another {holder} runs on STATE_DIR={folder}: give each mesh a folder of its own"
        ) from None
    return FolderLock(path, holder, descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity_at(path: Path) -> tuple[int, int] | None:
    try:
        return _identity(os.stat(path))
    except FileNotFoundError:
        return None
