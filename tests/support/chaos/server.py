"""A mesh's HTTP side in memory: streams tokens that follow from the request, at a pace, and tells metrics."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Spoil = Callable[[int, list[int]], list[int]]
"""(number of the request, its tokens) -> the tokens that are sent."""


@dataclass
class FakeMesh:
    """`transport` is to be given to a client. Everything may be changed while it serves."""

    step_s: float = 0.005
    is_ready: bool = True
    leaked_blocks: int = 0
    spoil: Spoil = lambda number, tokens: tokens
    takes_penalties: bool = False
    num_requests: int = 0
    running: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.answer)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/ready":
                return httpx.Response(200 if self.is_ready else 503, text="1 of 2 stage nodes")
            case "/metrics":
                return httpx.Response(200, text=self.metrics())
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "tiny"}]})
            case "/v1/completions":
                return self._complete(json.loads(request.content))
            case _:
                return httpx.Response(404, json={"error": {"message": "not here"}})

    def metrics(self) -> str:
        return (
            f"moemesh_ready {float(self.is_ready)}\n"
            f"moemesh_kv_blocks 64.0\nmoemesh_kv_blocks_free {64.0 - self.leaked_blocks}\n"
            f"moemesh_requests_running {self.running}\nmoemesh_requests_waiting 0.0\n"
            'moemesh_nodes{kind="stage",state="alive"} 2.0\nmoemesh_nodes{kind="expert",state="alive"} 2.0\n'
        )

    def _complete(self, body: dict[str, Any]) -> httpx.Response:
        if "presence_penalty" in body and not self.takes_penalties:
            return httpx.Response(400, json={"error": {"message": "not supported"}})
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": [{"text": "x"}]})
        self.bodies.append(body)
        self.num_requests += 1
        base = zlib.crc32(body["prompt"].encode()) % 10_000
        tokens = self.spoil(self.num_requests, [base + n for n in range(body["max_tokens"])])
        return httpx.Response(200, stream=_Paced(self, body.get("n", 1), tokens))


class _Paced(httpx.AsyncByteStream):
    def __init__(self, mesh: FakeMesh, num_choices: int, tokens: list[int]) -> None:
        self._mesh, self._num_choices, self._tokens = mesh, num_choices, tokens

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._mesh.running += 1
        try:
            for number, token_id in enumerate(self._tokens):
                await asyncio.sleep(self._mesh.step_s)
                is_last = number == len(self._tokens) - 1
                for index in range(self._num_choices):
                    choice = {
                        "index": index,
                        "text": f" {token_id}",
                        "token_ids": [token_id + index],
                        "logprobs": {"token_logprobs": [-token_id / 7]},
                        "finish_reason": "length" if is_last else None,
                    }
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
            yield b"data: [DONE]\n\n"
        finally:
            self._mesh.running -= 1
