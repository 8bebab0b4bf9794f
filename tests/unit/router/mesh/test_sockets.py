"""The router's side of the sockets, as far as it needs none."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.node.control_link import NodeAddresses
from services.router.mesh.sockets import MeshClient
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
