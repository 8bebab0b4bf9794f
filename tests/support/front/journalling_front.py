"""The HTTP front with a real journal, which can be restarted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.disk_thread import DiskThread
from services.router.journal.journal import Journal
from tests.support.front.asgi_exchange import Answer, Exchange
from tests.support.front.fake_engine import FakeEngine, Step
from tests.support.front.journals import open_at

EOS = 2
TEXT = "quick brown 你好 fox"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESUMABLE = {"Moemesh-Resumable": "1", "X-Request-Id": "mine"}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "hi", "logprobs": 1, "n": 2}),
    (COMPLETIONS, {"prompt": "hi", "return_token_ids": True, "stop": "fo"}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "n": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "stop": "fo"}),
]


class Journalling(FakeEngine):
    """Its tokens go through the journal first, as those of the mesh do."""

    journal: Journal

    async def _run(self, request: Any, num_given: int) -> Any:
        tokens: Any = super()._run(request, num_given)
        try:
            async for token in tokens:
                delivered = asyncio.Event()
                hand_on: Any = partial(asyncio.get_running_loop().call_soon_threadsafe, delivered.set)
                self.journal.append([(request.request_id, token)], hand_on)
                await delivered.wait()
                yield token
        finally:
            await tokens.aclose()


class Server:
    """A router's front, its journal and its engine; `again` is the router after a restart on the same file."""

    def __init__(
        self, tokenizer: TextTokenizer, path: Path, script: list[Step], disk: DiskThread | None = None, **settings: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._settings = settings
        self.engine = Journalling(script=script, alternatives=((5, -0.25), (6, -1.0)))
        self.journal, self._journalled = open_at(path, disk=disk)
        self.engine.journal = self.journal
        self.app: FastAPI = create_app(
            self.engine,
            tokenizer,
            FrontSettings(**{"served_name": "tiny"} | settings),
            CollectorRegistry(),
            journal=self.journal,
            wall_clock=lambda: 1000.9,
            random_bits=lambda number: 7,
        )

    async def restarted(self, script: list[Step], context_tokens: int = 4096, **changes: Any) -> Server:
        """Nothing of this one is asked any more, as if it had been killed."""
        await self.app.state.requests.close()
        self.journal.close()
        server = Server(self._tokenizer, self._path, script, **self._settings | changes)
        server.engine.context_tokens = context_tokens
        server.app.state.requests.restore(server._journalled)
        await server.app.state.requests.go_on()
        return server

    def start(self, method: str, path: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Exchange:
        body = {"model": "tiny", "max_tokens": 100} | fields if fields else None
        return Exchange(self.app, method, path, fields=body, headers=headers).start()

    async def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        return await self.start(method, path, headers, **fields).answer()

    async def state(self, name: str = "mine", **headers: str) -> Answer:
        return await self.ask("GET", f"/v1/requests/{name}", headers)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def events_of(body: bytes) -> list[tuple[str | None, str]]:
    """(id, data) of every event."""
    events: list[tuple[str | None, str]] = []
    for block in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in lines:
            events.append((lines.get("id"), lines["data"]))
    return events


def by_choice(events: list[tuple[str | None, str]]) -> dict[int, list[Any]]:
    """The choices of all chunks, each choice in order: how they are mixed is not promised. -1: what is no choice."""
    choices: dict[int, list[Any]] = {-1: []}
    for _, data in events:
        if data == "[DONE]":
            choices[-1].append(data)
            continue
        for choice in json.loads(data)["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    return choices


async def wait_for_tokens(server: Server, count: int) -> None:
    """Until the first choice has so many."""
    while True:
        answer = await server.state()
        if answer.status == 200 and answer.json()["choices"][0]["num_tokens"] >= count:
            return
        await asyncio.sleep(0.001)


async def wait_for_end(server: Server, name: str = "mine") -> dict[str, Any]:
    """The state that says so."""
    while True:
        state: dict[str, Any] = (await server.state(name)).json()
        if state["state"] != "running":
            return state
        await asyncio.sleep(0.001)
