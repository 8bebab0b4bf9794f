"""What is kept of requests has bounds, in number and bytes; who ended rests until somebody asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.errors import OverloadedError
from services.router.front.kept_bounds import KeptBounds
from services.router.front.planning import RequestPlanner
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.disks import HangingDisk
from tests.support.front.fake_engine import Fault, Pause, Step
from tests.support.front.journal_files import compact, reopened
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

KEYED = {"Idempotency-Key": "once"}


def test_each_account_has_its_own_bounds() -> None:
    bounds = KeptBounds(max_requests=2, max_bytes=100)
    bounds.add(True, 60)
    with pytest.raises(OverloadedError, match="JOURNAL_MAX_BYTES=100"):
        bounds.check(True, 41, 0.0)
    bounds.check(True, 40, 0.0)
    bounds.check(False, 100, 0.0)
    bounds.add(True, 0)
    with pytest.raises(OverloadedError, match=r"JOURNAL_MAX_REQUESTS=2 .* send it as a plain one"):
        bounds.check(True, 0, 0.0)
    for _ in range(5):
        bounds.check(False, 0, 0.0)
        bounds.add(False, 0)
    bounds.remove(True, 60)
    bounds.check(True, 100, 0.0)


def test_who_is_refused_is_told_when_the_one_that_ended_first_is_forgotten() -> None:
    bounds = KeptBounds(max_requests=2, max_bytes=100)
    for name, at_s in (("a", 130.0), ("b", 150.5)):
        bounds.add(True, 1)
        bounds.note_end(name, at_s)

    def retry_after_s() -> int:
        with pytest.raises(OverloadedError) as caught:
            bounds.check(True, 1, 100.0)
        return caught.value.retry_after_s

    assert retry_after_s() == 30
    bounds.forget_end("a")
    assert retry_after_s() == 51
    bounds.forget_end("b")
    assert retry_after_s() == 1, "all of them are under way"


@pytest.mark.parametrize("headers", [{"Moemesh-Resumable": "1"}, KEYED])
def test_one_more_kept_request_than_there_may_be_is_refused_and_a_plain_one_is_not(
    tokenizer: TextTokenizer, tmp_path: Path, headers: dict[str, str]
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS], max_kept_requests=2)
        for name in ("first", "second"):
            own = {name: value.replace("once", name) for name, value in headers.items()} | {"X-Request-Id": name}
            own = {key: (name if key == "Idempotency-Key" else value) for key, value in own.items()}
            assert (await server.ask("POST", COMPLETIONS, own, prompt="hi")).status == 200
        answer = await server.ask("POST", COMPLETIONS, headers, prompt="hi")
        assert (answer.status, answer.json()["error"]["code"]) == (429, "overloaded")
        assert "JOURNAL_MAX_REQUESTS=2" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) in (600, 601)
        assert (await server.ask("POST", COMPLETIONS, prompt="hi")).status == 200
        server = await server.restarted([5, EOS])
        assert (await server.ask("POST", COMPLETIONS, headers, prompt="hi")).status == 429, "a restart frees nothing"
        assert (await server.ask("DELETE", "/v1/requests/first")).status == 200
        assert (await server.ask("POST", COMPLETIONS, headers, prompt="hi")).status == 200
        compact(server.journal)
        server.journal.close()
        assert len(reopened(tmp_path / "j")) == 2

    run(main())


def test_more_bytes_than_may_be_kept_are_refused_before_anything_is_written(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS], max_kept_bytes=3000)
        statuses = [(await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi " * 300)).status for _ in range(6)]
        assert statuses == [200, 200, 200, 429, 429, 429]
        answer = await server.ask("POST", COMPLETIONS, prompt="hi " * 1100)
        assert (answer.status, "JOURNAL_MAX_BYTES=3000" in answer.json()["error"]["message"]) == (429, True)
        server.journal.close()
        assert len(reopened(tmp_path / "j")) == 3

    run(main())


@pytest.mark.parametrize("is_known_before", [True, False])
@pytest.mark.parametrize("headers", [RESUMABLE, KEYED | {"X-Request-Id": "mine"}])
def test_nothing_is_kept_of_a_request_that_the_mesh_refuses(
    tokenizer: TextTokenizer, tmp_path: Path, headers: dict[str, str], is_known_before: bool
) -> None:
    async def main() -> None:
        refusal = OverloadedError("the queue is full", 7)
        server = Server(tokenizer, tmp_path / "j", [Fault(refusal)], max_kept_requests=1)
        server.engine.refusal = refusal if is_known_before else None
        for _ in range(3):
            answer = await server.ask("POST", COMPLETIONS, headers, prompt="hi")
            assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert (await server.state()).status == 404
        assert server.journal._queue.ledger.last_number == (0 if is_known_before else 3), (
            "what is known before is not even written"
        )
        server.journal.close()
        assert reopened(tmp_path / "j") == []

    run(main())


def test_what_the_journal_does_not_take_holds_no_place(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        disk = HangingDisk()
        server = Server(tokenizer, tmp_path / "j", [5, EOS], disk, max_kept_requests=1)
        exchange = server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await asyncio.sleep(0.01)
        assert len(disk.jobs) == 1
        assert (await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi")).status == 429, "two places are not there"
        exchange.disconnect()
        await exchange.wait_ended()
        disk.answer()
        asking = asyncio.create_task(server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi"))
        await disk.answer_until(asking)
        assert asking.result().status == 200
        server.journal.tick()
        disk.answer()
        server.journal.close()
        disk.answer()
        assert len(reopened(tmp_path / "j")) == 1, "of the one whose client went nothing is left"

    run(main())


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reply ids of what is planned from now on."""
    planned: list[str] = []
    read = RequestPlanner.read

    async def counted(self: RequestPlanner, route: str, body: bytes, identity: Any) -> Any:
        asked = await read(self, route, body, identity)
        planned.append(asked.identity.reply_id)
        return asked

    monkeypatch.setattr(RequestPlanner, "read", counted)
    return planned


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_what_has_ended_rests_without_its_plan_and_is_the_same_whenever_it_is_asked_for(
    tokenizer: TextTokenizer, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS])
        whole = await server.ask("POST", path, RESUMABLE, stream=True, **fields)
        state = (await server.state()).json()
        (entry,) = server.app.state.requests._known.all()
        assert entry.live is None
        assert (await server.state()).json() == state
        assert state["reply"]["usage"]["moemesh"] == {
            "recoveries": 0,
            "replayed_tokens": 0,
            "retried_calls": 0,
            "durable": True,
        }
        again = await server.ask("GET", "/v1/requests/mine/events")
        assert by_choice(events_of(again.body)) == by_choice(events_of(whole.body))
        assert entry.live is None
        assert len(server.engine.asked) == len(state["choices"]), "nothing is computed for that"

    run(main())


