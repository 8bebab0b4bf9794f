"""The router's folder: one router at a time, a term that only grows."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import structlog

from common.errors import ConfigurationError, FencedError, ProtocolError
from services.router.journal import state_folder
from services.router.journal.state_folder import open_state_folder

Told = list[MutableMapping[str, Any]]


@pytest.fixture
def told() -> Iterator[Told]:
    """What the log is told."""
    with structlog.testing.capture_logs() as logged:
        yield logged


def test_the_term_grows_with_every_start(tmp_path: Path) -> None:
    terms = []
    for _ in range(3):
        folder = open_state_folder(tmp_path / "state")
        terms.append(folder.term)
        folder.close()
    assert terms == [1, 2, 3]


def test_a_second_router_on_the_same_folder_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    first = open_state_folder(tmp_path)
    with pytest.raises(ConfigurationError, match="another router runs on STATE_DIR="):
        open_state_folder(tmp_path)
    first.close()
    second = open_state_folder(tmp_path)
    assert second.term == 2, "who was refused took no term"
    second.close()


def test_a_full_disk_is_a_sentence_and_the_folder_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_folder, "write_whole", is_full)
    with pytest.raises(ConfigurationError, match=r"STATE_DIR=.* cannot be written to: No space left on device"):
        open_state_folder(tmp_path)
    monkeypatch.undo()
    assert open_state_folder(tmp_path).term == 1


def test_nobody_else_may_look_into_the_folder(tmp_path: Path) -> None:
    folder = open_state_folder(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    folder.close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"term": null}', '{"term": "x"}', '{"term": -1}', '{"term": 1.5}', '{"term": true}']
)
def test_a_damaged_term_is_no_new_beginning(text: str, tmp_path: Path) -> None:
    """A term that began again would let an old router's messages pass for new ones."""
    (tmp_path / "router.json").write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"router\.json is damaged"):
            open_state_folder(tmp_path)
    (tmp_path / "router.json").write_text('{"term": 41}')
    folder = open_state_folder(tmp_path)
    assert folder.term == 42
    folder.close()


def test_half_a_file_from_a_crash_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "router.json").write_text('{"term": 7}')
    (tmp_path / ".router.json.new").write_text('{"ter')
    folder = open_state_folder(tmp_path)
    assert folder.term == 8
    folder.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"STATE_DIR=.* cannot be used"):
        open_state_folder(tmp_path / "file" / "state")


def test_a_router_whose_folder_carries_a_newer_term_is_fenced(tmp_path: Path) -> None:
    folder = open_state_folder(tmp_path)
    folder.check_term()
    (tmp_path / "router.lock").unlink()
    newer = open_state_folder(tmp_path)
    newer.check_term()
    with pytest.raises(FencedError, match="carries term 2, this router has 1"):
        folder.check_term()
    with pytest.raises(FencedError):
        folder.check_term()
    newer.close()
    folder.close()


def test_a_term_file_that_is_gone_fences_nobody(tmp_path: Path) -> None:
    folder = open_state_folder(tmp_path)
    (tmp_path / "router.json").unlink()
    folder.check_term()
    folder.close()


def test_files_that_somebody_removed_are_made_again_as_they_were_and_it_is_said(tmp_path: Path, told: Told) -> None:
    folder = open_state_folder(tmp_path / "state")
    folder.publish_url("http://127.0.0.1:8000\n")
    folder.look_after()
    assert told == []
    before = {path.name: path.read_text() for path in (tmp_path / "state").iterdir()}
    for lost in (["router.lock"], ["router.json"], ["http.url"], list(before)):
        for name in lost:
            (tmp_path / "state" / name).unlink()
        folder.look_after()
        assert {path.name: path.read_text() for path in (tmp_path / "state").iterdir()} == before
        assert all(name in told[-1]["reason"] for name in lost)
    shutil.rmtree(tmp_path / "state")
    folder.look_after()
    assert {path.name: path.read_text() for path in (tmp_path / "state").iterdir()} == before
    assert len(told) == 5
    folder.close()
    assert open_state_folder(tmp_path / "state").term == 2, "the term was not lost with the folder"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xff", b'{"term": 1}', b'{"term": "x"}', b"[]"])
