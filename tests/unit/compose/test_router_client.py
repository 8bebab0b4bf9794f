"""Where a person says that the router is, and why it cannot be asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

from common.errors import MoemeshError
from compose.cli import app
from compose.router_client import named_url, open_client, why_not_answered

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def other_port() -> Iterator[int]:
    """Of a program that answers whatever it is asked, in plain text and without TLS."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("::1", "http://[::1]"),
        ("[::1]:8000", "http://[::1]:8000"),
        (" http://h:1 ", "http://h:1"),
        ("http://h:1/v1/chat/completions", "http://h:1"),
        ("h/v1/models/", "http://h"),
        ("https://proxy.example/mesh/v1", "https://proxy.example/mesh"),
        ("http://h/v1x", "http://h/v1x"),
    ],
)
def test_what_a_person_writes_is_understood(given: str, url: str) -> None:
    assert named_url(given) == url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "a.localhost"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "foo://x", "socks5://127.0.0.1:9"])
def test_a_proxy_is_not_asked_for_what_is_on_this_host(monkeypatch: pytest.MonkeyPatch, host: str, proxy: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with open_client(f"http://{host}:8000", 1) as client:
        assert not client.trust_env


def test_a_proxy_that_cannot_be_used_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "foo://x")
    with pytest.raises(MoemeshError, match="ALL_PROXY names cannot be used"):
        open_client("http://mesh.example", 1)
    result = CliRunner().invoke(app, ["ask", "hi", "--url", "mesh.example"])
    assert (result.exit_code, result.stderr.startswith("moemesh: http://mesh.example: the proxy")) == (1, True)


@pytest.mark.parametrize("url", ["http://", "http://h:port"])
def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(MoemeshError, match="this is not an address"):
        open_client(url, 1)


@pytest.mark.parametrize("command", [["ask", "hi"], ["status"]])
def test_another_program_that_answers_there_is_told_from_nothing(command: list[str], other_port: int) -> None:
    result = CliRunner().invoke(app, [*command, "--url", f"127.0.0.1:{other_port}"])
    assert result.exit_code == 1
    assert "HTTP 404" in result.stderr
    result = CliRunner().invoke(app, [*command, "--url", f"https://127.0.0.1:{other_port}"])
    assert result.exit_code == 1
    assert "does not speak TLS" in result.stderr
    assert "nothing answers" not in result.stderr


def test_an_empty_question_is_not_asked() -> None:
    result = CliRunner().invoke(app, ["ask", " ", "--url", "127.0.0.1:1"])
    assert (result.exit_code, "the question is empty" in result.stderr) == (1, True)


def test_silence_is_told_from_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with open_client(url, 0.05) as client, pytest.raises(httpx.ReadTimeout) as caught:
            client.get("/ready")
    assert "does not answer in time" in why_not_answered(caught.value)
