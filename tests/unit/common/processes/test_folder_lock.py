"""A folder's lock outlives the removal of its file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.errors import ConfigurationError, FencedError
from common.processes.folder_lock import lock_folder


def test_a_lock_whose_file_was_removed_is_made_again_and_keeps_others_out(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "state", "router")
    assert not lock.look_after()
    shutil.rmtree(tmp_path / "state")
    assert lock.look_after()
    assert not lock.look_after()
    with pytest.raises(ConfigurationError, match="another router runs"):
        lock_folder(tmp_path / "state", "router")
    lock.close()
    lock_folder(tmp_path / "state", "router").close()


def test_who_has_lost_its_lock_file_to_another_one_is_fenced(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, "router")
    (tmp_path / "router.lock").unlink()
    second = lock_folder(tmp_path, "router")
    for _ in range(2):
        with pytest.raises(FencedError, match=r"another router has taken .* this one exits"):
            first.look_after()
    assert not second.look_after()
    second.close()
    assert first.look_after(), "nobody has it any more"
    first.close()
