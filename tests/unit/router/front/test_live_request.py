"""A request in the mesh, and one client that reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.errors import ExecutionError, InvalidRequestError
from services.router.engine import GenerationRequest, Token, TokenStream
from services.router.front.live_request import ClientIdentity, LiveRequest, ReplyReader, parse_event_id
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import COMPLETIONS, ReplyIdentity, RequestPlanner
from services.router.front.registry import RequestRegistry
from services.router.front.settings import FrontSettings
from services.router.front.text.choice_stream import ChoiceEvent
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.records import JournalledChoice, RequestJournal
from tests.support.front.fake_engine import FakeEngine, Fault, Pause
from tests.support.front.journalling_front import (
    CHAT,
    RESUMABLE,
    Server,
    events_of,
    wait_for_end,
    wait_for_tokens,
)

EOS = 2


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def start(
    engine: FakeEngine, tokenizer: TextTokenizer, num_choices: int = 1, *stop_strings: str
) -> AbstractAsyncContextManager[ReplyReader]:
    settings, metrics = FrontSettings("tiny"), FrontMetrics(CollectorRegistry())
    planner = RequestPlanner(tokenizer, settings, lambda: engine.max_context_tokens)
    registry = RequestRegistry(
        engine, RequestJournal(), planner, metrics, settings=settings, clock=lambda: 0.0, wall_clock=lambda: 0.0
    )
    fields = {"model": "tiny", "prompt": [5], "max_tokens": 50, "n": num_choices, "stop": list(stop_strings)}
    body = json.dumps(fields).encode()
    planned = await planner.read(COMPLETIONS, body, ReplyIdentity("cmpl-r", 0, 1))
    return registry.attach(await registry.admit(planned, ClientIdentity("t", None, None, False), body, ""))


async def collect(generation: ReplyReader) -> list[ChoiceEvent]:
    events: list[ChoiceEvent] = []
    while not generation.finished:
        events += await generation.next_events(timeout_s=None)
    return events


def test_choices_run_side_by_side(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        first, second = [*tokenizer.encode("fox"), EOS], [*tokenizer.encode("dog"), EOS]
        engine = FakeEngine(script_by_choice={0: first, 1: second})
        async with await start(engine, tokenizer, 2) as generation:
            events = await collect(generation)
        texts = {index: "".join(event.text for event in events if event.index == index) for index in range(2)}
        assert texts == {0: "fox", 1: "dog"}
        assert generation.num_completion_tokens == len(first) + len(second)
        assert engine.cancelled == []

    run(main())


def test_nothing_in_time_is_an_empty_list(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script=[Pause(), EOS])
        async with await start(engine, tokenizer) as generation:
            assert await generation.next_events(timeout_s=0.001) == []
            engine.gate.set()
            assert len(await collect(generation)) == 1

    run(main())


def test_each_wait_has_its_whole_time_though_a_token_ended_the_one_before(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine = FakeEngine(script=[*tokenizer.encode("a"), Pause(), EOS])
        async with await start(engine, tokenizer) as generation:
            assert len(await generation.next_events(timeout_s=0.05)) == 1
            await asyncio.sleep(0.03)
            began_s = loop.time()
            assert await generation.next_events(timeout_s=0.05) == []
            assert loop.time() - began_s >= 0.05
            engine.gate.set()
            assert len(await collect(generation)) == 1

    run(main())


def test_a_wait_without_end_is_not_ended_by_the_time_of_one_before(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script=[*tokenizer.encode("a"), Pause(), EOS])
        async with await start(engine, tokenizer) as generation:
            assert len(await generation.next_events(timeout_s=0.01)) == 1
            waiting = asyncio.create_task(generation.next_events(timeout_s=None))
            await asyncio.sleep(0.03)
            assert not waiting.done()
            engine.gate.set()
            assert len(await waiting) == 1

    run(main())


def test_events_before_an_error_come_before_it(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        engine = FakeEngine(script=[*tokenizer.encode("ab"), Fault(ExecutionError("bad row"))])
        async with await start(engine, tokenizer) as generation:
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
        async with await start(engine, tokenizer, 2) as generation:
            events: list[ChoiceEvent] = []
            while not any(event.finish_reason for event in events):
                events += await generation.next_events(timeout_s=None)
        assert [request.choice for request in engine.cancelled] == [1]

    run(main())


def test_leaving_lets_a_stopped_choice_close_in_the_mesh(tokenizer: TextTokenizer) -> None:
    """Cancelling in the mesh may take a message; it must not be torn out of that."""

    class SlowToCancel(FakeEngine):
        closed = False

        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token]:
            try:
                async for token in super().generate(request):
                    yield token
            finally:
                await asyncio.sleep(0.01)
                self.closed = True

    async def main() -> None:
        engine = SlowToCancel(script=[*tokenizer.encode("fox jumps"), Pause()])
        async with await start(engine, tokenizer, 1, "jum") as generation:
            await collect(generation)
        assert engine.closed

    run(main())


class SubmittingEngine(FakeEngine):
    """As the mesh's: a choice runs from the moment that it is asked for, and nobody needs to ask for a token."""

    def __init__(self) -> None:
        super().__init__()
        self.running: set[str] = set()

    def generate(self, request: GenerationRequest) -> TokenStream:
        self.running.add(request.request_id)
        return Unanswered(lambda: self.running.remove(request.request_id))


