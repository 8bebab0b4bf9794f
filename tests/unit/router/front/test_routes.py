from __future__ import annotations

from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ExecutionError, NodeLostError
from services.router.engine import Readiness
from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.asgi_exchange import Exchange, ask
from tests.support.front.fake_engine import FakeEngine, Fault, Pause, Step
from tests.support.front.front_over_engine import CHAT, COMPLETIONS, EOS, MESSAGES, ROUTES, TEXT, Server, run


def test_completion_is_in_openais_shape(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        reply = (await Server(tokenizer).post(COMPLETIONS, prompt="hi")).json()
        num_tokens = len(tokenizer.encode(TEXT)) + 1
        assert reply.pop("id").startswith("cmpl-")
        assert reply == {
            "object": "text_completion",
            "created": 1000,
            "model": "tiny",
            "system_fingerprint": None,
            "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": num_tokens,
                "total_tokens": num_tokens + 2,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    run(main())


def test_chat_is_in_openais_shape(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        reply = (await Server(tokenizer, system_fingerprint="fp").post(CHAT, messages=MESSAGES, max_tokens=1)).json()
        message = {"role": "assistant", "content": TEXT[:2], "refusal": None}
        assert reply["object"] == "chat.completion"
        assert reply["system_fingerprint"] == "fp"
        assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]

    run(main())


def test_streamed_completion_joins_to_the_whole_one(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        answer = await Server(tokenizer).post(COMPLETIONS, prompt="hi", stream=True, n=2)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers
        *chunks, done = answer.data
        assert done == "[DONE]"
        assert len({chunk["id"] for chunk in chunks}) == 1
        for index in range(2):
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in choices) == TEXT
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]

    run(main())


def test_streamed_chat_has_a_role_chunk_text_chunks_and_a_finish_chunk(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        answer = await Server(tokenizer).post(CHAT, messages=MESSAGES, stream=True)
        *chunks, done = answer.data
        choices = [chunk["choices"][0] for chunk in chunks]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == TEXT
        assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
        assert all("usage" not in chunk for chunk in chunks)
        assert done == "[DONE]"

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_usage_comes_in_a_chunk_of_its_own_if_asked_for(
    tokenizer: TextTokenizer, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        options = {"include_usage": True}
        *chunks, usage, _ = (await server.post(path, stream=True, stream_options=options, **fields)).data
        whole = (await server.post(path, **fields)).json()
        extension = usage["usage"].pop("moemesh")
        assert extension == {"recoveries": 0, "replayed_tokens": 0, "retried_calls": 0, "durable": False}
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert all(chunk["usage"] is None for chunk in chunks)

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_usage_tells_of_drafts_where_there_were_any(
    tokenizer: TextTokenizer, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        plain = (await server.post(path, **fields)).json()["usage"]
        assert "completion_tokens_details" not in plain
        server.engine.drafts = {1: (False, 3), 2: (False, 1), 3: (True, 0), 4: (True, 0), 5: (False, 2)}
        drafted = {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 12}
        asked = {**fields, "n": 2}
        usage = (await server.post(path, **asked)).json()["usage"]
        assert usage["completion_tokens_details"] == drafted
        assert usage["completion_tokens"] == 2 * plain["completion_tokens"], "what was rejected is not part of it"
        *_, last, _ = (await server.post(path, **asked, stream=True, stream_options={"include_usage": True})).data
        assert last["usage"]["completion_tokens_details"] == drafted
        server.engine.drafts = {2: (False, 1)}
        usage = (await server.post(path, **fields)).json()["usage"]
        assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 1}

    run(main())


@pytest.mark.parametrize(("path", "fields"), ROUTES)
def test_every_chunk_tells_the_usage_of_its_choice_so_far_if_asked_for(
    tokenizer: TextTokenizer, path: str, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        options = {"include_usage": True, "continuous_usage_stats": True}
        asked = {**fields, "n": 2, "stream": True, "return_token_ids": True}
        *chunks, last, _ = (await server.post(path, **asked, stream_options=options)).data
        num_tokens = [0, 0]
        for chunk in chunks:
            (choice,) = chunk["choices"]
            num_tokens[choice["index"]] += len(choice.get("token_ids", ()))
            used, prompt = num_tokens[choice["index"]], last["usage"]["prompt_tokens"]
            assert chunk["usage"] == {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used}
        assert sum(num_tokens) == last["usage"]["completion_tokens"] > 2
        assert last["choices"] == []
        *chunks, _ = (await server.post(path, **asked, stream_options={"continuous_usage_stats": True})).data
        assert all("usage" not in chunk for chunk in chunks)

    run(main())


def test_logprobs_of_a_completion(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        whole = (await server.post(COMPLETIONS, prompt="hi", logprobs=1)).json()["choices"][0]["logprobs"]
        token_ids = [*tokenizer.encode(TEXT), EOS]
        assert whole["tokens"] == [tokenizer.vocabulary.token_text(token_id) for token_id in token_ids]
        assert whole["token_logprobs"] == [-0.5] * len(token_ids)
        assert whole["top_logprobs"][0] == {tokenizer.vocabulary.token_text(5): -0.2, whole["tokens"][0]: -0.5}
        assert whole["text_offset"][:2] == [0, len(whole["tokens"][0])]
        chunks = (await server.post(COMPLETIONS, prompt="hi", logprobs=1, stream=True)).data[:-1]
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        for name, values in whole.items():
            assert [value for logprobs in streamed for value in logprobs[name]] == values

    run(main())


def test_logprobs_of_a_chat(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        fields = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        whole = (await server.post(CHAT, **fields)).json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in whole[:-1]] == [
            tokenizer.vocabulary.token_text(token_id) for token_id in tokenizer.encode(TEXT)
        ]
        assert b"".join(bytes(entry["bytes"]) for entry in whole[:-1]).decode() == TEXT
        assert [alternative["logprob"] for alternative in whole[0]["top_logprobs"]] == [-0.2, -1.0]
        chunks = (await server.post(CHAT, stream=True, **fields)).data[:-1]
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == whole

    run(main())


def test_infinite_logprobs_become_finite_json(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        server.engine.logprob = float("-inf")
        reply = (await server.post(COMPLETIONS, prompt="hi", logprobs=0, max_tokens=1)).json()
        assert reply["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_cancels_the_rest_in_the_mesh(tokenizer: TextTokenizer, stream: bool) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        answer = await server.post(COMPLETIONS, prompt="hi", stop="brown", stream=stream)
        choices = [chunk["choices"][0] for chunk in answer.data[:-1]] if stream else answer.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == "quick "
        assert choices[-1]["finish_reason"] == "stop"
        assert server.engine.cancelled == server.engine.asked

    run(main())


def test_token_ids_are_given_if_asked_for(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        token_ids = [*tokenizer.encode(TEXT), EOS]
        choice = (await server.post(COMPLETIONS, prompt=[9, 8], return_token_ids=True)).json()["choices"][0]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([9, 8], token_ids)
        for path, fields in ROUTES:
            chunks = (await server.post(path, stream=True, return_token_ids=True, **fields)).data[:-1]
            choices = [chunk["choices"][0] for chunk in chunks]
            assert [token_id for choice in choices for token_id in choice.get("token_ids", [])] == token_ids
            assert sum("prompt_token_ids" in choice for choice in choices) == 1

    run(main())


def test_prompts_and_choices_come_in_order(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        server.engine.script_by_choice = {0: [*tokenizer.encode("a"), EOS], 1: [*tokenizer.encode("b"), EOS]}
        reply = (await server.post(COMPLETIONS, prompt=["one:", "two:"], n=2, echo=True)).json()
        assert [choice["text"] for choice in reply["choices"]] == ["one:a", "one:b", "two:a", "two:b"]
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[Pause()], [5, 6, Pause()]])
def test_client_that_goes_away_cancels_every_choice(tokenizer: TextTokenizer, stream: bool, script: list[Step]) -> None:
    async def main() -> None:
        server = Server(tokenizer, script)
        exchange = server.start(COMPLETIONS, prompt="hi", n=3, stream=stream)
        await server.engine.wait_asked(3)
        if stream and script != [Pause()]:
            assert (await exchange.next_message())["type"] == "http.response.start"
            await exchange.next_message()
        exchange.disconnect()
        await exchange.wait_ended()
        assert sorted(request.choice for request in server.engine.cancelled) == [0, 1, 2]
        assert server.metric("moemesh_http_requests_cancelled_total") == 1
        assert server.metric("moemesh_http_requests_in_flight") == 0

    run(main())


def test_pause_is_filled_with_comments_and_then_goes_on(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        script: list[Step] = [*tokenizer.encode("ab"), Pause(), *tokenizer.encode("cd"), EOS]
        server = Server(tokenizer, script, keep_alive_interval_s=0.01)
        exchange = server.start(COMPLETIONS, prompt="hi", stream=True)
        comments = 0
        await exchange.next_message()
        while comments < 3:
            comments += (await exchange.next_message())["body"] == b": keep-alive\n\n"
        server.engine.gate.set()
        rest = b""
        while not rest.endswith(b"[DONE]\n\n"):
            rest += (await exchange.next_message())["body"]
        assert b'"text":"c"' in rest
        await exchange.wait_ended()

    run(main())


def test_long_wait_for_the_first_token_opens_the_stream(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        script: list[Step] = [Pause(), Fault(NodeLostError("gone"))]
        server = Server(tokenizer, script, keep_alive_interval_s=0.01)
        exchange = server.start(CHAT, messages=MESSAGES, stream=True)
        assert (await exchange.next_message())["status"] == 200
        assert b'"role":"assistant"' in (await exchange.next_message())["body"]
        assert (await exchange.next_message())["body"] == b": keep-alive\n\n"
        server.engine.gate.set()
        body = b""
        while not body.endswith(b"[DONE]\n\n"):
            body += (await exchange.next_message())["body"]
        assert b'"code":"node_lost"' in body

    run(main())


def test_models_are_listed(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        app = Server(tokenizer).app
        listed = (await ask(app, "GET", "/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["tiny"]
        assert (await ask(app, "GET", "/v1/models/tiny")).json() == listed["data"][0]

    run(main())


def test_served_name_may_have_a_slash(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        app = create_app(FakeEngine(), tokenizer, FrontSettings("org/model"), CollectorRegistry())
        assert (await ask(app, "GET", "/v1/models/org/model")).json()["id"] == "org/model"

    run(main())


def test_health_is_the_process_and_readiness_the_mesh(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        assert (await ask(server.app, "GET", "/ready")).status == 200
        assert (await ask(server.app, "GET", "/mesh")).json() == {"ready": True, "nodes": []}
        server.engine.state = Readiness(False, "stage 1 of pipeline 0 is missing")
        unready = await ask(server.app, "GET", "/ready")
        assert (unready.status, unready.json()["detail"]) == (503, "stage 1 of pipeline 0 is missing")
        assert (await ask(server.app, "GET", "/health")).status == 200

    run(main())


def test_metrics_count_requests_and_tokens(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        await server.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=4, n=2)
        await server.post(COMPLETIONS, prompt=1.5)
        await ask(server.app, "GET", "/no/such/path")
        requests = "moemesh_http_requests_total"
        assert server.metric(requests, route=COMPLETIONS, status="200") == 1
        assert server.metric(requests, route=COMPLETIONS, status="400") == 1
        assert server.metric(requests, route="unknown", status="404") == 1
        assert server.metric("moemesh_prompt_tokens_total") == 3
        assert server.metric("moemesh_completion_tokens_total") == 8
        assert server.metric("moemesh_time_to_first_token_seconds_count") == 1
        assert server.metric("moemesh_inter_token_seconds_count") == 6
        page = await ask(server.app, "GET", "/metrics")
        assert b"moemesh_completion_tokens_total 8.0" in page.body

    run(main())


def test_a_whole_request_is_timed_and_one_that_fails_is_not(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        await server.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=4, n=2)
        assert server.metric("moemesh_request_seconds_count") == 1
        failing = Server(tokenizer, [5, Fault(ExecutionError("broke"))])
        await failing.post(COMPLETIONS, prompt=[5, 6, 7])
        assert failing.metric("moemesh_request_seconds_count") == 0

    run(main())


def test_metrics_are_what_prometheus_reads_without_series_of_creation_times(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        await server.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=4)
        page = (await ask(server.app, "GET", "/metrics")).body.decode()
        families = list(text_string_to_metric_families(page))
        assert {"moemesh_request_seconds", "moemesh_http_requests"} <= {family.name for family in families}
        for family in families:
            for sample in family.samples:
                assert not sample.name.endswith("_created")
                assert (family.type == "counter") == sample.name.endswith("_total"), sample.name

    run(main())


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/health", "/ready", "/mesh", "/metrics", "/nothing"]
)
def test_head_is_answered_wherever_get_is(tokenizer: TextTokenizer, path: str) -> None:
    async def main() -> None:
        app = Server(tokenizer).app
        head, get = await ask(app, "HEAD", path), await ask(app, "GET", path)
        assert head.status == get.status
        if get.status == 200 and path != "/metrics":
            assert head.headers["content-length"] == get.headers["content-length"]

    run(main())


def test_head_of_a_stream_does_not_listen_to_it(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        asked = Exchange(
            server.app,
            "POST",
            COMPLETIONS,
            fields={"model": "tiny", "prompt": "hi"},
            headers={"Moemesh-Resumable": "1"},
        )
        request_id = (await asked.start().answer()).headers["moemesh-request-id"]
        head = await ask(server.app, "HEAD", f"/v1/requests/{request_id}/events")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
        assert (await ask(server.app, "HEAD", "/v1/requests/other/events")).status == 404

    run(main())


def test_surplus_slashes_are_forgiven(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        for path in ("/v1/models/", "/health/", "//v1//models", "/v1/models/tiny/", "/metrics//"):
            assert (await ask(server.app, "GET", path)).status == 200
        assert (await server.post("/v1//completions/", prompt="hi")).status == 200
        assert (await ask(server.app, "GET", "/")).status == 404
        assert server.metric("moemesh_http_requests_total", route="/v1/models", status="200") == 2

    run(main())


def test_request_id_is_the_clients_if_it_is_plain(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        app = Server(tokenizer).app
        own = await ask(app, "GET", "/health", headers={"X-Request-Id": "trace-1"})
        assert own.headers["x-request-id"] == "trace-1"
        for odd in ("a b", "x" * 200, ""):
            drawn = await ask(app, "GET", "/health", headers={"X-Request-Id": odd})
            assert drawn.headers["x-request-id"].startswith("req-")

    run(main())


def test_a_field_that_changes_nothing_is_named_once_in_the_log(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer)
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                assert (await server.post(COMPLETIONS, prompt="hi", store=True, whatever=None)).status == 200
                assert (await server.post(CHAT, messages=MESSAGES, store=True)).status == 200
            for number in range(500):
                await server.post(COMPLETIONS, prompt="hi", max_tokens=1, **{f"{number}" + "x" * 500: None})
        named = [line["field"] for line in logs if line["event"] == "field_unused"]
        assert named[:2] == ["store", "whatever"]
        assert len(named) == len(set(named)) == 200
        assert max(map(len, named)) == 100

    run(main())