def test_what_has_ended_rests_again_after_a_client_that_asked_and_did_not_read(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """What is kept is bounded in packed bytes; awake it takes twenty times as much."""

    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS])
        await server.ask("POST", COMPLETIONS, RESUMABLE | KEYED, stream=True, prompt="hi")
        (entry,) = server.app.state.requests._known.all()
        assert entry.live is None
        events, wrong = "/v1/requests/mine/events", {"Last-Event-ID": "what"}
        assert (await server.ask("HEAD", events)).status == 200
        assert entry.live is None
        assert (await server.ask("GET", events, wrong)).status == 400
        assert entry.live is None
        repeated = await server.ask("POST", COMPLETIONS, RESUMABLE | KEYED | wrong, stream=True, prompt="hi")
        assert repeated.status == 400
        assert entry.live is None

    run(main())


def test_requests_that_had_ended_are_planned_only_when_somebody_asks(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode("ab"), EOS])
        for number in range(20):
            own = {"Moemesh-Resumable": "1", "X-Request-Id": f"r{number}"}
            await server.ask("POST", COMPLETIONS, own, prompt="hi")
        planned = count_reads(monkeypatch)
        server = await server.restarted([])
        assert planned == []
        states = await asyncio.gather(server.state("r7"), server.state("r7"), server.state("r8"))
        assert [state.json()["reply"]["choices"][0]["text"] for state in states] == ["ab"] * 3
        assert len(planned) <= 3

    run(main())


def test_a_request_that_has_not_had_its_turn_is_found_and_goes_on_when_its_client_asks(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode("abcd"), EOS]
        server = Server(tokenizer, tmp_path / "j", [*said[:2], Pause()])
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 2)
        await server.app.state.requests.close()
        server.journal.close()
        server = Server(tokenizer, tmp_path / "j", said)
        server.app.state.requests.restore(server._journalled)  # and nobody has called `go_on` yet
        assert (await wait_for_end(server))["reply"]["choices"][0]["text"] == "abcd"
        await server.app.state.requests.go_on()
        assert len(server.engine.resumed) == 1

    run(main())


def test_what_had_a_place_in_a_pipeline_goes_on_first(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        journal, _ = open_at(tmp_path / "j")
        for name in ("a", "b", "c"):
            body = b'{"model": "tiny", "prompt": "hi", "max_tokens": 3}'
            journal.accept(accepted(name, body=body)).result(0)
        journal.note_placement(accepted("c").choice_ids[0], 7)  # type: ignore[arg-type]
        journal.flush()
        journal.close()
        server = Server(tokenizer, tmp_path / "j", [Pause()])
        server.app.state.requests.restore(server._journalled)
        await server.app.state.requests.go_on()
        assert [each.request_id[:1] for each in server.engine.resumed] == ["c", "a", "b"]
        server.journal.close()

    run(main())
