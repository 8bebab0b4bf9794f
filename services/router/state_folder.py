"""The router's folder on disk: locked while a router runs on it, and the term that grows with every start."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import ConfigurationError
from common.folder_lock import lock_folder
from common.ids import RouterTerm


class StateFolder:
    """Open with `open_state_folder`; hold until the process ends."""

    def __init__(self, path: Path, term: RouterTerm, lock_descriptor: int) -> None:
        self.path = path
        self.term = term
        self._lock_descriptor = lock_descriptor

    def close(self) -> None:
        """Let another router have it."""
        os.close(self._lock_descriptor)


def open_state_folder(path: Path) -> StateFolder:
    """Lock the folder and take the next term. Raises ConfigurationError if another router runs on it."""
    descriptor = lock_folder(path, "router")
    try:
        return StateFolder(path, _next_term(path / "router.json"), descriptor)
    except ConfigurationError:
        os.close(descriptor)
        raise


def _next_term(path: Path) -> RouterTerm:
    term = 0
    if path.exists():
        try:
            term = json.loads(path.read_text())["term"]
            if type(term) is not int or term < 0:
                raise ValueError(f"term is {term!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is damaged ({error}): remove it once no node of its mesh runs") from None
    # Renamed into place, so that a crash leaves the old term or the new one, never half a file.
    replacement = path.with_suffix(".new")
    with replacement.open("w") as stream:
        json.dump({"term": term + 1}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    replacement.replace(path)
    return RouterTerm(term + 1)
