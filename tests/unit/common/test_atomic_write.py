"""A small file that is written anew is never seen half."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.atomic_write import write_whole


def test_who_reads_while_it_is_written_sees_the_old_or_the_new_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "http.url"
    contents = {f"http://127.0.0.1:{port}\n" for port in range(8000, 8200)}
    seen: set[str] = set()
    has_ended = threading.Event()

    def read() -> None:
        while not has_ended.is_set():
            if path.exists():
                seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for content in sorted(contents):
        write_whole(path, content)
    has_ended.set()
    reader.join()
    assert len(seen) > 1
    assert seen <= contents


def test_what_a_crash_left_half_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".http.url.new").write_text("htt")
    write_whole(tmp_path / "http.url", "http://[::1]:8000\n")
    assert (tmp_path / "http.url").read_text() == "http://[::1]:8000\n"
    assert [path.name for path in tmp_path.iterdir()] == ["http.url"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone" / "http.url", "")
