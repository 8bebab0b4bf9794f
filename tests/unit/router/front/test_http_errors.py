"""What goes wrong is answered in OpenAI's shape, before and after the first token."""

import asyncio
import gzip
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from common.errors import ExecutionError, MoemeshError, NodeLostError, NotReadyError, OverloadedError
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.asgi_exchange import Answer, Exchange, ask
from tests.support.front.fake_engine import Fault, Pause, Step
from tests.support.front.front_over_engine import COMPLETIONS, ROUTES, Server, run

ERRORS: list[tuple[Exception, int, str]] = [
    (NotReadyError("no pipeline yet"), 503, "not_ready"),
    (NodeLostError("stage-1 is gone"), 503, "node_lost"),
    (ExecutionError("bad row"), 500, "execution_error"),
    (OverloadedError("queue full", retry_after_s=3), 429, "overloaded"),
    (RuntimeError("secret path"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_has_its_status(
    tokenizer: TextTokenizer, error: Exception, status: int, code: str, stream: bool
) -> None:
    async def main() -> None:
        answer = await Server(tokenizer, [Fault(error)]).post(COMPLETIONS, prompt="hi", stream=stream)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()["error"]
        assert body["code"] == code
        assert set(body) == {"message", "type", "param", "code"}
        assert body["message"] == (str(error) if isinstance(error, MoemeshError) else "internal error")
        assert answer.headers.get("retry-after") == ("3" if status == 429 else None)

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_error_in_mid_stream_is_an_event_then_done(tokenizer: TextTokenizer, path: str, fields: dict[str, Any]) -> None:
    async def main() -> None:
        script: list[Step] = [*tokenizer.encode("quick"), Fault(NodeLostError("stage-1 is gone"))]
        server = Server(tokenizer, script)
        answer = await server.post(path, stream=True, **fields)
        assert answer.status == 200
        *_, error, done = answer.data
        assert error["error"]["code"] == "node_lost"
        assert done == "[DONE]"
        assert (await server.post(path, **fields)).status == 503

    run(main())


def test_one_failing_choice_cancels_the_others(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        server.engine.script_by_choice = {0: [5, Pause()], 1: [5, 6, Fault(ExecutionError("bad"))]}
        assert (await server.post(COMPLETIONS, prompt="hi", n=2)).status == 500
        assert [request.choice for request in server.engine.cancelled] == [0]

    run(main())


def test_a_choice_that_ends_without_a_reason_is_an_error(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        answer = await Server(tokenizer, [5, 6]).post(COMPLETIONS, prompt="hi")
        assert (answer.status, answer.json()["error"]["code"]) == (500, "execution_error")

    run(main())


class StalledBody(Exchange):
    """A body of which nothing comes after the first piece."""

    def __init__(self, app: ASGIApp, piece: bytes) -> None:
        super().__init__(app, "POST", COMPLETIONS, pieces=[piece, b""])

    async def begun_answer(self) -> Answer | None:
        self.start()
        for _ in range(20):
            await asyncio.sleep(0)
        return None if self._answered.empty() else await self.answer()

    async def _receive(self) -> Message:
        if self.pieces_read == 1:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        return await super()._receive()


def test_long_body_is_refused_before_it_is_all_read(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, max_body_bytes=100)
        exchange = Exchange(server.app, "POST", COMPLETIONS, pieces=[b"x" * 60] * 50)
        answer = await exchange.start().answer()
        assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert exchange.pieces_read == 2
        announced = Exchange(server.app, "POST", COMPLETIONS, pieces=[b"x"] * 50, headers={"content-length": "101"})
        assert (await announced.start().answer()).status == 413
        assert announced.pieces_read == 0

    run(main())


def test_bodies_that_are_read_together_have_a_bound_together_and_small_ones_are_always_read(
    tokenizer: TextTokenizer,
) -> None:
    async def main() -> None:
        server = Server(tokenizer, [Pause()], max_body_bytes=20_000)
        large = [StalledBody(server.app, b"x" * 19_000) for _ in range(140)]
        answers = [await exchange.begun_answer() for exchange in large]
        refused = [answer for answer in answers if answer is not None]
        # 16 times 20,000 bytes, of which each has 19,000 - 16,384.
        assert len(answers) - len(refused) == 122
        assert {(answer.status, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
        assert (await server.post(COMPLETIONS, prompt=1.5)).status == 400
        for exchange in large:
            exchange.disconnect()
        await asyncio.sleep(0.05)
        body = json.dumps({"model": "tiny", "prompt": "hi"}).encode() + b" " * 19_000
        waiting = []
        for _ in range(200):
            waiting.append(Exchange(server.app, "POST", COMPLETIONS, pieces=[body]).start())
            await asyncio.sleep(0.01)
        assert len(server.engine.asked) == 200, "what was admitted or has gone holds nothing"
        for admitted in waiting:
            admitted.disconnect()

    run(main())


@pytest.mark.parametrize(
    ("fields", "status", "parameter", "code"),
    [
        ({"temperature": "hot"}, 400, "temperature", "invalid_request"),
        ({"prompt": ""}, 400, "prompt", "invalid_request"),
        ({"max_tokens": 10**6}, 400, "prompt", "context_length_exceeded"),
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_request"),
        ({"best_of": 3}, 400, "best_of", "invalid_request"),
    ],
)
def test_wrong_request_is_answered_with_the_field(
    tokenizer: TextTokenizer, fields: dict[str, Any], status: int, parameter: str, code: str
) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        answer = await server.post(COMPLETIONS, **({"prompt": "hi"} | fields))
        error = answer.json()["error"]
        assert (answer.status, error["param"], error["code"]) == (status, parameter, code)
        assert error["type"] == "invalid_request_error"
        assert server.engine.asked == []

    run(main())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
        ("OPTIONS", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods_are_in_openais_shape(
    tokenizer: TextTokenizer, method: str, path: str, status: int
) -> None:
    async def main() -> None:
        answer = await ask(Server(tokenizer).app, method, path)
        assert answer.status == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert ("allow" in answer.headers) == (status == 405)

    run(main())


def test_all_methods_of_a_path_are_named_where_another_one_is_asked_for(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        app = Server(tokenizer).app
        allowed = [(await ask(app, "PUT", path)).headers["allow"] for path in ("/v1/requests/x", COMPLETIONS)]
        assert allowed == ["DELETE, GET, HEAD", "POST"]

    run(main())


@pytest.mark.parametrize(
    "header", [("Content-Encoding", "gzip"), ("Content-Encoding", "utf-8, br"), ("Transfer-Encoding", "gzip, chunked")]
)
@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_a_compressed_body_is_refused_by_its_header(
    tokenizer: TextTokenizer, path: str, fields: dict[str, Any], header: tuple[str, str]
) -> None:
    async def main() -> None:
        app = Server(tokenizer).app
        body = {"model": "tiny", **fields}
        packed = gzip.compress(json.dumps(body).encode())
        answer = await ask(app, "POST", path, pieces=[packed], headers=dict([header]))
        assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
        assert answer.json()["error"]["message"].startswith(f"{header[0]}: ")

    run(main())


@pytest.mark.parametrize("lines", [["a", "b"], ["a", "a"], [""], ["", "a"], ["s" * 1025]])
def test_a_salt_that_is_given_twice_or_empty_or_too_long_is_refused_by_its_name(
    tokenizer: TextTokenizer, lines: list[str]
) -> None:
    headers = dict(zip(("Moemesh-Cache-Salt", "moemesh-cache-salt"), lines, strict=False))  # sent as they stand here

    async def main() -> None:
        server = Server(tokenizer)
        fields = {"model": "tiny", "prompt": "hi"}
        answer = await Exchange(server.app, "POST", COMPLETIONS, fields=fields, headers=headers).start().answer()
        assert answer.status == 400
        assert answer.json()["error"]["message"].startswith("Moemesh-Cache-Salt: must ")
        assert not server.engine.asked

    run(main())
