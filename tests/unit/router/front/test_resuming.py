"""Clients that go and come back, over a fake engine and a real journal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.errors import JournalError, SetAsideError
from services.router.engine import FinishReason, Token
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.fake_engine import Pause, Step
from tests.support.front.journalling_front import (
    COMPLETIONS,
    EOS,
    RESUMABLE,
    ROUTES,
    TEXT,
    Server,
    by_choice,
    events_of,
    run,
    wait_for_end,
    wait_for_tokens,
)
from tests.support.front.journals import accepted, open_at


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_whoever_comes_back_after_any_event_gets_exactly_the_rest(
    tokenizer: TextTokenizer, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS])
        whole = await server.ask("POST", path, RESUMABLE, stream=True, **fields)
        assert whole.headers["moemesh-request-id"] == (await server.state()).json()["id"]
        events = events_of(whole.body)
        with_ids = [position for position, (event_id, _) in enumerate(events) if event_id is not None]
        assert len(with_ids) >= 5
        for position in with_ids:
            rest = await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": str(events[position][0])})
            assert by_choice(events_of(rest.body)) == by_choice(events[position + 1 :])
        again = await server.ask("GET", "/v1/requests/mine/events")
        assert by_choice(events_of(again.body)) == by_choice(events)
        assert events_of(again.body)[with_ids[-1]][0] == events[with_ids[-1]][0]

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_after_a_restart_a_client_gets_exactly_the_rest(
    tokenizer: TextTokenizer, tmp_path: Path, path: str, fields: dict[str, Any], num_tokens: int
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        calm = Server(tokenizer, tmp_path / "calm", said)
        expected = events_of((await calm.ask("POST", path, RESUMABLE, stream=True, **fields)).body)
        server = Server(tokenizer, tmp_path / "j", [*said[:num_tokens], Pause(), *said[num_tokens:]])
        exchange = server.start("POST", path, RESUMABLE, stream=True, **fields)
        await wait_for_tokens(server, num_tokens)
        assert (await exchange.next_message())["status"] == 200
        got = b""
        while len([event_id for event_id, _ in events_of(got) if event_id]) < num_tokens:
            got += (await exchange.next_message())["body"]
        server = await server.restarted(said)
        last = [event_id for event_id, _ in events_of(got) if event_id][-1]
        rest = await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": str(last)})
        seed = server.engine.resumed[0].sampling.seed
        assert seed == 7, "drawn once"
        assert all(len(each.generated_token_ids) >= num_tokens for each in server.engine.resumed)
        assert by_choice(events_of(got) + events_of(rest.body)) == by_choice(expected)

    run(main())


def test_drafts_of_before_a_restart_are_counted_after_it(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", [*said[:3], Pause(), *said[3:]])
        server.engine.drafts = {2: (True, 0), 3: (False, 4)}
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 3)
        server = await server.restarted([*said[:3], Pause(), *said[3:]])
        server.engine.drafts = {4: (True, 0), 5: (True, 0), 6: (False, 1)}
        server.engine.gate.set()
        await wait_for_end(server)
        usage = (await server.state()).json()["reply"]["usage"]
        assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 5}

    run(main())


def test_two_clients_on_one_request_both_get_all(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        script: list[Step] = [*tokenizer.encode("ab"), Pause(), *tokenizer.encode("cd"), EOS]
        server = Server(tokenizer, tmp_path / "j", script)
        first = server.start("POST", COMPLETIONS, RESUMABLE, stream=True, prompt="hi")
        await wait_for_tokens(server, 2)
        second = server.start("GET", "/v1/requests/mine/events")
        await asyncio.sleep(0.01)
        server.engine.gate.set()
        assert events_of((await first.answer()).body) == events_of((await second.answer()).body)
        assert len(server.engine.asked) == 1

    run(main())


def test_resumable_request_goes_on_without_its_client_and_is_polled(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        said = tokenizer.encode(TEXT)
        server = Server(tokenizer, tmp_path / "j", [*said[:3], Pause(), *said[3:], EOS])
        exchange = server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 3)
        exchange.disconnect()
        await exchange.wait_ended()
        running = (await server.state()).json()
        assert (running["state"], running["reply"], running["choices"][0]["token_ids"]) == ("running", None, said[:3])
        server.engine.gate.set()
        state = await wait_for_end(server)
        assert state["reply"]["choices"][0]["text"] == TEXT
        assert state["reply"]["usage"]["moemesh"]["durable"] is True
        assert server.engine.cancelled == []
        server = await server.restarted([])
        assert (await server.state()).json()["reply"]["choices"] == state["reply"]["choices"]
        assert server.engine.asked == []

    run(main())


def test_nobody_who_comes_back_in_time_cancels_it(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, Pause()], resume_grace_s=0.02)
        exchange = server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi", stream=True)
        await wait_for_tokens(server, 1)
        exchange.disconnect()
        await exchange.wait_ended()
        assert server.engine.cancelled == []
        await asyncio.sleep(0.1)
        assert server.engine.cancelled == server.engine.asked
        answer = await server.state()
        assert (answer.status, answer.json()["error"]["code"]) == (404, "request_not_found")
        server = await server.restarted([5, EOS])
        assert server.engine.asked == []

    run(main())


def test_after_a_restart_a_plain_client_counts_as_gone_only_after_the_grace(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, Pause()], resume_grace_s=0.05)
        server.start("POST", COMPLETIONS, {"X-Request-Id": "mine"}, prompt="hi", stream=True)
        await wait_for_tokens(server, 1)
        server = await server.restarted([5, Pause()])
        assert (await server.state()).json()["state"] == "running"
        await asyncio.sleep(0.2)
        assert (await server.state()).status == 404
        assert server.engine.cancelled == server.engine.asked

    run(main())


def test_another_tenant_sees_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, Pause()])
        own = {"Authorization": "Bearer a"}
        server.start("POST", COMPLETIONS, RESUMABLE | own, prompt="hi")
        await server.engine.wait_asked(1)
        reply_id = (await server.state("mine", **own)).json()["id"]
        for method, suffix in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            for name in ("mine", reply_id):
                for other in ({}, {"Authorization": "Bearer b"}):
                    answer = await server.ask(method, f"/v1/requests/{name}{suffix}", other)
                    assert (answer.status, answer.json()["error"]["code"]) == (404, "request_not_found")
        assert server.engine.cancelled == []
        assert (await server.ask("DELETE", "/v1/requests/mine", own)).json()["deleted"] is True
        assert server.engine.cancelled == server.engine.asked
        assert (await server.state("mine", **own)).status == 404

    run(main())


def test_a_request_that_the_journal_does_not_take_is_not_begun(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS])

        def full(accepted: object) -> None:
            raise JournalError("the disk is full")

        server.journal.accept = full  # type: ignore[assignment, method-assign]
        answer = await server.ask("POST", COMPLETIONS, prompt="hi")
        assert (answer.status, answer.json()["error"]["code"]) == (503, "journal_unavailable")
        assert server.engine.asked == []

    run(main())


def test_plain_streams_carry_no_ids_and_leave_nothing_behind(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS])
        answer = await server.ask("POST", COMPLETIONS, {"X-Request-Id": "mine"}, prompt="hi", stream=True)
        assert all(event_id is None for event_id, _ in events_of(answer.body))
        assert "moemesh-request-id" not in answer.headers
        assert (await server.state()).status == 404
        server = await server.restarted([])
        assert (await server.state()).status == 404

    run(main())


def test_a_router_that_ends_sends_resumable_clients_away_without_an_end(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode("ab"), Pause(), *tokenizer.encode("cd"), EOS]
        server = Server(tokenizer, tmp_path / "j", said)
        exchange = server.start("POST", COMPLETIONS, RESUMABLE, stream=True, prompt="hi")
        await wait_for_tokens(server, 2)
        server.app.state.requests.release()
        answer = await exchange.answer()
        assert b"[DONE]" not in answer.body
        server = await server.restarted([step for step in said if isinstance(step, int)])
        last = str(events_of(answer.body)[-1][0])
        rest = await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": last})
        assert "".join(event_id or "" for event_id, _ in events_of(rest.body)) == "345"

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_router_that_ends_tells_plain_clients_and_no_router_goes_on_with_their_requests(
    tokenizer: TextTokenizer, tmp_path: Path, stream: bool
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode("ab"), Pause(), EOS])
        plain = server.start("POST", COMPLETIONS, stream=stream, prompt="hi")
        kept = server.start("POST", COMPLETIONS, RESUMABLE, stream=True, prompt="hi")
        await wait_for_tokens(server, 2)
        server.app.state.requests.release()
        server.app.state.requests.give_up()
        answer = await plain.answer()
        assert b"the router stops, and this request with it" in answer.body
        assert b"not_ready" in answer.body
        assert (answer.status, b"[DONE]" in answer.body) == ((200, True) if stream else (503, False))
        assert b"[DONE]" not in (await kept.answer()).body
        server = await server.restarted([Pause()])
        (restored,) = server.app.state.requests._known.all()
        assert restored.accepted.is_resumable

    run(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Moemesh-Resumable": "yes"}, 400), ({"Idempotency-Key": "x" * 256}, 400), ({"Idempotency-Key": ""}, 400)],
)
def test_wrong_headers_are_refused(
    tokenizer: TextTokenizer, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS])
        assert (await server.ask("POST", COMPLETIONS, headers, prompt="hi")).status == status
        await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        assert (await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": "a"})).status == 400

    run(main())


def test_tokens_behind_a_stop_string_are_not_taken_after_a_restart(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """The mesh makes one or two more before it hears of the end; the journal may have them."""

    async def main() -> None:
        said = tokenizer.encode(TEXT)
        server = Server(tokenizer, tmp_path / "j", [Pause()])
        server.start("POST", COMPLETIONS, RESUMABLE, stream=True, prompt="hi", stop="brown")
        await server.engine.wait_asked(1)
        (request,) = server.engine.asked
        server.journal.append([(request.request_id, Token(each)) for each in said])
        server.journal.append([(request.request_id, Token(EOS, None, (), FinishReason.STOP))])
        server = await server.restarted([])
        state = (await server.state()).json()
        assert (state["state"], state["reply"]["choices"][0]["text"]) == ("finished", "quick ")
        assert server.engine.asked == []

    run(main())


async def one_ended_and_one_under_way(
    server: Server, said: list[Step], path: str, fields: dict[str, Any]
) -> dict[str, Any]:
    """The reply of `ended`, after which `mine` has two tokens and waits."""
    whole: dict[str, Any] = (await server.ask("POST", path, RESUMABLE | {"X-Request-Id": "ended"}, **fields)).json()
    server.engine.script = [*said[:2], Pause()]
    server.start("POST", path, RESUMABLE, **fields)
    await wait_for_tokens(server, 2)
    return whole


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_what_was_accepted_goes_on_under_any_served_name(
    tokenizer: TextTokenizer, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", said)
        whole = await one_ended_and_one_under_way(server, said, path, fields)
        server = await server.restarted(said, served_name="renamed")
        assert (await server.ask("POST", path, **fields)).status == 404, "a new request under the old name"
        for name in ("mine", "ended"):
            state = await wait_for_end(server, name)
            assert (state["state"], state["reply"]["model"]) == ("finished", "tiny")
            assert state["reply"]["choices"] == whole["choices"]

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_what_was_accepted_and_has_no_room_any_more_fails_and_says_so(
    tokenizer: TextTokenizer, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", said)
        whole = await one_ended_and_one_under_way(server, said, path, fields)
        server = await server.restarted(said, context_tokens=50)
        for _ in range(2):  # it stays so after a restart with room for it
            state = (await server.state()).json()
            assert (state["state"], state["error"]["code"]) == ("failed", "context_length_exceeded")
            assert state["choices"][0]["token_ids"] == said[:2]
            answer = await server.ask("GET", "/v1/requests/mine/events", {"Last-Event-ID": state_id(state)})
            assert b"context_length_exceeded" in answer.body
            assert (await server.state("ended")).json()["reply"]["choices"] == whole["choices"], "it needs no room"
            assert server.engine.asked == []
            server = await server.restarted(said)

    run(main())


def state_id(state: dict[str, Any]) -> str:
    """The id of the last event."""
    return ",".join(str(choice["num_tokens"]) for choice in state["choices"])


def test_a_request_that_cannot_be_planned_again_is_dropped(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [])
        server.journal.accept(accepted("mine", body=b"{}"))
        server = await server.restarted([])
        assert (await server.state()).status == 404
        server.journal.close()
        assert open_at(tmp_path / "j")[1] == []

    run(main())


def refuse_mine(tenant: str, name: str) -> None:
    """Requests of the name `mine` were set aside."""
    if name == "mine":
        raise SetAsideError("request r: the router crashed 3 times in a row while it handled this request")


def test_who_asks_for_a_request_that_was_set_aside_is_told_why(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS])
        server.app.state.requests.refuse_set_aside = refuse_mine
        key = {"Idempotency-Key": "mine"}
        for answer in (
            await server.state(),
            await server.ask("GET", "/v1/requests/mine/events"),
            await server.ask("DELETE", "/v1/requests/mine"),
            await server.ask("POST", COMPLETIONS, key, prompt="hi"),
        ):
            assert answer.status == 500
            assert answer.json()["error"]["code"] == "request_set_aside"
            assert "3 times in a row" in answer.json()["error"]["message"]
        assert (await server.state("other")).status == 404
        assert server.engine.asked == []

    run(main())
