"""The journal: what was committed comes back with the same bits, and nothing that was not."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import (
    ConfigurationError,
    ContextLengthError,
    FencedError,
    JournalError,
    NodeLostError,
    OverloadedError,
)
from common.ids import RequestId, SequenceId
from services.router import journal_store
from services.router.engine import FinishReason, GeneratedToken, RecoveryCounts
from services.router.journal import FOLD_INTERVAL_S, RETRY_INTERVAL_S, Journal
from services.router.journal_records import JournalledRequest, decode_step, decode_tokens
from services.router.journal_store import MAX_ROWS
from tests.support.journals import AWKWARD, accepted, open_at, token


def fold(journal: Journal) -> None:
    journal._next_fold_s = 0.0
    journal.tick()


def reopened(path: Path) -> list[JournalledRequest]:
    journal, requests = open_at(path)
    journal.close()
    return requests


def bits(tokens: list[GeneratedToken]) -> list[tuple[int, bytes]]:
    return [(each.token_id, struct.pack("<d", each.logprob or 0.0)) for each in tokens]


def limit_pages(journal: Journal, num_pages: int) -> None:
    """A disk that is full after so many pages."""
    journal._store._connection.execute(f"PRAGMA max_page_count = {num_pages}")


def fill(journal: Journal, request_id: str, first: int = 0, limit: int = 5000) -> int:
    """Append until the disk takes no more; how many tokens were handed in."""
    number = first
    while journal.is_durable:
        assert number < limit
        journal.append([(RequestId(request_id), token(number))])
        number += 1
    return number


@pytest.mark.parametrize("is_folded", [False, True])
def test_everything_comes_back_with_the_same_bits(tmp_path: Path, is_folded: bool) -> None:
    path = tmp_path / "j"
    journal, restored = open_at(path)
    assert restored == []
    first, second = accepted("a", 2), accepted("b", is_resumable=False, idempotency_key="k", seed=0)
    journal.accept(first)
    journal.accept(second)
    last = replace(token(3, FinishReason.STOP), recovery=RecoveryCounts(2, 40, 1))
    journal.append([(RequestId("a-0"), token(0)), (RequestId("a-1"), token(1)), (RequestId("unknown"), token(9))])
    journal.note_placement(RequestId("a-1"), SequenceId((7 << 32) | 5))
    if is_folded:
        fold(journal)
    journal.append([(RequestId("a-0"), last), (RequestId("b-0"), OverloadedError("full", 9))])
    if is_folded:
        fold(journal)
    journal.close()
    a, b = reopened(path)
    assert (a.accepted, b.accepted) == (first, second)
    assert a.choices[0].tokens == [token(0), last]
    assert bits(a.choices[0].tokens) == bits([token(0), last])
    assert a.choices[1].tokens == [token(1)]
    assert [choice.sequence_id for choice in a.choices] == [None, (7 << 32) | 5]
    assert isinstance(b.choices[0].error, OverloadedError)
    assert str(b.choices[0].error) == "full"


def test_logprobs_keep_the_sign_of_zero_and_denormal_bits(tmp_path: Path) -> None:
    journal, _ = open_at(tmp_path / "j")
    journal.accept(accepted("a"))
    tokens = [token(number) for number in range(len(AWKWARD))]
    for each in tokens:
        journal.append([(RequestId("a-0"), each)])
    journal.close()
    (a,) = reopened(tmp_path / "j")
    assert bits(a.choices[0].tokens) == bits(tokens)


def test_a_request_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for start in range(0, 12, 4):
        journal, restored = open_at(path)
        if not restored:
            journal.accept(accepted("a"))
        assert sum(len(request.choices[0].tokens) for request in restored) == start
        assert journal.counts().restored_requests == len(restored)
        for number in range(start, start + 4):
            journal.append([(RequestId("a-0"), token(number))])
            if number % 3 == 0:
                fold(journal)
        journal.close()
    (a,) = reopened(path)
    assert a.choices[0].tokens == [token(number) for number in range(12)]


def test_plain_requests_are_deleted_at_their_end_and_kept_ones_after_their_time(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    now_s = 1000.0
    journal._wall_clock = lambda: now_s
    for name in ("plain", "kept", "running"):
        journal.accept(accepted(name))
        journal.append([(RequestId(f"{name}-0"), token(1))])
    journal.end("plain", is_kept=False)
    journal.end("kept", is_kept=True)
    journal.end("unknown", is_kept=True)
    journal.append([(RequestId("plain-0"), token(2))])
    fold(journal)
    rows = journal._store._connection.execute("SELECT reply_id, ended_s FROM requests ORDER BY number").fetchall()
    assert rows == [("kept", 1000.0), ("running", None)]
    now_s += 601
    fold(journal)
    counts = [
        journal._store._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("requests", "segments", "log")
    ]
    assert counts == [1, 1, 0]
    journal.close()
    assert [request.accepted.reply_id for request in reopened(path)] == ["running"]


def test_what_ended_before_the_restart_is_told_with_its_time_and_expires(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    journal.accept(accepted("a"))
    journal.end("a", is_kept=True)
    journal.close()
    journal, (a,) = open_at(path)
    assert a.ended_s is not None
    assert journal.counts().restored_requests == 0
    journal.close()
    journal, restored = open_at(path, retention_s=-1.0)
    assert restored == []
    fold(journal)
    journal.close()
    assert reopened(path) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_at_any_byte_opens_with_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What a killed process, or one whose last writes were lost, leaves behind."""
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "j"
    journal, _ = open_at(path)
    names = ["a", "b"]
    for name in names:
        journal.accept(accepted(name))
    num_steps = data.draw(st.integers(0, 12), label="steps")
    folds = data.draw(st.sets(st.integers(0, 12), max_size=3), label="folds")
    for number in range(num_steps):
        journal.append([(RequestId(f"{name}-0"), token(number)) for name in names])
        if number in folds:
            fold(journal)
    wal = (folder / "j-wal").read_bytes()
    cut = data.draw(st.integers(0, len(wal)), label="cut")
    copy = folder / "copy"
    shutil.copy(path, copy)
    garbage = data.draw(st.binary(max_size=40), label="garbage")
    (folder / "copy-wal").write_bytes(wal[:cut] + garbage)
    journal.close()
    requests = reopened(copy)
    assert [request.accepted.reply_id for request in requests] == names[: len(requests)]
    lengths = {len(request.choices[0].tokens) for request in requests}
    assert len(lengths) <= 1, "a step is there for all of its requests or for none"
    for request in requests:
        tokens = request.choices[0].tokens
        assert tokens == [token(number) for number in range(len(tokens))]
    if cut == len(wal):
        assert lengths == {num_steps}