def test_files_that_somebody_damages_under_a_router_are_made_again_and_end_nobody(
    tmp_path: Path, told: Told, damage: bytes
) -> None:
    """While a router lives it is the one that knows its term; a restart on the damaged file would be refused."""
    open_state_folder(tmp_path).close()
    folder = open_state_folder(tmp_path)
    folder.publish_url("http://127.0.0.1:8000\n")
    names = ("router.json", "http.url")
    before = {name: (tmp_path / name).read_text() for name in names}
    for name in names:
        (tmp_path / name).write_bytes(damage)
    folder.check_term()
    folder.look_after()
    assert {name: (tmp_path / name).read_text() for name in names} == before
    assert len(told) == 1
    folder.look_after()
    assert len(told) == 1
    folder.close()
    assert open_state_folder(tmp_path).term == 3


def test_a_router_that_cannot_write_its_address_says_so_serves_and_tries_again(tmp_path: Path, told: Told) -> None:
    (tmp_path / "http.url").mkdir()
    folder = open_state_folder(tmp_path)
    folder.publish_url("http://127.0.0.1:8000\n")
    assert len(told) == 1
    assert "http.url" in told[0]["reason"]
    (tmp_path / "http.url").rmdir()
    folder.look_after()
    assert (tmp_path / "http.url").read_text() == "http://127.0.0.1:8000\n"


@pytest.mark.parametrize("name", ["router.json", "http.url", "router.lock"])
def test_a_folder_in_the_place_of_a_file_ends_nobody_and_is_told_once(tmp_path: Path, told: Told, name: str) -> None:
    folder = open_state_folder(tmp_path)
    folder.publish_url("http://127.0.0.1:8000\n")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    for _ in range(3):
        folder.check_term()
        folder.look_after()
    assert len(told) == 1
    assert name in told[0]["reason"]
    (tmp_path / name).rmdir()
    folder.look_after()
    assert (tmp_path / name).is_file()
    folder.close()


def test_a_file_in_the_place_of_the_folder_ends_nobody(tmp_path: Path, told: Told) -> None:
    path = tmp_path / "state"
    folder = open_state_folder(path)
    shutil.rmtree(path)
    path.write_text("")
    folder.check_term()
    folder.look_after()
    assert len(told) == 1
    folder.close()


def test_a_router_that_is_outgrown_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    folder = open_state_folder(tmp_path)
    jobs: list[Callable[[], None]] = []
    with pytest.raises(FencedError):
        folder.outgrow(9, on_disk=jobs.append)
    assert json.loads((tmp_path / "router.json").read_text()) == {"term": 1}
    for job in jobs:
        job()
    assert json.loads((tmp_path / "router.json").read_text()) == {"term": 9}
    folder.close()


def test_a_folder_that_cannot_be_written_to_is_said_once_and_tried_again(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_state_folder(tmp_path)
    (tmp_path / "router.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(state_folder, "write_whole", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        for _ in range(3):
            folder.look_after()
    assert len(told) == 1
    assert "Read-only file system" in told[0]["reason"]
    folder.look_after()
    assert (tmp_path / "router.json").exists()
    folder.close()


def test_a_router_whose_lock_was_removed_and_taken_ends_and_writes_nothing(tmp_path: Path) -> None:
    old = open_state_folder(tmp_path)
    old.publish_url("http://old\n")
    for path in list(tmp_path.iterdir()):
        path.unlink()
    new = open_state_folder(tmp_path)
    assert new.term == 1, "nothing on disk told of the old one"
    with pytest.raises(FencedError, match="another router has taken"):
        old.look_after()
    old.close()
    assert not (tmp_path / "http.url").exists()
    new.close()


def test_a_router_that_has_lost_its_term_begins_above_what_nodes_have_heard(tmp_path: Path) -> None:
    """They listen to no router of a lower term: it would wait for them without end."""
    folder = open_state_folder(tmp_path)
    folder.outgrow(1)
    with pytest.raises(FencedError, match="nodes have heard a router of term 9, this one has 1"):
        folder.outgrow(9)
    folder.close()
    assert open_state_folder(tmp_path).term == 10


def test_a_term_that_no_router_can_have_ends_nobody(tmp_path: Path) -> None:
    folder = open_state_folder(tmp_path)
    with pytest.raises(ProtocolError, match="term of 4294967296"):
        folder.outgrow(1 << 32)
    folder.close()
