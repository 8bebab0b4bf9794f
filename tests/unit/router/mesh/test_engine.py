"""The engine that the front sees: tokens in order, errors raised, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from common.errors import MoemeshError, NodeLostError, NotReadyError, OverloadedError
from common.ids import RequestId
from services.router.control.readiness import STALE_S
from services.router.engine import FinishReason, GenerationRequest, Readiness, Token
from services.router.mesh.engine import NOT_READY_GRACE_S, MeshEngine, TokenMailbox
from services.router.mesh.status import MeshStatus
from tests.support.router.fake_mesh import build_request

READY = MeshStatus(Readiness(True, "1 pipelines"), published_s=100.0, served_s=100.0)


class Mesh:
    """In place of the mesh thread."""

    def __init__(self, status: MeshStatus = READY) -> None:
        self.status = status
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[RequestId] = []

    def submit(self, request: GenerationRequest) -> None:
        self.submitted.append(request)

    def cancel(self, request_id: RequestId) -> None:
        self.cancelled.append(request_id)


def token(number: int, finish: FinishReason | None = None) -> Token:
    return Token(number, None, (), finish)


def engine_of(mesh: Mesh, mailbox: TokenMailbox, now_s: float = 100.0) -> MeshEngine:
    given: Any = mesh
    return MeshEngine(given, mailbox, 512, lambda: now_s, max_waiting=4)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_tokens_come_in_order_until_the_last() -> None:
    async def work() -> None:
        mesh, mailbox = Mesh(), TokenMailbox(asyncio.get_running_loop())
        request = build_request("r")
        tokens = engine_of(mesh, mailbox).generate(request)
        first = asyncio.ensure_future(anext(tokens))
        await asyncio.sleep(0)
        assert mesh.submitted == [request]
        mailbox([(request.request_id, token(1)), (request.request_id, token(2)), (RequestId("other"), token(9))])
        assert (await first).token_id == 1
        mailbox([(request.request_id, token(3, FinishReason.STOP))])
        assert [each.token_id async for each in tokens] == [2, 3]
        assert mesh.cancelled == []
        assert mailbox._queues == {}

    run(work())


def test_an_error_of_the_mesh_is_raised_and_nothing_is_cancelled() -> None:
    async def work() -> None:
        mesh, mailbox = Mesh(), TokenMailbox(asyncio.get_running_loop())
        request = build_request("r")
        tokens = engine_of(mesh, mailbox).generate(request)
        waiting = asyncio.ensure_future(anext(tokens))
        await asyncio.sleep(0)
        mailbox([(request.request_id, NodeLostError("a is gone"))])
        with pytest.raises(NodeLostError):
            await waiting
        assert mesh.cancelled == []
        assert mailbox._queues == {}

    run(work())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_whoever_goes_away_early_cancels_its_request(how: str) -> None:
    async def work() -> None:
        mesh, mailbox = Mesh(), TokenMailbox(asyncio.get_running_loop())
        request = build_request("r")
        tokens: Any = engine_of(mesh, mailbox).generate(request)
        waiting = asyncio.ensure_future(anext(tokens))
        await asyncio.sleep(0)
        if how == "cancel":
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            mailbox([(request.request_id, token(1))])
            await waiting
            await tokens.aclose()
        assert mesh.cancelled == [request.request_id]
        mailbox([(request.request_id, token(2))])
        await asyncio.sleep(0)
        assert mailbox._queues == {}

    run(work())


@pytest.mark.parametrize(
    ("served_s", "is_taken"),
    [(None, False), (100.0, True), (100.0 - NOT_READY_GRACE_S, True), (99.9 - NOT_READY_GRACE_S, False)],
)
def test_while_the_mesh_recovers_requests_wait_and_after_a_while_the_door_says_no(
    served_s: float | None, is_taken: bool
) -> None:
    async def work() -> None:
        mesh = Mesh(replace(READY, readiness=Readiness(False, "0 of 2 stage nodes"), served_s=served_s))
        mailbox = TokenMailbox(asyncio.get_running_loop())
        tokens = engine_of(mesh, mailbox).generate(build_request("r"))
        waiting = asyncio.ensure_future(anext(tokens))
        await asyncio.sleep(0)
        if is_taken:
            assert len(mesh.submitted) == 1
            waiting.cancel()
            return
        with pytest.raises(NotReadyError, match="0 of 2 stage nodes"):
            await waiting
        assert mesh.submitted == []

    run(work())


def test_a_status_that_grows_old_is_not_believed() -> None:
    async def work() -> None:
        mailbox = TokenMailbox(asyncio.get_running_loop())
        assert engine_of(Mesh(), mailbox, 100.0 + STALE_S).readiness().ready
        late = engine_of(Mesh(), mailbox, 100.1 + STALE_S).readiness()
        assert not late.ready
        assert "silent" in late.detail
        assert not engine_of(Mesh(MeshStatus(Readiness(False, "begins"))), mailbox).readiness().ready

    run(work())


def test_what_comes_after_the_front_has_gone_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    mailbox = TokenMailbox(loop)
    loop.close()
    mailbox([(RequestId("r"), MoemeshError("too late"))])


def test_the_context_is_what_it_was_told() -> None:
    async def work() -> None:
        assert engine_of(Mesh(), TokenMailbox(asyncio.get_running_loop())).max_context_tokens == 512

    run(work())


def test_a_restored_choice_that_is_closed_before_its_first_turn_is_cancelled_in_the_mesh() -> None:
    async def work() -> None:
        mesh, mailbox = Mesh(), TokenMailbox(asyncio.get_running_loop())
        restored = build_request("r").restored([1, 2])
        tokens: Any = engine_of(mesh, mailbox).generate(restored)
        assert mesh.submitted == [restored]
        await tokens.aclose()
        await tokens.aclose()
        assert mesh.cancelled == ["r"]
        assert mailbox._queues == {}
        assert [token async for token in tokens] == []

    run(work())


def test_a_choice_that_has_ended_is_not_cancelled_when_it_is_closed() -> None:
    async def work() -> None:
        mesh, mailbox = Mesh(), TokenMailbox(asyncio.get_running_loop())
        tokens: Any = engine_of(mesh, mailbox).generate(build_request("r").restored([1, 2]))
        mailbox([(RequestId("r"), token(3, FinishReason.STOP))])
        assert (await anext(tokens)).token_id == 3
        await tokens.aclose()
        assert mesh.cancelled == []

    run(work())


@pytest.mark.parametrize(
    ("num_waiting", "num_choices", "is_refused"),
    [(0, 1, False), (0, 16, False), (3, 1, False), (3, 2, True), (4, 1, True), (1, 4, True)],
)
def test_who_would_find_no_place_in_the_line_is_refused_before_anything_is_written(
    num_waiting: int, num_choices: int, is_refused: bool
) -> None:
    """Of 4 places. An empty line has its own door: the scheduler may start some of a large request at once."""

    async def work() -> None:
        scheduler = replace(READY.scheduler, num_ahead=num_waiting)
        mesh = Mesh(replace(READY, scheduler=scheduler, completions_per_s=2.0))
        engine = engine_of(mesh, TokenMailbox(asyncio.get_running_loop()))
        if not is_refused:
            engine.check_room(num_choices)
            return
        with pytest.raises(OverloadedError, match=f"{num_waiting} requests are waiting of 4") as caught:
            engine.check_room(num_choices)
        assert caught.value.retry_after_s == (num_waiting + 1) // 2
        with pytest.raises(NotReadyError):
            engine_of(Mesh(MeshStatus(Readiness(False, ""))), TokenMailbox(asyncio.get_running_loop())).check_room(1)

    run(work())
