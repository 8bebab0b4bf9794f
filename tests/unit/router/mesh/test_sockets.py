"""The router's side of the sockets, as far as it needs none."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.node.control_link import NodeAddresses
from services.router.mesh.sockets import MeshClient, refused
from tests.support.router.mesh_shapes import node


class Transport:
    """Sockets that are files: nothing is ever sent."""

    def router(self, name: str, endpoints: list[str]) -> Any:
        return Handle()

    pull = router


class Handle:
    endpoints = ("ipc://somewhere",)

    def __init__(self) -> None:
        self.raw, self._other_end = os.pipe()

    def close(self) -> None:
        os.close(self.raw)
        os.close(self._other_end)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def client_of(folder: Path | None, token: str) -> MeshClient:
    transport: Any = Transport()
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    return MeshClient(transport, NodeAddresses("ipc://control", token, "ipc://{socket}", folder=folder), 1, log)


@pytest.mark.parametrize(
    ("router_token", "node_token", "is_removed"),
    [("same", "same", True), ("same", "other", False), ("", "", False)],
    ids=["same folder", "another folder of that name", "no proof"],
)
def test_socket_files_of_a_dead_node_are_removed_only_where_both_see_the_same_folder(
    folder: Path, router_token: str, node_token: str, is_removed: bool
) -> None:
    paths = [folder / "stage-1-data", folder / "stage-1-lifeline"]
    for path in paths:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    dead = replace(
        node("stage-1"), endpoints=(f"ipc://{paths[0]}",), lifeline=(f"ipc://{paths[1]}",), ipc_token=node_token
    )
    client = client_of(folder, router_token)
    client.remove_socket_files(dead)
    assert [path.exists() for path in paths] == [not is_removed] * 2
    client.close()


def test_a_router_without_a_folder_removes_nothing() -> None:
    client = client_of(None, "")
    client.remove_socket_files(node("stage-1"))
    client.close()


def test_a_folder_that_cannot_be_changed_stops_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError("read-only")

    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "stage-1-data"))
    client = client_of(folder, "same")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        client.remove_socket_files(
            replace(node("stage-1"), endpoints=(f"ipc://{folder / 'stage-1-data'}",), ipc_token="same")
        )
    client.close()


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
