"""The journal: what was committed comes back with the same bits, and nothing that was not."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import (
    ContextLengthError,
    JournalError,
    NodeLostError,
    OverloadedError,
)
from common.ids import RequestId, SequenceId
from services.router.engine import FinishReason, RecoveryCounts
from services.router.journal.journal import COMPACT_INTERVAL_S, RETRY_INTERVAL_S
from services.router.journal.store import MAX_ROWS
from tests.support.front.journal_files import bits, compact, fill, is_durable, limit_pages, reopened
from tests.support.front.journals import AWKWARD, accepted, measured, open_at, token


@pytest.mark.parametrize("is_compacted", [False, True])
def test_everything_comes_back_with_the_same_bits(tmp_path: Path, is_compacted: bool) -> None:
    path = tmp_path / "j"
    journal, restored = open_at(path)
    assert restored == []
    first, second = accepted("a", 2), accepted("b", is_resumable=False, idempotency_key="k", seed=0)
    journal.accept(first).result(0)
    journal.accept(second).result(0)
    last = replace(token(3, FinishReason.STOP), recovery=RecoveryCounts(2, 40, 1))
    journal.append([(RequestId("a-0"), token(0)), (RequestId("a-1"), token(1)), (RequestId("unknown"), token(9))])
    journal.note_placement(RequestId("a-1"), SequenceId((7 << 32) | 5))
    if is_compacted:
        compact(journal)
    journal.append([(RequestId("a-0"), last), (RequestId("b-0"), OverloadedError("full", 9))])
    if is_compacted:
        compact(journal)
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
    journal.accept(accepted("a")).result(0)
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
            journal.accept(accepted("a")).result(0)
        assert sum(len(request.choices[0].tokens) for request in restored) == start
        assert measured(journal, "requests_restored") == len(restored)
        for number in range(start, start + 4):
            journal.append([(RequestId("a-0"), token(number))])
            if number % 3 == 0:
                compact(journal)
        journal.close()
    (a,) = reopened(path)
    assert a.choices[0].tokens == [token(number) for number in range(12)]


def test_plain_requests_are_deleted_at_their_end_and_kept_ones_after_their_time(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    now_s = 1000.0
    journal._queue.wall_clock = lambda: now_s
    for name in ("plain", "kept", "running"):
        journal.accept(accepted(name)).result(0)
        journal.append([(RequestId(f"{name}-0"), token(1))])
    journal.end("plain", is_kept=False)
    journal.end("kept", is_kept=True)
    journal.end("unknown", is_kept=True)
    journal.append([(RequestId("plain-0"), token(2))])
    compact(journal)
    rows = journal._writer._store._connection.execute(
        "SELECT reply_id, ended_s FROM requests LEFT JOIN ends ON number = request ORDER BY number"
    ).fetchall()
    assert rows == [("kept", 1000.0), ("running", None)]
    now_s += 601
    compact(journal)
    counts = [
        journal._writer._store._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("requests", "segments", "ends", "log")
    ]
    assert counts == [1, 1, 0, 0]
    journal.close()
    assert [request.accepted.reply_id for request in reopened(path)] == ["running"]


def test_what_ended_before_the_restart_is_told_with_its_time_and_expires(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    journal.accept(accepted("a")).result(0)
    journal.end("a", is_kept=True)
    journal.close()
    journal, (a,) = open_at(path)
    assert a.ended_s is not None
    assert measured(journal, "requests_restored") == 0
    journal.close()
    journal, restored = open_at(path, retention_s=-1.0)
    assert restored == []
    compact(journal)
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
        journal.accept(accepted(name)).result(0)
    num_steps = data.draw(st.integers(0, 12), label="steps")
    compactions = data.draw(st.sets(st.integers(0, 12), max_size=3), label="compactions")
    for number in range(num_steps):
        journal.append([(RequestId(f"{name}-0"), token(number)) for name in names])
        if number in compactions:
            compact(journal)
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
from tests.support.front.journals import accepted, open_at, token
journal, _ = open_at(Path(sys.argv[1]))
journal.accept(accepted("a")).result(0)
number = 0
while True:
    journal.append([("a-0", token(number))])
    if number % 50 == 0:
        journal._next_compaction_s = 0.0
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
    journal._clock = journal._writer._clock = lambda: now_s
    journal.accept(accepted("a")).result(0)
    limit_pages(journal, 12)
    number = fill(journal, "a-0")
    with pytest.raises(JournalError, match="disk full"):
        journal.accept(accepted("b")).result(0)
    for _ in range(20):
        journal.append([(RequestId("a-0"), token(number))])
        number += 1
    assert measured(journal, "journal_writing") == 0
    assert measured(journal, "journal_unwritten_steps") > 20
    limit_pages(journal, 100_000)
    now_s += RETRY_INTERVAL_S
    journal.append([(RequestId("a-0"), token(number))])
    assert is_durable(journal)
    assert measured(journal, "journal_writing") == 1
    journal.accept(accepted("c")).result(0)
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
    connection = journal._writer._store._connection
    connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)  # the least that SQLite may be built with
    now_s = 100.0
    journal._clock = journal._writer._clock = lambda: now_s
    journal.accept(accepted("a")).result(0)
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
            journal.accept(accepted("b")).result(0)
        assert connection.execute("SELECT count(*) FROM log").fetchone() == (num_written,), "all or nothing"
    limit_pages(journal, 100_000)
    now_s += RETRY_INTERVAL_S
    journal.accept(accepted("c")).result(0)
    assert is_durable(journal)
    journal.close()
    a, _ = reopened(path)
    assert a.choices[0].tokens == [token(each) for each in range(number)]


def test_a_request_that_could_not_be_written_is_not_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    limit_pages(journal, 7)
    with pytest.raises(JournalError):
        journal.accept(accepted("a", body=b"x" * 100_000)).result(0)
    assert is_durable(journal), "nothing that runs is missing"
    journal.append([(RequestId("a-0"), token(1))])
    journal.close()
    assert reopened(path) == []


def test_a_fold_that_finds_no_room_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    now_s = 100.0
    journal._clock = journal._writer._clock = lambda: now_s
    journal.accept(accepted("a", 3)).result(0)
    number = 0
    limit_pages(journal, 14)
    while measured(journal, "journal_failed_commits") == 0:
        for index in range(3):
            journal.append([(RequestId(f"a-{index}"), token(number))])
        number += 1
        now_s += COMPACT_INTERVAL_S / 20
        journal.tick()
    limit_pages(journal, 100_000)
    now_s += 2 * COMPACT_INTERVAL_S
    journal.tick()
    assert is_durable(journal)
    journal.close()
    (a,) = reopened(path)
    for choice in a.choices:
        assert choice.tokens == [token(each) for each in range(number)]


def test_errors_come_back_as_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal, _ = open_at(path)
    for name, error in (("a", NodeLostError("gone")), ("b", ContextLengthError("too long"))):
        journal.accept(accepted(name)).result(0)
        journal.append([(RequestId(f"{name}-0"), error)])
    journal.close()
    errors = [request.choices[0].error for request in reopened(path)]
    assert [(type(error), str(error)) for error in errors] == [
        (NodeLostError, "gone"),
        (ContextLengthError, "too long"),
    ]
