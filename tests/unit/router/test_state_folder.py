"""The router's folder: one router at a time, a term that only grows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import ConfigurationError, FencedError
from services.router import state_folder
from services.router.state_folder import open_state_folder


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
