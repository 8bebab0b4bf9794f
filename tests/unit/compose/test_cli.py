"""What the `moemesh` command says to a mesh, and what it makes of the answers."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from typer.testing import CliRunner

from common.errors import MoemeshError
from compose.answers import stream_answer
from compose.cli import (
    _interrupted_once,
    _question,
    _router_url,
    app,
)
from tests.support.served.fake_router import Answer, Breaking, events, mesh, refused, without_template


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    def use(answer: Answer) -> None:
        client = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
        monkeypatch.setattr("compose.cli.httpx.Client", client)

    return use


@pytest.mark.parametrize("answer", [mesh, without_template])
def test_an_answer_comes_piece_by_piece_with_and_without_a_chat_template(serve: Any, answer: Answer) -> None:
    serve(answer)
    assert list(stream_answer("http://mesh", "hello", 5, 0.0)) == ["you said ", "hello"]


def test_ask_prints_the_answer(serve: Any) -> None:
    serve(mesh)
    result = CliRunner().invoke(app, ["ask", "hello", "--url", "http://mesh", "--max-tokens", "3"])
    assert result.exit_code == 0
    assert result.output == "you said hello\n"


@pytest.mark.parametrize("command", [["ask", "hello"], ["status"]])
def test_where_nobody_answers_the_command_says_so_and_fails(serve: Any, command: list[str]) -> None:
    serve(refused)
    result = CliRunner().invoke(app, [*command, "--url", "http://mesh"])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "make run" in result.output
    assert "http://mesh" in result.output


OTHER_PROGRAMS = {
    "a page": httpx.Response(200, content=b"<html>"),
    "nothing": httpx.Response(200),
    "a list": httpx.Response(200, json=[1]),
    "null": httpx.Response(200, json=None),
    "no model": httpx.Response(200, json={"object": "list", "data": []}),
    "another server's refusal": httpx.Response(404, json={"detail": "Not Found"}),
}


@pytest.mark.parametrize("command", [["ask", "hello"], ["status"]])
@pytest.mark.parametrize("program", OTHER_PROGRAMS)
def test_another_program_that_answers_is_told_from_a_router(serve: Any, program: str, command: list[str]) -> None:
    serve(lambda request: OTHER_PROGRAMS[program])
    result = CliRunner().invoke(app, [*command, "--url", "http://mesh"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.output.startswith("moemesh: http://mesh: ")


def test_a_router_that_refuses_to_be_asked_like_this_is_heard(serve: Any) -> None:
    serve(lambda request: httpx.Response(403, json={"error": {"message": "Host: set ALLOWED_HOSTS"}}))
    result = CliRunner().invoke(app, ["status", "--url", "http://mesh"])
    assert (result.exit_code, result.output) == (1, "moemesh: http://mesh: Host: set ALLOWED_HOSTS\n")


def test_an_address_that_is_none_is_said_in_a_sentence() -> None:
    result = CliRunner().invoke(app, ["ask", "hello", "--url", "http://h:port"])
    assert result.exit_code == 1
    assert "port" in result.output
    assert "Traceback" not in result.output


def test_a_question_of_one_dash_is_standard_input(serve: Any) -> None:
    serve(mesh)
    arguments = ["ask", "-", "--url", "http://mesh"]
    assert CliRunner().invoke(app, arguments, input="two\nlines\n").output == "you said two\nlines\n"
    for nothing in (b"", b"\n", b" \n\n", b"\xff\xfe"):
        result = CliRunner().invoke(app, arguments, input=nothing)
        assert result.exit_code == 1
        assert "standard input" in result.output


def test_a_question_of_bytes_that_are_no_text_is_refused_and_utf_8_is_read_whatever_the_locale() -> None:
    assert _question(os.fsencode("über").decode("ascii", "surrogateescape")) == "über"
    with pytest.raises(MoemeshError, match="the question is not UTF-8"):
        _question(os.fsdecode(b"\xff\xfe"))
    with pytest.raises(MoemeshError, match="the question is empty"):
        _question(" ")


def test_a_number_that_json_does_not_have_is_the_servers_to_refuse(serve: Any) -> None:
    serve(mesh)
    result = CliRunner().invoke(app, ["ask", "hello", "--url", "http://mesh", "--temperature", "nan"])
    assert result.output == "you said hello\n"


class _Answering(BaseHTTPRequestHandler):
    """Answers as `mesh` does."""

    def do_GET(self) -> None:
        self._answer(httpx.Request("GET", f"http://mesh{self.path}"))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self._answer(httpx.Request("POST", f"http://mesh{self.path}", content=content))

    def _answer(self, request: httpx.Request) -> None:
        reply = mesh(request)
        self.send_response(reply.status_code)
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, *message: object) -> None: ...


@pytest.fixture(scope="module")
def answering() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("streams", "status", "says"),
    [
        ("> /dev/full", 1, "moemesh: [Errno 28]"),
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize("command", ["ask hi", "status"])
def test_streams_that_are_closed_or_full_are_no_defects(
    command: str, streams: str, status: int, says: str, answering: str
) -> None:
    line = f"{sys.executable} -m compose.cli {command} --url {answering} {streams}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith(says) if says else ended.stderr == ""


def test_an_answer_has_signs_for_what_the_terminal_does_not_know(answering: str) -> None:
    command = [sys.executable, "-m", "compose.cli", "ask", "für 你", "--url", answering]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert ended.stdout == "you said für ?\n".encode("latin-1")


def test_status_shows_readiness_and_the_numbers_of_the_mesh(serve: Any) -> None:
    serve(mesh)
    result = CliRunner().invoke(app, ["status", "--url", "http://mesh"])
    assert result.exit_code == 0
    assert "ready: 1 pipelines" in result.output
    assert "moemesh_ready" in result.output
    assert "holder of" in result.output
    assert "here/42" in result.output
    assert "bucket" not in result.output
    assert "other" not in result.output


def test_status_of_a_mesh_that_is_not_ready_is_a_failure(serve: Any) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(503, json={"ready": False, "detail": "0 of 2 stage nodes"})
        return mesh(request)

    serve(answer)
    result = CliRunner().invoke(app, ["status", "--url", "http://mesh"])
    assert result.exit_code == 1
    assert "not ready: 0 of 2 stage nodes" in result.output


def test_wrong_settings_end_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MODEL", str(tmp_path))
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PP", "none")
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


class StartedMesh:
    """In place of LocalMesh: ready at once."""

    url = "http://mesh"

    def __init__(self, environment: object, state_dir: Path) -> None:
        self.state_dir = state_dir

    def __enter__(self) -> StartedMesh:
        return self

    def __exit__(self, *error: object) -> None: ...

    def wait_ready(self, timeout_s: float, on_progress: object) -> None: ...


def dies_before_the_model_is_known(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset by peer")


def dies_before_the_example(request: httpx.Request) -> httpx.Response:
    return mesh(request) if request.method == "GET" else refused(request)


def dies_in_the_example(request: httpx.Request) -> httpx.Response:
    part = events({"choices": [{"text": "once"}]})
    return mesh(request) if request.method == "GET" else httpx.Response(200, stream=Breaking(part))


def is_restarted_and_not_ready(request: httpx.Request) -> httpx.Response:
    return httpx.Response(503, json={"error": {"message": "no pipeline is open"}})


@pytest.mark.parametrize(
    "answer",
    [dies_before_the_model_is_known, dies_before_the_example, dies_in_the_example, is_restarted_and_not_ready],
)
def test_a_router_that_dies_while_the_mesh_greets_does_not_end_the_mesh(
    serve: Any, answer: Answer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ctrl_c = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("compose.cli.LocalMesh", StartedMesh)
    monkeypatch.setattr("compose.cli._wait_for_signal", ctrl_c)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    serve(answer)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0
    ctrl_c.assert_called_once_with()
    assert result.stderr.splitlines()[-1] == "stopping"
    assert result.stdout.startswith("ready http://mesh\n")
    (sentence,) = [line for line in result.stderr.splitlines() if "the mesh keeps running" in line]
    assert sentence.startswith("the example request failed")


@pytest.mark.parametrize("num_prints", range(4))
@pytest.mark.parametrize("answer", [mesh, dies_before_the_example, dies_in_the_example])
def test_who_reads_no_more_of_a_greeting_ends_no_mesh_whatever_becomes_of_the_example(
    serve: Any, answer: Answer, num_prints: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `moemesh up | head -1` does: a reader that goes after so many prints."""
    ctrl_c = Mock(side_effect=KeyboardInterrupt)
    printed = iter(range(num_prints))

    def print_while_there_is_a_reader(*words: object, **how: Any) -> None:
        if next(printed, None) is None:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("compose.cli.LocalMesh", StartedMesh)
    monkeypatch.setattr("compose.cli._wait_for_signal", ctrl_c)
    monkeypatch.setattr("compose.cli.print", print_while_there_is_a_reader, raising=False)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    serve(answer)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0
    ctrl_c.assert_called_once_with()
    (sentence,) = [line for line in result.stderr.splitlines() if "the mesh keeps running" in line]
    assert sentence.startswith(("stdout was closed", "the example request failed"))


