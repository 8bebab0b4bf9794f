"""A client that sees what the mesh says to the last bit: token ids and log-probabilities as the server printed them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Ask:
    """One completion to ask for. A prompt is text or token ids."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    num_top_logprobs: int = 0
    ignore_eos: bool = False
    repetition_penalty: float = 1.0

    def body(self, model: str) -> dict[str, Any]:
        """As /v1/completions takes it."""
        fields: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "logprobs": self.num_top_logprobs,
            "return_token_ids": True,
            "ignore_eos": self.ignore_eos,
        }
        if self.repetition_penalty != 1.0:
            fields["repetition_penalty"] = self.repetition_penalty
        return fields if self.seed is None else fields | {"seed": self.seed}


@dataclass(frozen=True)
class Answer:
    """What came back; equal answers are equal in every bit that JSON carries (Python prints floats without loss)."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text: str
    finish_reason: str


class MeshClient:
    """Thread-safe. Errors of the server are raised as httpx.HTTPStatusError with the body in the message."""

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url
        self._http = http
        self._model: str | None = None

    @property
    def model(self) -> str:
        """The name that the mesh serves."""
        if self._model is None:
            self._model = str(self.get("/v1/models").json()["data"][0]["id"])
        return self._model

    def get(self, path: str) -> httpx.Response:
        """Whatever the status."""
        return self._http.get(self.url + path)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Whatever the status."""
        return self._http.post(self.url + path, json=body)

    def ask(self, ask: Ask) -> Answer:
        """One completion, not streamed."""
        response = self.post("/v1/completions", ask.body(self.model))
        if response.is_error:
            raise httpx.HTTPStatusError(
                f"{response.status_code}: {response.text}", request=response.request, response=response
            )
        choice = response.json()["choices"][0]
        return Answer(
            prompt_token_ids=tuple(choice["prompt_token_ids"]),
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(choice["logprobs"]["token_logprobs"]),
            top_logprobs=tuple(choice["logprobs"]["top_logprobs"] or ()),
            text=choice["text"],
            finish_reason=choice["finish_reason"],
        )

    def ask_all(self, asks: Sequence[Ask], concurrency: int = 32) -> list[Answer]:
        """Answers in the order of the asks, `concurrency` of them under way at once."""
        # Once here, not by every thread.
        _ = self.model
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(self.ask, asks))


@contextmanager
def mesh_client(url: str, timeout_s: float = 120) -> Iterator[MeshClient]:
    """A client whose connections are closed at the end."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    with httpx.Client(timeout=timeout_s, limits=limits, trust_env=False) as http:
        yield MeshClient(url, http)
