"""OpenAI's own client against the front over real sockets; only the mesh is a fake."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from common.errors import NodeLostError, OverloadedError
from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import byte_fallback_tokenizer, write_tokenizer_directory
from tests.support.front.fake_engine import FakeEngine, Fault, Pause

EOS = 2
TEXT = "The quick brown fox: Привет, 你好 👩‍🚀!"
ANSWER = f" {TEXT}"
"""The first token of the text begins with a blank, and an answer goes on behind a prompt: the blank stays."""
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
PATIENCE_S = 5.0


@dataclass
class RunningFront:
    """The engine's script may be changed between requests."""

    engine: FakeEngine
    client: openai.OpenAI
    url: str
    tokenizer: TextTokenizer

    def say(self, text: str) -> list[int]:
        """Token ids that decode to `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[RunningFront]:
    tokenizer = TextTokenizer.from_directory(write_tokenizer_directory(tmp_path, byte_fallback_tokenizer()))
    said = [*tokenizer.encode(TEXT, add_special_tokens=False), EOS]
    engine = FakeEngine(script=said, alternatives=((300, -0.1), (301, -2.0)))
    settings = FrontSettings("tiny", keep_alive_interval_s=0.05)
    app = create_app(engine, tokenizer, settings, CollectorRegistry())
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield RunningFront(engine, client, url, tokenizer)
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    listener.close()


def test_completion(front: RunningFront) -> None:
    reply = front.client.completions.create(model="tiny", prompt="hi", max_tokens=200, extra_body={"top_k": 5})
    assert reply.choices[0].text == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert front.engine.asked[0].sampling.top_k == 5


def test_streamed_completion(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny", prompt="hi", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(front.engine.script)


def test_chat(front: RunningFront) -> None:
    reply = front.client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    message = reply.choices[0].message
    assert (message.role, message.content) == ("assistant", ANSWER)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == len(front.engine.script)
    assert [entry.logprob for entry in logprobs.content[0].top_logprobs] == [-0.1, -2.0]
    # A client may send the message of a reply back as it came.
    history = [*MESSAGES, message.model_dump(), *MESSAGES]
    front.client.chat.completions.create(model="tiny", messages=history)  # type: ignore[arg-type]


def test_streamed_chat(front: RunningFront) -> None:
    chunks = list(front.client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_stream_helper(front: RunningFront) -> None:
    with front.client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_completion_logprobs(front: RunningFront) -> None:
    reply = front.client.completions.create(model="tiny", prompt="hi", max_tokens=3, logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs == [-0.5] * 3
    assert len(logprobs.tokens) == 3


@pytest.mark.parametrize("stop", ["fox", ["dog", " fox"]])
def test_stop_strings(front: RunningFront, stop: str | list[str]) -> None:
    reply = front.client.completions.create(model="tiny", prompt="hi", max_tokens=200, stop=stop)
    assert reply.choices[0].text.rstrip() == " The quick brown"
    assert reply.choices[0].finish_reason == "stop"
    assert len(front.engine.cancelled) == 1


def test_several_choices(front: RunningFront) -> None:
    front.engine.script_by_choice = {choice: [*front.say(f"say {choice}"), EOS] for choice in range(3)}
    reply = front.client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5)
    assert [choice.message.content for choice in reply.choices] == [" say 0", " say 1", " say 2"]
    assert {request.sampling.seed for request in front.engine.asked} == {5}


def test_errors_become_the_clients_exceptions(front: RunningFront) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        front.client.completions.create(model="other", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        front.client.completions.create(model="tiny", prompt="hi", frequency_penalty=3)
    assert wrong.value.param == "frequency_penalty"
    with pytest.raises(openai.BadRequestError) as long:
        front.client.completions.create(model="tiny", prompt="hi", max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    front.engine.script = [Fault(OverloadedError("queue full", retry_after_s=2))]
    with pytest.raises(openai.RateLimitError) as overloaded:
        front.client.completions.create(model="tiny", prompt="hi", stream=True)
    assert overloaded.value.response.headers["retry-after"] == "2"
    assert overloaded.value.request_id is not None


def test_error_in_mid_stream_raises_in_the_client(front: RunningFront) -> None:
    front.engine.script = [*front.say("quick"), Fault(NodeLostError("stage-1 is gone"))]
    stream = front.client.completions.create(model="tiny", prompt="hi", stream=True)
    pieces = (chunk.choices[0].text for chunk in stream)
    shown: list[str] = []
    with pytest.raises(openai.APIError, match="stage-1 is gone"):
        shown.extend(pieces)
    assert "".join(shown) == " quick"


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_cancels(front: RunningFront, stream: bool) -> None:
    cancelled = threading.Event()
    front.engine.on_cancel = cancelled.set
    front.engine.script = [*front.say("quick"), Pause()]
    body = {"model": "tiny", "prompt": "hi", "stream": stream}
    if stream:
        with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{front.url}/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE_S, read=0.2))
    assert cancelled.wait(PATIENCE_S)


def test_pause_is_filled_with_comments_that_clients_skip(front: RunningFront) -> None:
    front.engine.script = [*front.say("quick"), Pause(), EOS]
    body = {"model": "tiny", "prompt": "hi", "stream": True}
    with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        comment = next(line for line in lines if line.startswith(":"))
    assert comment == ": keep-alive"
    with front.client.completions.create(model="tiny", prompt="hi", stream=True) as stream:
        assert next(iter(stream)).choices[0].text


def test_models(front: RunningFront) -> None:
    assert [model.id for model in front.client.models.list()] == ["tiny"]
    assert front.client.models.retrieve("tiny").owned_by == "moemesh"


def test_connection_is_kept_over_requests_and_errors(front: RunningFront) -> None:
    with httpx.Client(base_url=front.url, timeout=PATIENCE_S) as client:
        for body, status in (({"model": "tiny", "prompt": "a"}, 200), ({"model": "no", "prompt": "a"}, 404)) * 3:
            answer = client.post("/v1/completions", content=json.dumps(body))
            assert answer.status_code == status
