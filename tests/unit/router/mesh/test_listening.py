"""Addresses where somebody listens, where nobody does, and where nothing is known."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.router.mesh.listening import refused


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def listen_on(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def test_a_socket_file_whose_listener_has_ended_refuses_and_one_that_lives_does_not(folder: Path) -> None:
    listen_on(folder / "gone").close()
    with listen_on(folder / "here"):
        ends = {name: f"ipc://{folder / name}" for name in ("gone", "here", "never")}
        assert refused(ends.values()) == {ends["gone"]}, "a file that is not there proves nothing"


def test_a_listener_whose_queue_is_full_proves_nothing(folder: Path) -> None:
    path = folder / "full"
    with listen_on(path), socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(str(path))
        assert refused([f"ipc://{path}"]) == set()


def test_a_port_that_nobody_listens_on_refuses() -> None:
    with socket.socket() as here, socket.socket() as gone:
        for listener in (here, gone):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        ends = [f"tcp://127.0.0.1:{listener.getsockname()[1]}" for listener in (here, gone)]
        gone.close()
        assert refused(ends, within_s=1.0) == {ends[1]}


@pytest.mark.parametrize("endpoint", ["tcp://some-host:5577", "inproc://x", "tcp://127.0.0.1:*", ""])
def test_what_cannot_be_asked_at_once_proves_nothing(endpoint: str) -> None:
    assert refused([endpoint]) == set()


def test_all_hosts_together_take_a_few_milliseconds_whether_they_answer_or_not() -> None:
    began_s = time.monotonic()
    refused([f"tcp://192.0.2.{number}:9" for number in range(1, 30)])  # TEST-NET-1: mostly nobody answers for it
    assert time.monotonic() - began_s < 0.5
