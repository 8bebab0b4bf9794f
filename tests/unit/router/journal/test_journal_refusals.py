"""A journal that is not this router's, or is damaged, is refused with what to do."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from common.errors import ConfigurationError, DeadlineError, FencedError
from common.ids import RequestId, SequenceId
from services.router.journal import files, store
from services.router.journal.records import JournalledRequest, decode_step, decode_tokens
from tests.support.front.journal_files import compact, reopened
from tests.support.front.journals import accepted, open_at, token


def test_a_journal_of_another_model_with_requests_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    journal.accept(accepted("a")).result(0)
    journal.close()
    for other in ("other float32", "print bfloat16"):
        with pytest.raises(ConfigurationError, match=r"another model or dtype.*move the file away"):
            open_at(path, model=other)
    assert len(reopened(path)) == 1


def test_an_empty_journal_goes_over_to_another_model(tmp_path: Path) -> None:
    open_at(tmp_path / "j")[0].close()
    journal, _ = open_at(tmp_path / "j", model="other float32")
    journal.accept(accepted("a")).result(0)
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
    monkeypatch.setattr(files, "BUSY_WITHIN_S", 0.0)
    path = tmp_path / "j"
    journal, _ = open_at(path)
    try:
        with pytest.raises(ConfigurationError, match=r"another process has the journal .* open, perhaps a router"):
            open_at(path)
    finally:
        journal.close()
    open_at(path)[0].close()


def test_a_full_disk_is_no_damage(tmp_path: Path) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    assert str(files.damaged(tmp_path / "j", error)).startswith("there is no room for the journal ")


def test_rows_that_are_no_steps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    open_at(path)[0].close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO log (step, checksum) VALUES (?, ?)", store.seal((b"\xc1",)))
    connection.close()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_at(path)


FULL_OF = 7
"""Requests of a journal that is damaged: each with tokens in segments and in the log, one has ended, one has failed."""


def full_journal(path: Path) -> list[JournalledRequest]:
    journal, _ = open_at(path)
    for number in range(FULL_OF):
        journal.accept(accepted(f"r{number}")).result(0)
        journal.note_placement(RequestId(f"r{number}-0"), SequenceId(7 + number))
        journal.append([(RequestId(f"r{number}-0"), token(number))])
    journal.end("r1", is_kept=True)
    journal.end("r2", is_kept=True, error=DeadlineError("too late"))
    compact(journal)
    for number in range(3, FULL_OF):
        journal.append([(RequestId(f"r{number}-0"), token(number + 1))])
    journal.close()
    return reopened(path)


def is_earlier_state(found: JournalledRequest, whole: JournalledRequest) -> bool:
    """A row may be missing where damage has hit SQLite's own pages in a way that its check does not see."""
    return (
        found.accepted == whole.accepted
        and found.ended_s in (None, whole.ended_s)
        and all(
            a.tokens == b.tokens[: len(a.tokens)]
            and a.sequence_id in (None, b.sequence_id)
            and str(a.error) in ("None", str(b.error))
            for a, b in zip(found.choices, whole.choices, strict=True)
        )
    )


def test_whatever_byte_is_damaged_the_journal_is_refused_or_no_value_in_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = {request.number: request for request in full_journal(path)}
    data = path.read_bytes()
    source = random.Random(1)
    num_refused = 0
    for number in range(400):
        damaged_path = tmp_path / f"damaged-{number}"
        changed = bytearray(data)
        for _ in range(source.choice((1, 1, 1, 16))):
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
        damaged_path.write_bytes(changed)
        try:
            found = reopened(damaged_path)
        except ConfigurationError as error:
            assert "move" in str(error)  # noqa: PT017
            num_refused += 1
        else:
            assert all(is_earlier_state(request, whole[request.number]) for request in found)
    assert num_refused > 20


@pytest.mark.parametrize("table", ["requests", "ends", "placements", "failures", "segments", "log"])
def test_a_value_that_is_not_what_was_written_is_refused(tmp_path: Path, table: str) -> None:
    path = tmp_path / "j"
    full_journal(path)
    column = {"requests": "body", "ends": "ended_s", "placements": "sequence_id", "failures": "message"}
    value = {"segments": "tokens", "log": "step"} | column
    with sqlite3.connect(path) as connection:
        if table == "log":
            connection.execute("INSERT INTO log (step, checksum) VALUES (x'94909090', 0)")
        assert connection.execute(f"UPDATE {table} SET {value[table]} = 1").rowcount
    connection.close()
    with pytest.raises(ConfigurationError, match=f"cannot be read .a row of the table {table} is not what was written"):
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
    journal.accept(accepted("a")).result(0)

    def replaced() -> None:
        raise FencedError("term 5")

    journal._writer._check_term = replaced
    with pytest.raises(FencedError):
        journal.append([(RequestId("a-0"), token(1))])
    with pytest.raises(FencedError):
        journal.accept(accepted("b")).result(0)
    journal.end("a", is_kept=False)
    journal.close()
    (a,) = reopened(path)
    assert a.choices[0].tokens == []


@pytest.mark.parametrize("was_there", [False, True])
def test_nobody_but_its_owner_may_read_a_journal(tmp_path: Path, was_there: bool) -> None:
    """Prompts stand in it in clear, and the folder may be one that others look into."""
    path = tmp_path / "j"
    files = [path, path.with_name("j-wal")]
    umask = os.umask(0)
    try:
        if was_there:
            path.touch(mode=0o644)
        journal, _ = open_at(path)
        journal.accept(accepted("a")).result(0)
        if was_there:
            for each in files:
                each.chmod(0o664)
            copy = tmp_path / "copy"  # as a killed router leaves it
            for each in files:
                shutil.copy2(each, copy.with_name(each.name.replace("j", "copy", 1)))
            journal.close()
            journal, (a,) = open_at(copy)
            assert a.accepted.reply_id == "a"
            files = [copy, copy.with_name("copy-wal")]
        assert [each.stat().st_mode & 0o777 for each in files] == [0o600, 0o600]
        files[0].unlink()
        compact(journal)
        assert [each.stat().st_mode & 0o777 for each in files] == [0o600, 0o600], "also when it was written again"
        journal.close()
    finally:
        os.umask(umask)
