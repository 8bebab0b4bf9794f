"""What a peer reads is made anew where it is older than the checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.benchmarks.peers.contenders import AbsentError, _make

EXPORT = "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(); (folder / 'new').touch()"


def test_a_folder_that_is_older_than_its_source_is_replaced(tmp_path: Path) -> None:
    target, source = tmp_path / "exported", tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    os.utime(target, (1, 1))
    source.touch()
    _make(target, source, [sys.executable, "-c", EXPORT], ())
    assert [path.name for path in target.iterdir()] == ["new"]
    _make(target, source, [sys.executable, "-c", "raise SystemExit(1)"], ())  # it is newer: nothing is run


def test_an_older_folder_stays_where_a_new_one_cannot_be_made(tmp_path: Path) -> None:
    target, source = tmp_path / "exported", tmp_path / "model"
    target.mkdir()
    os.utime(target, (1, 1))
    source.touch()
    with pytest.raises(AbsentError, match="no room"):
        _make(target, source, [sys.executable, "-c", "raise SystemExit('no room')"], ())
    assert target.is_dir()
