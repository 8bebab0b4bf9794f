"""A journal whose files somebody removes, replaces or cuts under a running router: it is seen, and written again."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DeadlineError, JournalError
from common.ids import RequestId, SequenceId
from services.router.engine import FinishReason
from services.router.journal.journal import Journal
from services.router.journal.records import JournalledRequest
from tests.support.front.journal_files import compact, is_durable, reopened
from tests.support.front.journals import accepted, measured, open_at, token


def remove_file(path: Path) -> None:
    path.unlink()


def remove_wal(path: Path) -> None:
    path.with_name("j-wal").unlink()


def remove_both(path: Path) -> None:
    remove_file(path)
    remove_wal(path)


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def cut(path: Path) -> None:
    os.truncate(path, 0)


def cut_wal(path: Path) -> None:
    os.truncate(path.with_name("j-wal"), 100)


def put_another_in_its_place(path: Path) -> None:
    other = path.with_name("other")
    open_at(other)[0].close()
    other.replace(path)


def write_over_it(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"SQLite format 3\0" + bytes(80))


def put_a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    (path / "with").mkdir(parents=True)


def put_a_folder_in_the_place_of_the_wal(path: Path) -> None:
    wal = path.with_name("j-wal")
    wal.unlink()
    (wal / "with").mkdir(parents=True)


def move_it_elsewhere(path: Path) -> None:
    """To a larger disk, perhaps: a link leads there. SQLite would look for the WAL there, and it stayed here."""
    elsewhere = path.parent.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def put_a_link_to_nowhere_in_its_place(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


WAYS = [
    remove_file,
    remove_wal,
    remove_both,
    remove_folder,
    cut,
    cut_wal,
    put_another_in_its_place,
    write_over_it,
    put_a_folder_in_its_place,
    put_a_folder_in_the_place_of_the_wal,
    move_it_elsewhere,
    put_a_link_to_nowhere_in_its_place,
]


def left_by_a_kill(path: Path, copies: Path) -> list[JournalledRequest]:
    """What a router finds that starts on what is in the files now."""
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for part in path.parent.glob(f"{path.name}*"):
        if part.is_file():
            shutil.copy(part, copies)
    return reopened(copies / path.name)


def said(requests: list[JournalledRequest]) -> list[object]:
    return [
        (
            request.accepted,
            request.ended_s is None,
            [(choice.tokens, choice.sequence_id, str(choice.error)) for choice in request.choices],
        )
        for request in requests
    ]


def a_full_one(path: Path) -> Journal:
    """Requests under way, kept, failed and deleted; tokens in segments, in the log and on the way."""
    path.parent.mkdir(exist_ok=True)
    journal, _ = open_at(path)
    for name in ("a", "b", "c", "d"):
        journal.accept(accepted(name, 2)).result(0)
    for number in range(40):
        journal.append([(RequestId(f"{name}-{index}"), token(number)) for name in "abcd" for index in (0, 1)])
        if number % 9 == 0:
            compact(journal)
    journal.note_placement(RequestId("a-1"), SequenceId(7))
    journal.append([(RequestId("a-0"), DeadlineError("too late"))])
    journal.end("b", is_kept=True)
    journal.end("c", is_kept=False)
    journal.end("d", is_kept=True, error=DeadlineError("gone"))
    return journal


@pytest.mark.parametrize("harm", WAYS)
def test_files_that_are_gone_are_seen_at_the_next_commit_and_rewritten(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    harmed, calm = tmp_path / "state" / "j", tmp_path / "calm" / "j"
    journals = [a_full_one(harmed), a_full_one(calm)]
    harm(harmed)
    for journal in journals:
        journal.append([(RequestId("a-1"), token(40))])
    expected = said(left_by_a_kill(calm, tmp_path / "copies"))
    assert len(expected) == 3
    assert said(left_by_a_kill(harmed, tmp_path / "copies")) == expected
    for journal in journals:  # and it goes on so
        journal.accept(accepted("e")).result(0)
        journal.append([(RequestId("e-0"), token(0, FinishReason.STOP))])
        compact(journal)
    assert said(left_by_a_kill(harmed, tmp_path / "copies")) == said(left_by_a_kill(calm, tmp_path / "copies"))
    assert [measured(journal, "journal_rewrites") for journal in journals] == [1, 0]
    for journal in journals:
        assert is_durable(journal)
        journal.close()
    assert said(reopened(harmed)) == said(reopened(calm))


@pytest.mark.parametrize("harm", WAYS)
def test_what_is_accepted_into_files_that_are_gone_is_there(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    harm(path)
    journal.accept(accepted("new")).result(0)
    names = [request.accepted.reply_id for request in left_by_a_kill(path, tmp_path / "copies")]
    assert names == ["a", "b", "d", "new"]
    journal.close()


@pytest.mark.parametrize("harm", WAYS)
def test_files_that_are_gone_while_nothing_is_written_are_seen_within_a_second(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    compact(journal)
    harm(path)
    compact(journal)
    assert [request.accepted.reply_id for request in left_by_a_kill(path, tmp_path / "copies")] == ["a", "b", "d"]
    journal.close()


@pytest.mark.parametrize("harm", WAYS)
def test_files_that_are_gone_just_before_a_router_ends_in_order_are_rewritten(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    harmed, calm = tmp_path / "state" / "j", tmp_path / "calm" / "j"
    for path in (harmed, calm):
        journal = a_full_one(path)
        compact(journal)
        if path is harmed:
            harm(path)
        journal.close()
    assert len(reopened(calm)) == 3
    assert said(reopened(harmed)) == said(reopened(calm))


def test_files_that_go_in_the_middle_of_a_commit_are_seen_before_anything_is_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    append = journal._writer._store.append_steps

    def removed_meanwhile(steps: list[bytes]) -> None:
        journal._writer._store.append_steps = append  # type: ignore[method-assign]
        connection = journal._writer._store._connection
        connection.set_trace_callback(lambda statement: path.unlink(missing_ok=True))
        append(steps)

    journal._writer._store.append_steps = removed_meanwhile  # type: ignore[assignment, method-assign]
    handed_on: list[int] = []
    journal.append(
        [(RequestId("a-1"), token(40))],
        lambda: handed_on.append(len(left_by_a_kill(path, tmp_path / "copies")[0].choices[1].tokens)),
    )
    assert handed_on == [41]
    journal.close()


def test_until_they_are_rewritten_nothing_is_durable_and_nothing_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    receipt = journal.receipt("a")
    assert journal.has_written(receipt)
    remove_both(path)

    def full(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal._writer._store, "rewrite", full)
    handed_on: list[bool] = []
    journal.append([(RequestId("a-1"), token(40))], lambda: handed_on.append(journal.has_written(receipt)))
    assert handed_on == [False], "running requests go on, and say so"
    with pytest.raises(JournalError):
        journal.accept(accepted("new")).result(0)
    assert journal.trouble() is not None
    monkeypatch.undo()
    compact(journal)
    assert journal.has_written(receipt)
    assert journal.trouble() is None
    (a, _, _) = left_by_a_kill(path, tmp_path / "copies")
    assert len(a.choices[1].tokens) == 41
    journal.close()


def test_a_file_that_somebody_has_put_there_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    path.unlink()
    path.write_text("a note")
    path.chmod(0o644)
    compact(journal)
    assert path.with_name("j.found").read_text() == "a note"
    assert path.with_name("j.found").stat().st_mode & 0o777 == 0o600
    journal.close()


def test_whatever_is_put_there_again_and_again_is_moved_aside_each_time(tmp_path: Path) -> None:
    path = tmp_path / "state" / "j"
    journal = a_full_one(path)
    for harm in [*WAYS[-4:], *WAYS[-4:], write_over_it, put_a_folder_in_its_place, write_over_it]:
        harm(path)
        compact(journal)
        assert is_durable(journal), harm.__name__
        assert [request.accepted.reply_id for request in left_by_a_kill(path, tmp_path / "copies")] == ["a", "b", "d"]
    journal.close()


def test_a_journal_that_is_a_link_is_looked_after_like_any_other(tmp_path: Path) -> None:
    path, real = tmp_path / "state" / "j", tmp_path / "elsewhere" / "j"
    real.parent.mkdir()
    path.parent.mkdir()
    path.symlink_to(real)
    journal = a_full_one(path)
    compact(journal)
    assert measured(journal, "journal_rewrites") == 0
    real.with_name("j-wal").unlink()
    compact(journal)
    assert measured(journal, "journal_rewrites") == 1
    assert [request.accepted.reply_id for request in left_by_a_kill(path, tmp_path / "copies")] == ["a", "b", "d"]
    journal.close()


OPERATIONS = ["accept", "append", "place", "keep", "drop", "fail", "compact", "harm"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whenever_the_files_go_a_restart_finds_what_it_would_have_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Of two journals that are told the same one is harmed, again and again."""
    folder = tmp_path_factory.mktemp("gone")
    paths = [folder / "harmed" / "j", folder / "calm" / "j"]
    for path in paths:
        path.parent.mkdir()
    journals = [open_at(path)[0] for path in paths]
    now_s = 1000.0
    for journal in journals:
        journal._queue.wall_clock = lambda: now_s
    names = [str(number) for number in range(4)]
    for number, operation in enumerate(data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=25))):
        name = data.draw(st.sampled_from(names))
        if operation == "harm":
            for part in data.draw(st.sampled_from([("j",), ("j-wal",), ("j", "j-wal")])):
                paths[0].with_name(part).unlink(missing_ok=True)
            continue
        now_s += 1
        for journal in journals:
            if operation == "accept" and name not in journal._queue.ledger.requests:
                journal.accept(accepted(name, accepted_s=number)).result(0)
            elif operation == "append":
                journal.append([(RequestId(f"{each}-0"), token(number)) for each in (name, names[0])])
            elif operation == "place":
                journal.note_placement(RequestId(f"{name}-0"), SequenceId(number))
            elif operation == "fail":
                journal.append([(RequestId(f"{name}-0"), DeadlineError(str(number)))])
            elif operation in ("keep", "drop"):
                journal.end(name, is_kept=operation == "keep")
            elif operation == "compact":
                compact(journal)
    for journal in journals:
        compact(journal)
        journal.close()
    assert said(reopened(paths[0])) == said(reopened(paths[1]))
