"""What the router process says of itself before anything runs."""

from __future__ import annotations

import httpx
import pytest

from services.router.service import http_url


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "fe80::1"])
def test_the_address_is_one_that_clients_can_take_apart(host: str) -> None:
    url = httpx.URL(http_url(host, 8000))
    assert (url.host, url.port) == (host, 8000)
