"""The `moemesh` command: `up` starts a mesh on this machine, `ask` asks one, `status` shows one, `chaos` hurts one,
`shard` cuts a checkpoint into parts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import typer.core
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.checkpoint.directory import resolve_model
from common.checkpoint.model_config import read_model_config
from common.checkpoint.part import describe_part
from common.config import Settings, read_settings, setting_names
from common.errors import MoemeshError
from common.misspelt_settings import misspelt_settings
from common.processes.supervisor import LocalMesh
from common.standard_streams import open_closed_streams
from compose.answers import ask_model, stream_answer, told_reason
from compose.demo_checkpoint import DEMO_CHECKPOINT, DEMO_NAME, DEMO_QUESTION
from compose.router_client import named_url, open_client, why_not_answered
from compose.shard_checkpoint import shard_checkpoint
from services.router.control.sizes import plan_layers
from services.stage.model.tp_shard import check_degree

PIPE_WIDTH = 1000
"""The width of a table that no terminal shows: nothing is folded, for programs that look for lines."""


class _PatientConsole(Console):
    """Writes while somebody reads; a closed pipe does not end the mesh."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


console = _PatientConsole(stderr=True)


def say(sentence: str) -> None:
    """Tells people a whole sentence on stderr, as it is: a pipe has no width, and brackets are no markup."""
    console.print(Text(sentence), soft_wrap=True)


def say_error(sentence: str) -> None:
    """Tells people why a command cannot go on."""
    console.print(Text.assemble(("moemesh:", "red"), " ", sentence), soft_wrap=True)


def table_console() -> Console:
    """Returns a console for tables on stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


class _Commands(typer.core.TyperGroup):
    """The commands of this file, and those of `chaos`: its imports are a third of all, and a mesh waits for none."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), "chaos"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # typer's types of commands are its own
        if cmd_name != "chaos":
            return super().get_command(ctx, cmd_name)
        from chaos.command import app as chaos_app

        command = typer.main.get_command(chaos_app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, help="A mesh of processes that serves a MoE model."
)

READY_TIMEOUT_S = 600.0
NO_ROUTER_S = 5.0
"""A router that does not answer for this long is worth a word."""
GREETING_PROMPT = "Once upon a time"
GREETING_QUESTION = "Who are you?"
"""What the greeting asks models that have a chat template."""
UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="MOEMESH_URL",
        help="where the router answers; default: as STATE_DIR/http.url says, else http://127.0.0.1:PORT",
    ),
]


