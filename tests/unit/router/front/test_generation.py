from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.errors import ExecutionError
from common.ids import RequestId
from services.router.engine import GeneratedToken, GenerationRequest
from services.router.front.choice_stream import ChoiceEvent, PlannedChoice
from services.router.front.generation import GenerationRun
from services.router.front.metrics import FrontMetrics
from services.router.front.tokenizer import TextTokenizer
from services.router.scheduling.sampling_parameters import SamplingParameters
from tests.support.fake_engine import FakeEngine, Fault, Pause

EOS = 2


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def start(engine: FakeEngine, tokenizer: TextTokenizer, num_choices: int = 1, *stop_strings: str) -> GenerationRun:
    sampling = SamplingParameters(50, 1.0, 1.0, 0, 1, None, frozenset({EOS}))
    choices = [
        PlannedChoice(index, GenerationRequest(RequestId(f"r-{index}"), (5,), sampling, index), stop_strings, "")
        for index in range(num_choices)
    ]
    return GenerationRun(engine, tokenizer, choices, FrontMetrics(CollectorRegistry()), clock=lambda: 0.0)


async def collect(generation: GenerationRun) -> list[ChoiceEvent]:
    events: list[ChoiceEvent] = []
    while not generation.finished:
        events += await generation.next_events(timeout_s=None)
    return events


def test_choices_run_side_by_side(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        first, second = [*tokenizer.encode("fox"), EOS], [*tokenizer.encode("dog"), EOS]
        engine = FakeEngine(script_by_choice={0: first, 1: second})
        async with start(engine, tokenizer, 2) as generation:
            events = await collect(generation)
        texts = {index: "".join(event.text for event in events if event.index == index) for index in range(2)}
        assert texts == {0: "fox", 1: "dog"}
        assert generation.num_completion_tokens == len(first) + len(second)
        assert engine.cancelled == []

    run(main())


def test_nothing_in_time_is_an_empty_list(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script=[Pause(), EOS])
        async with start(engine, tokenizer) as generation:
            assert await generation.next_events(timeout_s=0.001) == []
            engine.gate.set()
            assert len(await collect(generation)) == 1

    run(main())


def test_events_before_an_error_come_before_it(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script=[*tokenizer.encode("ab"), Fault(ExecutionError("bad row"))])
        async with start(engine, tokenizer) as generation:
            events: list[ChoiceEvent] = []
            while len(events) < 2:
                events += await generation.next_events(timeout_s=None)
            with pytest.raises(ExecutionError, match="bad row"):
                await generation.next_events(timeout_s=None)
        assert [event.text for event in events] == ["a", "b"]

    run(main())


def test_leaving_cancels_what_is_not_finished(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script_by_choice={0: [5, EOS], 1: [5, Pause()]})
        async with start(engine, tokenizer, 2) as generation:
            events: list[ChoiceEvent] = []
            while not any(event.finish_reason for event in events):
                events += await generation.next_events(timeout_s=None)
        assert [request.choice for request in engine.cancelled] == [1]

    run(main())


def test_leaving_lets_a_stopped_choice_close_in_the_mesh(tokenizer: TextTokenizer) -> None:
    """Cancelling in the mesh may take a message; it must not be torn out of that."""

    class SlowToCancel(FakeEngine):
        closed = False

        async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
            try:
                async for token in super().generate(request):
                    yield token
            finally:
                await asyncio.sleep(0.01)
                self.closed = True

    async def main() -> None:
        engine = SlowToCancel(script=[*tokenizer.encode("fox jumps"), Pause()])
        async with start(engine, tokenizer, 1, "jum") as generation:
            await collect(generation)
        assert engine.closed

    run(main())