class Unanswered(AsyncIterator[Token]):
    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close

    async def __anext__(self) -> Token:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._on_close()


@pytest.mark.parametrize("num_turns", [0, 1, 2])
def test_a_restored_choice_is_taken_out_of_the_mesh_however_early_it_is_cancelled(
    tokenizer: TextTokenizer, num_turns: int
) -> None:
    async def main() -> None:
        engine = SubmittingEngine()
        async with await start(FakeEngine(), tokenizer, 2) as generation:
            planned = generation.live.planned
        live = LiveRequest(
            planned,
            False,
            engine,
            tokenizer.vocabulary,
            FrontMetrics(CollectorRegistry()),
            lambda: 0.0,
            lambda live: None,
        )
        live.restore([JournalledChoice(), JournalledChoice()], was_over=False)
        assert len(engine.running) == 2
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(live.cancel(), 5)
        assert not engine.running

    run(main())


@pytest.mark.parametrize("max_tokens", [3, 4])
@pytest.mark.parametrize("stop", [None, "never"])
def test_a_restored_choice_with_more_tokens_than_it_may_have_by_now_ends_with_them(
    tokenizer: TextTokenizer, tmp_path: Path, max_tokens: int, stop: str | None
) -> None:
    async def main() -> None:
        fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": None, "stop": stop}
        said = tokenizer.encode("abcd")
        server = Server(tokenizer, tmp_path / "j", [*said, Pause(), *said, EOS])
        client = server.start("POST", CHAT, RESUMABLE, stream=True, **fields)
        await wait_for_tokens(server, 4)
        assert (await client.next_message())["status"] == 200
        got = b""
        while not events_of(got) or events_of(got)[-1][0] != "4":
            got += (await client.next_message())["body"]
        num_prompt_tokens = len(server.engine.asked[0].prompt_token_ids)
        server = await server.restarted([*said, *said, EOS], context_tokens=num_prompt_tokens + max_tokens)
        for _ in range(2):  # it stays so after a restart with room for more
            state = (await server.state()).json()
            (choice,) = state["reply"]["choices"]
            assert (state["state"], choice["message"]["content"], choice["finish_reason"]) == (
                "finished",
                "abcd",
                "length",
            )
            assert state["reply"]["usage"]["completion_tokens"] == 4
            ((event_id, end), done) = await rest_after(server, "4")
            assert json.loads(end)["choices"][0]["finish_reason"] == "length"
            assert (json.loads(end)["choices"][0]["delta"], done) == ({}, (None, "[DONE]"))
            assert await rest_after(server, str(event_id)) == [done], "it is told once"
            assert len(await rest_after(server, "0")) > 4
            assert server.engine.asked == []
            server = await server.restarted([*said, *said, EOS])

    run(main())


def test_a_cut_choice_waits_for_the_others_of_its_request(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": None, "n": 2}
        server = Server(tokenizer, tmp_path / "j", [])
        server.engine.script_by_choice = {0: [5, 5, 5, Pause()], 1: [6, Pause()]}
        server.start("POST", CHAT, RESUMABLE, **fields)
        await wait_for_tokens(server, 3)
        num_prompt_tokens = len(server.engine.asked[0].prompt_token_ids)
        server = await server.restarted([6, 6, 6, 6], context_tokens=num_prompt_tokens + 2)
        assert [each.choice for each in server.engine.resumed] == [1]
        choices = (await wait_for_end(server))["choices"]
        assert [(each["token_ids"], each["finish_reason"]) for each in choices] == [
            ([5, 5, 5], "length"),
            ([6, 6], "length"),
        ]

    run(main())


async def rest_after(server: Server, last_event_id: str) -> list[tuple[str | None, str]]:
    answer = await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": last_event_id})
    return events_of(answer.body)


@pytest.mark.parametrize("text", ["x", "1", "1,2,3", "-1,2", "1, 2", "1,", "٣,1", "1,99999999999"])
def test_event_ids_that_do_not_fit_the_request_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be 2 counts"):
        parse_event_id(text, 2)


def test_event_ids_are_counts_by_choice() -> None:
    assert parse_event_id("17,0", 2) == (17, 0)
    assert parse_event_id(None, 2) == parse_event_id("", 2) == (0, 0)
