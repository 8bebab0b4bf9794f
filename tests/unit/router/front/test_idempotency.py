"""One key and one client's id stand for one request."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from common.errors import NodeLostError
from services.router.front.planning import body_hash
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.asgi_exchange import Exchange
from tests.support.front.fake_engine import Fault, Pause, Step
from tests.support.front.journalling_front import (
    COMPLETIONS,
    EOS,
    RESUMABLE,
    TEXT,
    Server,
    run,
    wait_for_tokens,
)


@pytest.mark.parametrize("is_restarted", [False, True])
def test_idempotency_key_attaches_to_the_same_request(
    tokenizer: TextTokenizer, tmp_path: Path, is_restarted: bool
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", [*said[:2], Pause(), *said[2:]])
        key = {"Idempotency-Key": "once", "X-Request-Id": "mine"}
        exchange = server.start("POST", COMPLETIONS, key, prompt="hi")
        await wait_for_tokens(server, 2)
        exchange.disconnect()
        await exchange.wait_ended()
        if is_restarted:
            server = await server.restarted(said)
        server.engine.gate.set()
        answers = await asyncio.gather(*(server.ask("POST", COMPLETIONS, key, prompt="hi") for _ in range(3)))
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {TEXT}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len(server.engine.asked) == 1
        other = await server.ask("POST", COMPLETIONS, key, prompt="ho")
        assert (other.status, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        await server.ask("POST", COMPLETIONS, key | {"Authorization": "b"}, prompt="hi")
        assert len(server.engine.asked) == 2, "keys belong to tenants"

    run(main())


def test_simultaneous_requests_with_one_key_are_one(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode(TEXT), EOS], thread_above_characters=1)
        key = {"Idempotency-Key": "once"}
        answers = await asyncio.gather(*(server.ask("POST", COMPLETIONS, key, prompt="hi there") for _ in range(5)))
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len(server.engine.asked) == 1

    run(main())


@pytest.mark.parametrize("depth", [100, 990, 1500, 100_000])
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}])
def test_a_body_that_is_nested_too_deeply_is_refused_with_and_without_a_key(
    tokenizer: TextTokenizer, tmp_path: Path, depth: int, headers: dict[str, str]
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS])
        body = b"[" * depth + b"]" * depth
        answer = await Exchange(server.app, "POST", COMPLETIONS, pieces=[body], headers=headers).start().answer()
        assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_request")

    run(main())


def test_a_long_body_with_a_key_is_hashed_off_the_event_loop(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    loads = json.loads

    def loads_seen(body: bytes) -> Any:
        seen.append(threading.current_thread().name)
        return loads(body)

    monkeypatch.setattr("services.router.front.planning.json.loads", loads_seen)

    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, EOS])
        assert (await server.ask("POST", COMPLETIONS, {"Idempotency-Key": "a"}, prompt="hi " * 5000)).status == 400
        (thread,) = seen
        assert thread != threading.main_thread().name

    run(main())


def test_a_failed_request_frees_its_key_and_says_why_by_its_id(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [Fault(NodeLostError("gone"))])
        key = {"Idempotency-Key": "once", "X-Request-Id": "mine"}
        assert (await server.ask("POST", COMPLETIONS, key, prompt="hi")).status == 503
        server = await server.restarted([5, EOS])
        state = (await server.state()).json()
        assert (state["state"], state["error"]["code"]) == ("failed", "node_lost")
        assert server.engine.asked == []
        assert (await server.ask("GET", "/v1/requests/mine/events")).status == 503
        assert (await server.ask("POST", COMPLETIONS, key, prompt="hi")).status == 200

    run(main())


@pytest.mark.parametrize("num_failed", [1, 2])
def test_after_a_restart_a_key_and_a_clients_id_stand_for_the_newest_request(
    tokenizer: TextTokenizer, tmp_path: Path, num_failed: int
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", [Fault(NodeLostError("gone"))])
        key = {"Idempotency-Key": "once", "X-Request-Id": "mine"}
        failed = []
        for _ in range(num_failed):
            assert (await server.ask("POST", COMPLETIONS, key, prompt="hi")).status == 503
            failed.append((await server.state()).json()["id"])
        server.engine.script = [*said[:2], Pause(), *said[2:]]
        server.start("POST", COMPLETIONS, key, prompt="hi")
        await wait_for_tokens(server, 2)
        running = (await server.state()).json()["id"]
        assert running not in failed
        server = await server.restarted(said)
        assert (await server.state()).json()["id"] == running
        answer = await server.ask("POST", COMPLETIONS, key, prompt="hi")
        assert (answer.status, answer.json()["id"]) == (200, running)
        assert len(server.engine.asked) == len(server.engine.resumed) == 1, "nothing is generated twice"
        server = await server.restarted(said)
        assert (await server.ask("POST", COMPLETIONS, key, prompt="hi")).json()["id"] == running
        assert server.engine.asked == []
        assert [(await server.state(old)).json()["state"] for old in failed] == ["failed"] * num_failed

    run(main())


def test_an_ended_request_keeps_the_clients_id_from_an_older_one_that_runs(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, Pause()])
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 1)
        older = (await server.state()).json()["id"]
        server.engine.script = [5, EOS]
        newer = (await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi")).json()["id"]
        for _ in range(2):
            assert (await server.state()).json()["id"] == newer
            assert (await server.state(older)).json()["state"] == "running"
            server = await server.restarted([5, Pause()])
        server.engine.script = [6, EOS]
        newest = (await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi")).json()["id"]
        assert (await server.state()).json()["id"] == newest

    run(main())


@pytest.mark.parametrize("body", [b"[" * 990, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"no json", b"\xff"])
def test_a_body_that_cannot_be_read_is_hashed_as_it_is_and_refused_where_it_is_parsed(body: bytes) -> None:
    assert body_hash("completions", body) == body_hash("completions", body)
    assert body_hash("completions", body) != body_hash("chat", body)


def test_a_salt_survives_a_restart_and_is_part_of_what_a_key_stands_for(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        said: list[Step] = [*tokenizer.encode(TEXT), EOS]
        server = Server(tokenizer, tmp_path / "j", [*said[:2], Pause(), *said[2:]])
        key = {"Idempotency-Key": "once", "X-Request-Id": "mine", "Moemesh-Cache-Salt": "a"}
        exchange = server.start("POST", COMPLETIONS, key, prompt="hi")
        await wait_for_tokens(server, 2)
        exchange.disconnect()
        await exchange.wait_ended()
        server = await server.restarted(said)
        server.engine.gate.set()
        answer = await server.ask("POST", COMPLETIONS, key, prompt="hi")
        assert answer.json()["choices"][0]["text"] == TEXT
        assert [request.cache_salt for request in server.engine.resumed] == ["a"]
        other = await server.ask("POST", COMPLETIONS, {**key, "Moemesh-Cache-Salt": "b"}, prompt="hi")
        assert (other.status, other.json()["error"]["code"]) == (422, "idempotency_key_reused")

    run(main())
