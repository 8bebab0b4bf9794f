"""Files of sockets that somebody removes are made again, and what others have put there is left alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.errors import SocketError
from common.messages import Header, Leave, Message
from common.wire.endpoints import choose_endpoint, ipc_token, share_folder
from common.wire.socket_files import (
    LOOK_INTERVAL_S,
    MAX_LOOK_INTERVAL_S,
    STEADY_S,
    DiskCanary,
    SocketFile,
)
from common.wire.transport import Full, MessageSocket, SocketLimits, Transport
from tests.support.processes.waiting import wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "ipc"


class Listener:
    """One process's transport with a bound socket."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "control"
        self.transport = Transport(SocketLimits())
        self.socket = self.transport.pull("steps", [f"ipc://{self.path}"])
        self.peers: list[MessageSocket] = []
        self.now_s = 100.0

    def look(self, after_s: float = LOOK_INTERVAL_S) -> bool:
        self.now_s += after_s
        return self.transport.look_after_files(self.now_s)

    def peer(self) -> MessageSocket:
        self.peers.append(self.transport.push("peer", f"ipc://{self.path}"))
        return self.peers[-1]

    def close(self) -> None:
        for one in (*self.peers, self.socket):
            one.close()
        self.transport.close()

    def hears(self, peer: MessageSocket, text: str) -> None:
        wait_until(lambda: sends(peer, text), 5, "a connection")
        received: list[Message] = []

        def receives() -> bool:
            if (news := self.socket.receive()) is not None:
                received.append(news[0])
            return bool(received)

        wait_until(receives, 5, text)
        assert received == [Leave(text)]


def sends(peer: MessageSocket, text: str) -> bool:
    with contextlib.suppress(Full):
        peer.send(Leave(text), Header())
        return True
    return False


@pytest.fixture
def listener(folder: Path) -> Iterator[Listener]:
    made = Listener(folder)
    yield made
    made.close()


def test_a_socket_whose_file_was_removed_can_be_connected_to_again_and_keeps_its_connections(
    listener: Listener,
) -> None:
    before = listener.peer()
    listener.hears(before, "one")
    listener.path.unlink()
    with capture_logs() as logs:
        assert listener.look()
    (lost,) = logs
    assert (lost["event"], lost["socket"], lost["path"]) == ("socket_file_made_again", "steps", str(listener.path))
    after = listener.peer()
    listener.hears(after, "two")
    listener.hears(before, "three")
    assert before.link_events()[1:] == [], "the first connection has stood all the time"


def test_a_folder_that_was_removed_is_made_again_for_this_user_alone(listener: Listener) -> None:
    shutil.rmtree(listener.path.parent)
    assert listener.look()
    assert listener.path.parent.stat().st_mode & 0o777 == 0o700
    listener.hears(listener.peer(), "again")


def test_what_stands_in_the_way_and_is_no_socket_of_anybody_is_replaced(listener: Listener) -> None:
    listener.path.unlink()
    listener.path.write_text("not a socket")
    assert listener.look()
    listener.hears(listener.peer(), "again")


def test_a_path_that_another_process_listens_on_is_left_to_it_and_said_once(listener: Listener) -> None:
    listener.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(listener.path))
        other.listen()
        with capture_logs() as logs:
            assert not listener.look()
            assert not listener.look(100.0)
        (lost,) = logs
        assert lost["event"] == "socket_file_lost"
        assert "another process listens" in lost["reason"]
        assert listener.path.is_socket()
    assert listener.look(100.0), "the other one has ended"


def test_a_file_that_cannot_be_made_again_is_said_once_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    failures = ["no space left", "no space left", ""]

    def bind() -> None:
        if failure := failures.pop(0):
            raise OSError(failure)
        (tmp_path / "s").touch()

    file = SocketFile("steps", tmp_path / "s", bind)
    (tmp_path / "s").unlink()
    with capture_logs() as logs:
        assert [file.look(float(now_s)) for now_s in range(0, 40, 10)] == [False, False, True, False]
    assert [told["reason"] for told in logs] == ["no space left", "it was gone"]