@app.command()
def up() -> None:
    """Start a mesh on this machine, wait until it answers, serve until Ctrl-C. Settings come from the environment."""
    try:
        environment = _model_environment(os.environ)
        os.environ.update(environment)
        settings = read_settings()
        for sentence in misspelt_settings(os.environ, setting_names()):
            say(sentence)
        check_before_start(settings)
        with _interrupted_once(), LocalMesh(environment, settings.state_dir) as mesh:
            _serve(mesh, settings)
    except MoemeshError as error:
        say_error(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _serve(mesh: LocalMesh, settings: Settings) -> None:
    """Until a signal. Raises KeyboardInterrupt where that comes before the mesh is ready."""
    progress = _Progress(f"starting 1 router, {settings.stage_processes} stages, {settings.experts} experts")
    try:
        with progress:
            mesh.wait_ready(READY_TIMEOUT_S, progress.show)
    except KeyboardInterrupt:
        say(f"stopping; the mesh was not ready: {progress.detail}")
        raise
    try:
        _greet(mesh)
        _wait_for_signal()
    except KeyboardInterrupt:
        say("stopping")


@app.command()
def ask(
    question: str,
    url: UrlOption = "",
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Ask a running mesh, streamed. Uses the chat template where the model has one. The question `-` is standard
    input."""
    url = _router_url(url)
    try:
        for piece in stream_answer(url, _question(question), max_tokens, temperature):
            print(piece, end="", flush=True)
        print()
    except (httpx.HTTPError, httpx.InvalidURL, MoemeshError) as error:
        raise _not_answered(url, error) from None


@app.command()
def status(url: UrlOption = "") -> None:
    """Show whether a mesh is ready, and what it counts."""
    url = _router_url(url)
    try:
        with open_client(url, 10) as client:
            ready = _read_status(client, "/ready", "ready")
            mesh = _read_status(client, "/mesh", "nodes")
            metrics = client.get("/metrics").text
    except (httpx.HTTPError, httpx.InvalidURL, MoemeshError) as error:
        raise _not_answered(url, error) from None
    print(f"{'ready' if ready.get('ready') else 'not ready'}: {ready.get('detail', '')}")
    for warning in ready.get("warnings", ()):
        print(f"warning: {warning}")
    _print_nodes(mesh)
    table = Table(Column("metric", overflow="fold"), "value")
    for line in metrics.splitlines():
        if line.startswith("moemesh_") and "_bucket" not in line and "_created" not in line:
            name, _, value = line.rpartition(" ")
            table.add_row(name, value)
    table_console().print(table)
    if not ready.get("ready"):
        raise typer.Exit(1)


def _router_url(given: str) -> str:
    """Returns the address of the router that is meant: the one that was named, or that runs here."""
    if given.strip():
        return named_url(given)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if here := (Path(_setting("STATE_DIR", "state")) / "http.url").read_text().strip():
            return here
    return f"http://127.0.0.1:{_setting('PORT', '8000')}"


def _setting(name: str, default: str) -> str:
    """Returns a setting as `Settings` reads it, of an environment that may have others that are wrong."""
    return os.environ.get(name, "").strip() or default


def _question(given: str) -> str:
    """Raises MoemeshError where there is none, here or on standard input."""
    if given == "-":
        place, written = "the question on standard input", typer.get_binary_stream("stdin").read().removesuffix(b"\n")
    else:
        # Bytes that the locale cannot decode are given as surrogates; where it says nothing they are UTF-8 too.
        place, written = "the question", given.encode(errors="surrogateescape")
    try:
        question = written.decode()
    except UnicodeDecodeError as error:
        raise MoemeshError(f"{place} is not UTF-8: {error}") from None
    if not question.strip():
        raise MoemeshError(f"{place} is empty")
    return question


def _not_answered(url: str, error: Exception) -> typer.Exit:
    say_error(f"{url}: {why_not_answered(error)}")
    return typer.Exit(1)


def _read_status(client: httpx.Client, path: str, key: str) -> dict[str, Any]:
    """Returns the answer, which has the key. Raises MoemeshError where another program answers."""
    reply = client.get(path)
    told = f"no moemesh router answers there: {path} returned HTTP {reply.status_code} but"
    try:
        status = dict(reply.json())
    except (ValueError, TypeError):
        raise MoemeshError(f"{told} no JSON") from None
    if key in status:
        return status
    if (said := told_reason(reply)) is not None:  # a router that refuses to be asked under this name, or by this page
        raise MoemeshError(said)
    raise MoemeshError(f"{told} no `{key}`")


def _print_nodes(mesh: dict[str, Any]) -> None:
    table = Table("node", "role", "state", "host/pid", "rows", "busy s")
    for node in mesh["nodes"]:
        slot = node["slot"]
        place = f" of pipeline {slot['pipeline']}, slot {slot['index']}" if slot else ""
        shards = f", {node['shards']} shards" if node["shards"] else ""
        role = f"{node['role']}{place}{shards}"
        done = (str(node["rows"]), f"{node['busy_seconds']:.1f}") if node["rows"] is not None else ("", "")
        table.add_row(node["node"], role, node["state"], node["process"], *done)
    table_console().print(table)


def _model_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns MODEL, and without it the demo model under its name."""
    if environment.get("MODEL"):
        return {"MODEL": environment["MODEL"]}
    say("MODEL is not set: serving the demo model; ask it what it can do")
    return {"MODEL": str(DEMO_CHECKPOINT), "SERVED_NAME": environment.get("SERVED_NAME") or DEMO_NAME}


def _wait_for_signal() -> None:
    """Waits; the end of it is a KeyboardInterrupt."""
    threading.Event().wait()


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """Ctrl-C, SIGTERM, or the end of the terminal is a KeyboardInterrupt; what follows is left to run to its end."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    is_stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise KeyboardInterrupt

    for number in numbers:
        if before[number] is not signal.SIG_IGN or number != signal.SIGHUP:  # nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """What a start waits for: a line that changes, or where that cannot be seen, a line for each change."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._status = console.status(what) if console.is_terminal else None
        self.detail = "its processes start"
        self._began_s = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        else:
            say(self._what)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, detail: str) -> None:
        """`detail`: the router's own words, or why it has none yet. What is wrong with the settings it says at once;
        until then there is nothing that is worth a line."""
        try:
            detail = json.loads(detail)["detail"]
        except (ValueError, KeyError, TypeError):
            if time.monotonic() - self._began_s < NO_ROUTER_S:
                return
        is_new, self.detail = detail != self.detail, detail
        if self._status is not None:
            self._status.update(f"{self._what}: {detail}")
        elif is_new:
            say(f"waiting: {detail}")


def _greet(mesh: LocalMesh) -> None:
    """`ready URL`, a curl line that works as it stands, and one real answer. If the router goes away meanwhile, it is
    restarted like any other time: that ends the greeting, and not the mesh. Nor does a reader who has seen enough."""
    try:
        url = mesh.url
        _show(f"ready {url}\n")
        with open_client(url, 60) as client:
            _ask_example(client)
    except _OutputError as error:
        _drop_output()
        say(f"stdout was closed during the greeting; the mesh keeps running: {error}")
    except (httpx.HTTPError, MoemeshError, ValueError, OSError) as error:
        with contextlib.suppress(_OutputError):
            _show("\n")
        say(f"the example request failed; the mesh keeps running: {error}")
    say(f"logs: {mesh.state_dir / 'logs'}; Ctrl-C ends the mesh")


def _ask_example(client: httpx.Client) -> None:
    """As a chat where the model has a template for it."""
    question = DEMO_QUESTION if os.environ.get("MODEL") == str(DEMO_CHECKPOINT) else GREETING_QUESTION
    asked = ask_model(client, question, GREETING_PROMPT, max_tokens=24, temperature=0)
    url, body = str(client.base_url).rstrip("/"), shlex.quote(json.dumps(asked.body))
    _show(f"curl -N {url}{asked.path} -H 'Content-Type: application/json' -d {body}\n")
    _show(asked.body.get("prompt", f"{question}: "))
    for piece in asked.pieces:
        _show(piece)
    _show("\n")


class _OutputError(Exception):
    """Nobody reads stdout any more."""


def _show(text: str) -> None:
    """Raises _OutputError: other errors of the system are not stdout's."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        _drop_output()
        raise _OutputError(error) from error


def main() -> None:
    """Entry point of the `moemesh` script."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may have characters that the terminal does not know
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        say_error(str(error))
        sys.exit(1)


def _drop_output() -> None:
    """Has stdout go nowhere: what is left in it would fail again at the end."""
    with contextlib.suppress(OSError):  # a stand-in without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_before_start(settings: Settings) -> None:
    """Raises MoemeshError that names the setting. A model that has to be fetched first is left to the processes."""
    if not Path(os.path.expanduser(settings.model)).is_dir():
        return
    config = read_model_config(resolve_model(settings.model))
    plan_layers(config, settings.pp)
    if settings.tp > 1:
        check_degree(config, settings.tp)


DEFAULT_COPIES = 2


@app.command()
def shard(
    model: Annotated[str, typer.Option(envvar="MODEL", help="checkpoint directory or hub name")],
    output: Annotated[Path, typer.Option(help="folder for the parts, new or empty")],
    pp: Annotated[int, typer.Option(envvar="PP", min=1, help="layer ranges, one folder each")] = 2,
    experts: Annotated[int, typer.Option(envvar="EXPERTS", min=1, help="folders with experts")] = 2,
    copies: Annotated[
        int | None,
        typer.Option(envvar="COPIES", min=1, help="folders that hold each expert; default: 2 where possible"),
    ] = None,
) -> None:
    """Cut a checkpoint into folders for the router, each stage and each expert node. Any of them can be a MODEL."""
    try:
        written = shard_checkpoint(
            model,
            output,
            pp,
            experts,
            copies or min(DEFAULT_COPIES, experts),
            lambda part: say(f"writing {output / part.name}"),
        )
    except MoemeshError as error:
        say_error(str(error))
        raise typer.Exit(1) from None
    for part in written:
        print(f"{output / part.name}: {describe_part(part.part)}, {part.num_bytes} bytes")


if __name__ == "__main__":
    main()
