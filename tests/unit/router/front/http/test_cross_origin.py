"""Which web pages are served, and by which names a server on loopback is asked."""

from __future__ import annotations

import pytest

from services.router.front.http.cross_origin import OriginPolicy, is_loopback_name
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.front.asgi_exchange import Answer, ask
from tests.support.front.front_over_engine import COMPLETIONS, Server, run

PAGE = "http://localhost:3000"
BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def policy(*origins: str, hosts: tuple[str, ...] = (), is_loopback: bool = True) -> OriginPolicy:
    return OriginPolicy(frozenset(origins), frozenset(hosts), is_loopback)


async def post(server: Server, **headers: str) -> Answer:
    return await ask(server.app, "POST", COMPLETIONS, BODY, headers={"Host": "127.0.0.1:8000"} | headers)


def test_a_page_of_another_origin_may_not_ask_and_nothing_is_generated(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, origins=policy("https://chat.example"))
        for origin in ("https://evil.example", PAGE, "null", "https://chat.example:444", "file://", ""):
            answer = await post(server, Origin=origin)
            assert answer.status == 403
            assert "CORS_ORIGINS" in answer.json()["error"]["message"]
            assert "access-control-allow-origin" not in answer.headers
        assert server.engine.asked == []
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert (await ask(server.app, "GET", path, headers={"Origin": PAGE})).status == 403

    run(main())


def test_a_page_that_is_listed_may_ask_and_read_the_answer(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, origins=policy(PAGE, "null"))
        for origin in (PAGE, PAGE.upper(), "null"):
            answer = await post(server, Origin=origin)
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
            assert "Origin" in answer.headers["vary"]
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        wrong = await ask(server.app, "POST", COMPLETIONS, {"model": "tiny"}, headers={"Origin": PAGE})
        assert (wrong.status, wrong.headers["access-control-allow-origin"]) == (400, PAGE)
        anyone = await post(Server(tokenizer, origins=policy("*")), Origin="https://evil.example")
        assert (anyone.status, anyone.headers["access-control-allow-origin"]) == (200, "*")

    run(main())


def test_clients_that_are_no_pages_and_pages_of_the_same_origin_need_no_list(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, origins=policy(is_loopback=False))
        assert (await post(server)).status == 200
        for origin, host in (
            ("http://127.0.0.1:8000", "127.0.0.1:8000"),
            ("https://chat.example", "chat.example"),
            ("https://chat.example", "Chat.Example:443"),
            ("http://[::1]:8000", "[::1]:8000"),
        ):
            assert (await post(server, Origin=origin, Host=host)).status == 200
        for origin, host in (
            ("http://chat.example", "chat.example:8000"),
            ("http://127.0.0.1:3000", "127.0.0.1:8000"),
            ("app://chat.example", "chat.example"),
            ("http://h:port", "h"),
        ):
            assert (await post(server, Origin=origin, Host=host)).status == 403

    run(main())


def test_every_answer_says_that_it_depends_on_the_origin(tokenizer: TextTokenizer) -> None:
    """A cache that has kept the answer to one page, or to none, must not give it to another."""

    async def main() -> None:
        server = Server(tokenizer, origins=policy(PAGE))
        for headers, status in (({}, 200), ({"Origin": PAGE}, 200), ({"Origin": "https://evil.example"}, 403)):
            answer = await ask(server.app, "GET", "/v1/models", headers=headers)
            assert (answer.status, answer.headers["vary"]) == (status, "Origin")
            assert ("access-control-allow-origin" in answer.headers) == (headers.get("Origin") == PAGE)

    run(main())


def test_a_page_can_read_that_there_are_too_many_connections(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, origins=policy(PAGE))
        answer = await ask(server.app.state.refuse_connection, "GET", "/health", headers={"Origin": PAGE})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (503, PAGE)
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert answer.headers["x-request-id"]
        metrics = await ask(server.app, "GET", "/metrics")
        assert 'moemesh_http_requests_total{route="unknown",status="503"} 1.0' in metrics.body.decode()

    run(main())


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/v1/chat/completions/"])
def test_a_preflight_is_answered_for_listed_pages_only(tokenizer: TextTokenizer, path: str) -> None:
    async def main() -> None:
        app = Server(tokenizer, origins=policy(PAGE)).app
        asks = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        asks["Access-Control-Request-Private-Network"] = "true"
        answer = await ask(app, "OPTIONS", path, headers={"Origin": PAGE, **asks})
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert (await ask(app, "OPTIONS", path, headers={"Origin": "https://evil.example", **asks})).status == 403

    run(main())


def test_on_loopback_a_server_is_asked_by_names_of_loopback_or_listed_ones(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(tokenizer, origins=policy(hosts=("chat.example",)))
        for host in (
            "localhost",
            "LOCALHOST:8000",
            "127.0.0.1:1",
            "127.8.9.1",
            "[::1]:8000",
            "a.localhost",
            "localhost.",
        ):
            assert (await post(server, Host=host)).status == 200
        assert (await post(server, Host="Chat.Example:8000")).status == 200
        # A page whose own name was made to point to 127.0.0.1 is of the same origin.
        rebound = await post(server, Host="evil.example:8000", Origin="http://evil.example:8000")
        assert rebound.status == 403
        assert "ALLOWED_HOSTS" in rebound.json()["error"]["message"]
        for host in ("10.0.0.1", "localhost.evil.example", "[::2]", "127.0.0.1.evil.example"):
            assert (await post(server, Host=host)).status == 403
        assert (await post(Server(tokenizer, origins=policy(hosts=("*",))), Host="evil.example")).status == 200
        assert (await post(Server(tokenizer, origins=policy(is_loopback=False)), Host="10.0.0.1")).status == 200
        listed = Server(tokenizer, origins=policy(hosts=("chat.example",), is_loopback=False))
        assert [(await post(listed, Host=host)).status for host in ("chat.example", "10.0.0.1")] == [200, 403]

    run(main())


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.1.2.3", False),
    ],
)
def test_where_a_server_listens_says_whether_it_is_on_loopback(address: str, is_loopback: bool) -> None:
    assert is_loopback_name(address) == is_loopback