def test_an_error_of_the_system_that_is_not_stdouts_is_told_as_what_it_is(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compose.cli.LocalMesh", StartedMesh)
    monkeypatch.setattr("compose.cli._wait_for_signal", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("compose.cli._ask_example", Mock(side_effect=PermissionError(13, "denied", "http.url")))
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    serve(mesh)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0
    assert "the example request failed" in result.stderr
    assert "denied" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_and_the_next_ones_leave_the_end_to_itself(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with _interrupted_once():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        for later in (number, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(later)
    assert signal.getsignal(number) == before


class MeshThatWaits(StartedMesh):
    def wait_ready(self, timeout_s: float, on_progress: Any) -> None:
        for detail in ("1 of 2 expert nodes", "1 of 2 expert nodes", "no pipeline is open"):
            on_progress(f'{{"ready": false, "detail": "{detail}"}}')
        raise KeyboardInterrupt


def test_a_start_that_nobody_watches_says_line_by_line_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compose.cli.LocalMesh", MeshThatWaits)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "starting 1 router, 2 stages, 2 experts",
        "waiting: 1 of 2 expert nodes",
        "waiting: no pipeline is open",
        "stopping; the mesh was not ready: no pipeline is open",
    ]


def test_the_router_that_is_asked_is_the_one_named_or_the_one_that_runs_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PORT", "9000")
    assert _router_url("http://h:1/v1") == _router_url("http://h:1/") == "http://h:1"
    assert _router_url("127.0.0.1:8000") == _router_url("127.0.0.1:8000/v1/") == "http://127.0.0.1:8000"
    assert _router_url("localhost:8000") == "http://localhost:8000"
    assert _router_url("https://mesh.example") == "https://mesh.example"
    assert _router_url("") == "http://127.0.0.1:9000"
    monkeypatch.setenv("PORT", " 9000 ")
    assert _router_url("") == "http://127.0.0.1:9000", "as `up` takes it"
    monkeypatch.setenv("STATE_DIR", f" {tmp_path} ")
    (tmp_path / "http.url").write_text("http://127.0.0.1:4711\n")
    assert _router_url("") == _router_url(" ") == "http://127.0.0.1:4711"
    for damaged in (b"", b"\xff"):
        (tmp_path / "http.url").write_bytes(damaged)
        assert _router_url("") == "http://127.0.0.1:9000"
    monkeypatch.delenv("PORT")
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "other"))
    assert _router_url("") == "http://127.0.0.1:8000"


def test_chaos_is_part_of_the_command_and_an_unknown_suite_ends_with_2(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["chaos", "faults"])
    assert listed.exit_code == 0
    assert "kill" in listed.output
    sentences = listed.output.strip().splitlines()
    assert all(sentence.endswith(".") for sentence in sentences), sentences
    arguments = ["chaos", "run", "--suite", "no-such", "--output", str(tmp_path / "report")]
    assert CliRunner().invoke(app, arguments).exit_code == 2


class MeshWhoseRouterRefuses(StartedMesh):
    def wait_ready(self, timeout_s: float, on_progress: Any) -> None:
        on_progress("the router does not listen yet")
        raise MoemeshError("router-0 cannot start: generation_config.json is damaged")


def test_why_the_router_cannot_start_comes_before_any_word_of_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compose.cli.LocalMesh", MeshWhoseRouterRefuses)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "starting 1 router, 2 stages, 2 experts",
        "moemesh: router-0 cannot start: generation_config.json is damaged",
    ]


