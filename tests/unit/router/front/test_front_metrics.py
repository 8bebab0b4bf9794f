"""The page of metrics: what it costs, and how new it is."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from services.router.front.metrics import FrontMetrics


class Counted(FrontMetrics):
    """Knows how often its page was made."""

    times = 0

    def text(self) -> bytes:
        self.times += 1
        return super().text()


def test_a_page_is_made_once_for_all_who_ask_at_the_same_time_and_is_never_older_than_the_question() -> None:
    async def main() -> None:
        metrics = Counted(CollectorRegistry())
        for asked in range(3):
            metrics.cancelled.inc()
            pages = [asyncio.create_task(metrics.shared_text()) for _ in range(50)]
            await asyncio.sleep(0)
            metrics.abandoned.inc()
            pages[0].cancel()
            for page in await asyncio.gather(*pages[1:]):
                assert f"moemesh_http_requests_cancelled_total {asked + 1}.0".encode() in page
            assert metrics.times == asked + 1

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_page_that_cannot_be_made_is_made_anew_for_the_next_one() -> None:
    class Broken(FrontMetrics):
        is_broken = True

        def text(self) -> bytes:
            if self.is_broken:
                raise OSError("no /proc")
            return super().text()

    async def main() -> None:
        metrics = Broken(CollectorRegistry())
        with pytest.raises(OSError, match="no /proc"):
            await metrics.shared_text()
        metrics.is_broken = False
        assert await metrics.shared_text()

    asyncio.run(asyncio.wait_for(main(), 10))