KILLED = """
import sys
from pathlib import Path
from tests.support.journals import accepted, open_at, token
journal, _ = open_at(Path(sys.argv[1]))
journal.accept(accepted("a"))
number = 0
while True:
    journal.append([("a-0", token(number))])
    if number % 50 == 0:
        journal._next_fold_s = 0.0
        journal.tick()
    number += 1
    print(number, flush=True)
"""


def test_a_killed_process_has_written_every_step_that_it_said(tmp_path: Path) -> None:
    for round_number in range(3):
        path = tmp_path / f"j{round_number}"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = 0
        while said < 120 + 37 * round_number:
            said = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        said = int(rest[-1]) if rest else said
        (a,) = reopened(path)
        tokens = a.choices[0].tokens
        assert said <= len(tokens) <= said + 1
        assert tokens == [token(number) for number in range(len(tokens))]


def test_on_a_full_disk_new_requests_are_refused_and_running_ones_go_on_until_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    now_s = 100.0
    journal._clock = lambda: now_s
    journal.accept(accepted("a"))
    limit_pages(journal, 12)
    number = fill(journal, "a-0")
    with pytest.raises(JournalError, match="disk full"):
        journal.accept(accepted("b"))
    for _ in range(20):
        journal.append([(RequestId("a-0"), token(number))])
        number += 1
    counts = journal.counts()
    assert (counts.is_writing, counts.steps_unwritten > 20) == (False, True)
    limit_pages(journal, 100_000)
    now_s += RETRY_INTERVAL_S
    journal.append([(RequestId("a-0"), token(number))])
    assert journal.is_durable
    assert journal.counts().is_writing
    journal.accept(accepted("c"))
    journal.close()
    a, c = reopened(path)
    assert (a.accepted.reply_id, c.accepted.reply_id) == ("a", "c")
    assert a.choices[0].tokens == [token(each) for each in range(number + 1)]


@pytest.mark.parametrize("has_room_for_a_part_first", [False, True])
def test_after_a_long_outage_of_the_disk_everything_is_written_at_once(
    tmp_path: Path, has_room_for_a_part_first: bool
) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    connection = journal._store._connection
    connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)  # the least that SQLite may be built with
    now_s = 100.0
    journal._clock = lambda: now_s
    journal.accept(accepted("a"))
    limit_pages(journal, 12)
    first = fill(journal, "a-0")
    (num_written,) = connection.execute("SELECT count(*) FROM log").fetchone()
    number = first + 2 * MAX_ROWS + 7
    for each in range(first, number):
        journal.append([(RequestId("a-0"), token(each))])
    if has_room_for_a_part_first:
        limit_pages(journal, 20)
        now_s += RETRY_INTERVAL_S
        with pytest.raises(JournalError):
            journal.accept(accepted("b"))
        assert connection.execute("SELECT count(*) FROM log").fetchone() == (num_written,), "all or nothing"
    limit_pages(journal, 100_000)
    now_s += RETRY_INTERVAL_S
    journal.accept(accepted("c"))
    assert journal.is_durable
    journal.close()
    a, _ = reopened(path)
    assert a.choices[0].tokens == [token(each) for each in range(number)]


def test_a_request_that_could_not_be_written_is_not_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    limit_pages(journal, 7)
    with pytest.raises(JournalError):
        journal.accept(accepted("a", body=b"x" * 100_000))
    assert journal.is_durable, "nothing that runs is missing"
    journal.append([(RequestId("a-0"), token(1))])
    journal.close()
    assert reopened(path) == []


def test_a_fold_that_finds_no_room_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    now_s = 100.0
    journal._clock = lambda: now_s
    journal.accept(accepted("a", 3))
    number = 0
    limit_pages(journal, 14)
    while journal.counts().failed_commits == 0:
        for index in range(3):
            journal.append([(RequestId(f"a-{index}"), token(number))])
        number += 1
        now_s += FOLD_INTERVAL_S / 20
        journal.tick()
    limit_pages(journal, 100_000)
    now_s += 2 * FOLD_INTERVAL_S
    journal.tick()
    assert journal.is_durable
    journal.close()
    (a,) = reopened(path)
    for choice in a.choices:
        assert choice.tokens == [token(each) for each in range(number)]


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


def test_errors_come_back_as_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    for name, error in (("a", NodeLostError("gone")), ("b", ContextLengthError("too long"))):
        journal.accept(accepted(name))
        journal.append([(RequestId(f"{name}-0"), error)])
    journal.close()
    errors = [request.choices[0].error for request in reopened(path)]
    assert [(type(error), str(error)) for error in errors] == [
        (NodeLostError, "gone"),
        (ContextLengthError, "too long"),
    ]
