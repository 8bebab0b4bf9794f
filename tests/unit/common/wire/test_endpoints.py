"""Which address of a peer is used."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.wire.endpoints import (
    choose_endpoint,
    ipc_folder,
    ipc_token,
    join_endpoints,
    remove_socket_files,
    split_endpoints,
)

BOTH = ("ipc:///state/ipc/x", "tcp://10.0.0.2:4000")


def test_ipc_only_where_both_prove_that_they_share_a_folder() -> None:
    assert choose_endpoint(BOTH, "token", "token") == BOTH[0]
    assert choose_endpoint(BOTH, "token", "other") == BOTH[1]
    assert choose_endpoint(BOTH, "", "") == BOTH[1], "two that have no proof prove nothing"


@pytest.mark.parametrize("endpoints", [(), ("ipc:///x",), ("udp://1.2.3.4:5",), ("",)])
def test_a_peer_that_cannot_be_reached_is_a_sentence(endpoints: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="tcp"):
        choose_endpoint(endpoints, "token", "other")


@pytest.mark.parametrize("endpoints", [(), BOTH, ("ipc:///my state/ipc/x",), ("ipc:///a\nb/x", "tcp://10.0.0.2:4000")])
def test_joined_endpoints_come_apart_as_they_were(endpoints: tuple[str, ...]) -> None:
    assert split_endpoints(join_endpoints(endpoints)) == list(endpoints)


def test_a_token_is_of_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert ipc_token(tmp_path / "a") == ipc_token(tmp_path / "link")
    assert ipc_token(tmp_path / "a") != ipc_token(tmp_path / "b")


@pytest.mark.parametrize("name", ["state", "s" * 90, "ä" * 60, "s" * 200, os.fsdecode(b"\xff")])
def test_socket_paths_fit_their_108_bytes(name: str, tmp_path: Path) -> None:
    folder = ipc_folder(Path("/") / name)
    str(folder).encode()  # as ZeroMQ needs it
    assert len(bytes(folder / "expert-0123456789abcdef-lifeline")) < 108
    assert ipc_folder(Path("/") / name) == folder, "all processes of a mesh find the same"


def test_two_meshes_with_long_paths_have_folders_of_their_own() -> None:
    assert ipc_folder(Path("/") / ("s" * 200)) != ipc_folder(Path("/") / ("t" * 200))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "ipc").mkdir()
        yield Path(made) / "ipc"


def make_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    assert path.is_socket(), "closing a socket leaves its file, as killing its process does"
    return path


def test_socket_files_of_a_dead_node_are_removed_and_nothing_else(folder: Path) -> None:
    own = [make_socket(folder / "stage-1-data"), make_socket(folder / "stage-1-lifeline")]
    others = [
        make_socket(folder / "stage-2-data"),
        make_socket(folder / "stage-11-data"),
        make_socket(folder / "control"),
        make_socket(folder.parent / "stage-1-data"),
    ]
    (folder / "stage-1-notes").write_text("no socket")
    others.append(folder / "stage-1-notes")
    told = [*(f"ipc://{path}" for path in (*own, *others)), f"ipc://{folder}/../stage-1-data", "tcp://10.0.0.2:4000"]
    remove_socket_files(folder, "stage-1", told)
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)
    remove_socket_files(folder, "stage-1", told)
