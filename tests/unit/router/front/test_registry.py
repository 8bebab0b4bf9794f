"""Whose turn it is to be planned again, as the registry says it to whoever keeps that for the next router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry

from common.errors import UnknownRequestError
from services.router.front.live_request import ClientIdentity
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import PlannedRequest, ReplyIdentity, RequestPlanner
from services.router.front.registry import RequestRegistry
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.records import JournalledChoice, JournalledRequest, RequestJournal
from tests.support.front.fake_engine import FakeEngine, Pause
from tests.support.front.journals import accepted

W, X = "w-0", "x-0"


class SlowPlanner(RequestPlanner):
    """It reads a request once its gate is open, as if a thread did so; those without a gate at once."""

    gates: dict[str, asyncio.Event]

    async def read(self, route: str, body: bytes, identity: ReplyIdentity) -> PlannedRequest:
        if identity.reply_id in self.gates:
            await self.gates[identity.reply_id].wait()
        return await super().read(route, body, identity)


class Front:
    """A registry that has restored these requests, and what it has told about whose turn it is."""

    def __init__(
        self, tokenizer: TextTokenizer, names: Sequence[str], slow: Sequence[str] = (), ended_s: float | None = None
    ) -> None:
        engine = FakeEngine(script=[Pause()])
        planner = SlowPlanner(tokenizer, FrontSettings("tiny"), lambda: engine.max_context_tokens)
        self.gates = planner.gates = {name: asyncio.Event() for name in slow}
        self.registry = RequestRegistry(
            engine,
            RequestJournal(),
            planner,
            FrontMetrics(CollectorRegistry()),
            settings=FrontSettings("tiny"),
            wall_clock=lambda: 0.0,
        )
        self.told: list[str] = []
        self.registry.attend_restored = self.told.append
        self.registry.restore([self._journalled(name, number, ended_s) for number, name in enumerate(names)])

    def find(self, name: str) -> asyncio.Task[object]:
        return asyncio.create_task(self.registry.find("t", name))

    @staticmethod
    def _journalled(name: str, number: int, ended_s: float | None) -> JournalledRequest:
        body = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 5}).encode()
        request = accepted(name, body=body, idempotency_key=f"key-{name}")
        return JournalledRequest(request, (JournalledChoice(),), ended_s, number)


async def turn() -> None:
    """Everybody runs until it waits for a gate."""
    for _ in range(5):
        await asyncio.sleep(0)


def changes(told: Sequence[str]) -> list[str]:
    """What stood there, one after another."""
    return [name for position, name in enumerate(told) if position == 0 or told[position - 1] != name]


@pytest.mark.parametrize("ended_s", [None, 0.0])
@pytest.mark.parametrize("by_key", [False, True])
def test_who_is_planned_again_because_its_client_asks_is_named(
    tokenizer: TextTokenizer, by_key: bool, ended_s: float | None
) -> None:
    async def main() -> None:
        front = Front(tokenizer, ["x"], ended_s=ended_s)
        if by_key:
            await front.registry.find_by_key(ClientIdentity("t", None, "key-x", True), "h")
        else:
            await front.registry.find("t", "x")
        assert changes(front.told) == [X, ""]
        await front.registry.go_on()
        assert changes(front.told) == [X, ""], "it lives already"
        await front.registry.close()

    asyncio.run(main())


def test_while_one_is_read_in_a_thread_another_that_is_asked_for_is_named_and_then_the_first_again(
    tokenizer: TextTokenizer,
) -> None:
    async def main() -> None:
        front = Front(tokenizer, ["w", "x"], slow=["w"])
        going_on = asyncio.create_task(front.registry.go_on())
        await turn()
        assert front.told == [W]
        await front.find("x")
        assert changes(front.told) == [W, X, W]
        front.gates["w"].set()
        await going_on
        assert changes(front.told) == [W, X, W, ""]
        await front.registry.close()

    asyncio.run(main())


def test_of_two_in_threads_who_is_through_first_is_named_while_it_is_restored_and_then_the_other(
    tokenizer: TextTokenizer,
) -> None:
    """The name that stood there before is that of one that is through: it must not come back."""

    async def main() -> None:
        front = Front(tokenizer, ["w", "x"], slow=["w", "x"])
        first = front.find("w")
        await turn()
        second = front.find("x")
        await turn()
        assert front.told == [W, X]
        front.gates["w"].set()
        await first
        assert changes(front.told) == [W, X, W, X]
        front.gates["x"].set()
        await second
        assert changes(front.told) == [W, X, W, X, ""]
        await front.registry.close()

    asyncio.run(main())


def test_whose_client_goes_away_meanwhile_or_who_cannot_be_planned_is_not_named_any_more(
    tokenizer: TextTokenizer,
) -> None:
    async def main() -> None:
        front = Front(tokenizer, ["w", "x"], slow=["w", "x"])
        first, second = front.find("w"), front.find("x")
        await turn()
        second.cancel()
        with suppress(asyncio.CancelledError):
            await second
        assert front.told == [W, X, W]
        front.registry._known.remove(front.registry._known.all()[0])  # as if it had been cancelled
        front.gates["w"].set()
        with pytest.raises(UnknownRequestError):
            await first
        assert changes(front.told) == [W, X, W, ""]
        await front.registry.close()

    asyncio.run(main())
