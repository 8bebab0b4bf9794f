"""Small files that others read at any moment: they see the old content or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put `text` at `path` for good, as UTF-8: written and synced beside it, then renamed into place. Raises OSError.

    One writer at a time.
    """
    replacement = path.with_name(f".{path.name}.new")
    with replacement.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    replacement.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)