def test_a_file_that_is_lost_again_and_again_is_looked_at_less_often_until_it_has_stood_for_a_while(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    path.touch()
    file = SocketFile("steps", path, path.touch)
    looks_s, now_s = [], 0.0
    for _ in range(4000):
        path.unlink(missing_ok=True)
        if file.look(now_s):
            looks_s.append(now_s)
        now_s += 0.01
    waits_s = [round(after - before, 1) for before, after in itertools.pairwise(looks_s)]
    assert waits_s[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert max(waits_s) <= MAX_LOOK_INTERVAL_S
    path.touch()
    file.look(now_s + 10, at_once=True)
    file.look(now_s + 11 + STEADY_S, at_once=True)
    path.unlink()
    assert file.look(now_s + 11 + STEADY_S + LOOK_INTERVAL_S)


def test_a_transport_that_closes_leaves_no_file_of_its_own_and_takes_none_of_others(folder: Path) -> None:
    mine = Listener(folder)
    mine.close()
    assert not mine.path.exists()
    again = Listener(folder)
    again.path.unlink()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(again.path))
        again.close()
        assert again.path.exists()


def test_tcp_sockets_have_no_files_to_look_after() -> None:
    transport = Transport(SocketLimits())
    bound = transport.pull("steps", ["tcp://127.0.0.1:*"])
    assert not transport.look_after_files(1.0, at_once=True)
    bound.close()
    transport.close()


def test_processes_see_the_same_folder_also_after_it_was_removed_and_made_again(folder: Path) -> None:
    folder.mkdir()
    before = ipc_token(folder)
    keeps_the_number = folder.with_name("keeps-the-inode-in-use")
    folder.rename(keeps_the_number)
    folder.mkdir()
    after = ipc_token(folder)
    assert before != after
    assert share_folder(before, after)
    assert choose_endpoint(["ipc:///x"], before, after) == "ipc:///x"


def test_a_folder_under_another_path_is_the_same_folder(folder: Path) -> None:
    folder.mkdir()
    before = ipc_token(folder)
    renamed = folder.with_name("other")
    folder.rename(renamed)
    assert share_folder(before, ipc_token(renamed))


def test_other_folders_and_other_mounts_share_nothing(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    other = folder.with_name("other")
    other.mkdir()
    assert not share_folder(ipc_token(folder), ipc_token(other))
    assert not share_folder("", "")
    assert not share_folder(ipc_token(folder), "")
    os.symlink("mnt:[1]", tmp_path / "elsewhere")
    os.symlink("mnt:[2]", tmp_path / "here")
    here = ipc_token(folder, tmp_path / "here")
    folder.rename(folder.with_name("keeps-the-inode-in-use"))
    folder.mkdir()
    assert not share_folder(here, ipc_token(folder, tmp_path / "elsewhere")), "the same path in another container"
    assert share_folder(here, ipc_token(folder, tmp_path / "here"))


def test_a_disk_that_hangs_under_the_files_stops_no_loop_and_they_are_looked_after_again_when_it_answers(
    folder: Path,
) -> None:
    listener, answers = Listener(folder), threading.Event()
    try:
        listener.transport._canary = DiskCanary(lambda: answers.wait(20))
        listener.path.unlink()
        began_s = time.monotonic()
        assert not any(listener.look() for _ in range(50)), "nobody touches the folder"
        assert not listener.transport.look_after_files(listener.now_s, at_once=True)
        assert time.monotonic() - began_s < 2
        answers.set()
        wait_until(listener.look, 5, "the file to be made again", 0.01)
        assert listener.path.exists()
    finally:
        answers.set()
        listener.close()


def test_where_no_thread_can_be_had_nobody_touches_the_disk_and_the_loop_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    listener = Listener(folder)
    try:
        listener.path.unlink()
        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", refuse)
            assert not any(listener.look() for _ in range(5))
        wait_until(listener.look, 5, "the file to be made again", 0.01)
        assert listener.path.exists()
    finally:
        listener.close()


def test_an_echo_that_no_thread_can_be_had_for_is_refused_and_can_be_had_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    listener = Listener(folder)
    try:
        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", refuse)
            with pytest.raises(SocketError, match="threads or processes"):
                listener.transport.echo(f"ipc://{folder}/nobody", b"n")
        listener.transport.echo(f"ipc://{folder}/nobody", b"n")
    finally:
        listener.close()
