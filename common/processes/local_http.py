"""Asking a server of this host, whatever proxy the environment names: urllib would send the question there."""

from __future__ import annotations

import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_local(url: str, timeout_s: float) -> Any:
    """As urllib's `urlopen`. Raises OSError, urllib's HTTPError among them, and http.client's HTTPException."""
    return _OPENER.open(url, timeout=timeout_s)
