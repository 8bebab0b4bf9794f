"""A journal that is not this router's, or is damaged, is refused with what to do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from common.errors import (
    ConfigurationError,
    FencedError,
)
from common.ids import RequestId
from services.router import journal_store
from services.router.journal_records import decode_step, decode_tokens
from tests.support.journal_files import reopened
from tests.support.journals import accepted, open_at, token


def test_a_journal_of_another_model_with_requests_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    journal.accept(accepted("a"))
    journal.close()
    for other in ("other float32", "print bfloat16"):
        with pytest.raises(ConfigurationError, match=r"another model or dtype.*move the file away"):
            open_at(path, model=other)
    assert len(reopened(path)) == 1


def test_an_empty_journal_goes_over_to_another_model(tmp_path: Path) -> None:
    open_at(tmp_path / "j")[0].close()
    journal, _ = open_at(tmp_path / "j", model="other float32")
    journal.accept(accepted("a"))
    journal.close()
    with pytest.raises(ConfigurationError):
        open_at(tmp_path / "j")


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    open_at(path)[0].close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    connection.close()
    with pytest.raises(ConfigurationError, match="version 99"):
        open_at(path)


def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"no database at all" * 300)
    with pytest.raises(ConfigurationError, match=r"cannot be read .*JOURNAL=off"):
        open_at(path)
    with pytest.raises(ConfigurationError):
        open_at(tmp_path / "no" / "folder" / "j")


def test_a_journal_that_another_process_has_open_is_in_good_order_and_nobody_is_told_to_move_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_store, "BUSY_WITHIN_S", 0.0)
    path = tmp_path / "j"
    journal, _ = open_at(path)
    try:
        with pytest.raises(ConfigurationError, match=r"another process has the journal .* open, perhaps a router"):
            open_at(path)
    finally:
        journal.close()
    open_at(path)[0].close()


def test_rows_that_are_no_steps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    open_at(path)[0].close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO log (step) VALUES (x'c1')")
    connection.close()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_at(path)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x01", b"\x91\x91\x01", b"\x94\x90\x90\x90"])
def test_damaged_records_raise_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="journal cannot be read"):
        decode_tokens(data)
    with pytest.raises(ValueError, match="journal cannot be read"):
        decode_step(data)


def test_a_router_that_was_replaced_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    journal.accept(accepted("a"))

    def replaced() -> None:
        raise FencedError("term 5")

    journal._check_term = replaced
    with pytest.raises(FencedError):
        journal.append([(RequestId("a-0"), token(1))])
    with pytest.raises(FencedError):
        journal.accept(accepted("b"))
    journal.end("a", is_kept=False)
    journal.close()
    (a,) = reopened(path)
    assert a.choices[0].tokens == []
