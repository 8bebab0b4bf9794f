"""Whether the rings of a process can be looked into from here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _may_look() -> bool:
    try:
        os.stat(next(Path("/proc/self/map_files").iterdir()))  # to list the folder takes less than to follow its links
    except OSError:
        return False
    return True


needs_rings = pytest.mark.skipif(not _may_look(), reason="what a process has mapped may not be looked at here")