def test_a_variable_that_is_nearly_a_setting_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compose.cli.LocalMesh", MeshWhoseRouterRefuses)
    for name, value in {"STATE_DIR": str(tmp_path), "MODEL": "any", "EXPERT": "3"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["up"])
    assert result.stderr.splitlines()[0] == "EXPERT=3 is not a setting and has no effect; did you mean EXPERTS?"


@pytest.mark.parametrize(
    ("answer", "path", "asked"),
    [
        (mesh, "/v1/chat/completions", "Who are you?: you said Who are you?"),
        (without_template, "/v1/completions", "Once upon a timeyou said Once upon a time"),
    ],
)
def test_a_greeting_is_a_chat_where_the_model_has_a_template(
    answer: Answer, path: str, asked: str, serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compose.cli.LocalMesh", StartedMesh)
    monkeypatch.setattr("compose.cli._wait_for_signal", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "any")
    serve(answer)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0
    _, curl, said = result.stdout.splitlines()
    assert curl.startswith(f"curl -N http://mesh{path} ")
    assert said == asked


def test_a_table_in_a_pipe_is_not_folded(serve: Any) -> None:
    name = f'moemesh_long_name{{node="{"x" * 150}"}}'

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f"{name} 7.0\n")
        return mesh(request)

    serve(answer)
    result = CliRunner().invoke(app, ["status", "--url", "http://mesh"])
    (line,) = [line for line in result.output.splitlines() if "moemesh_long_name" in line]
    assert name in line
    assert "7.0" in line


def test_a_mesh_starts_without_the_imports_of_faults_and_of_torch() -> None:
    code = "import sys, compose.cli; print(*{'docker', 'torch', 'yaml', 'chaos.command'}.intersection(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split() == []


def test_chaos_is_a_command_like_the_others() -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    assert "chaos" in listed
    assert CliRunner().invoke(app, ["chaos", "faults"]).exit_code == 0
