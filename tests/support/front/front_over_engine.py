"""The HTTP front over an engine that follows a script."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.asgi_exchange import Answer, Exchange
from tests.support.front.fake_engine import FakeEngine, Step

EOS = 2
TEXT = "quick brown 你好 fox"
MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ROUTES: list[tuple[str, dict[str, Any]]] = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": MESSAGES})]


class Server:
    """An application over a fake engine whose choices say `TEXT`, or what is given."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        script: list[Step] | None = None,
        **settings: Any,
    ) -> None:
        said = [*tokenizer.encode(TEXT), EOS]
        self.engine = FakeEngine(script=said if script is None else script, alternatives=((5, -0.2), (6, -1.0)))
        self.registry = CollectorRegistry()
        front_settings = FrontSettings("tiny", **settings)
        self.app: FastAPI = create_app(
            self.engine,
            tokenizer,
            front_settings,
            self.registry,
            wall_clock=lambda: 1000.9,
            random_bits=lambda number: 7,
        )

    def start(self, path: str, **fields: Any) -> Exchange:
        return Exchange(self.app, "POST", path, fields={"model": "tiny", "max_tokens": 100} | fields).start()

    async def post(self, path: str, **fields: Any) -> Answer:
        return await self.start(path, **fields).answer()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)
