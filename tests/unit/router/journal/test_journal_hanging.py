"""A disk that hangs under the journal: nobody waits for it for long, and it is caught up with from memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FencedError, JournalError
from common.ids import RequestId
from services.router.engine import FinishReason
from services.router.journal.disk_thread import DiskThread, Housekeeping, finish_within
from services.router.journal.journal import STUCK_AFTER_S, Journal
from tests.support.front.disks import HangingDisk, PromptDisk
from tests.support.front.journal_files import is_durable, reopened
from tests.support.front.journals import accepted, measured, open_at, token

HANGS_S = STUCK_AFTER_S + 0.1


def with_one_request(path: Path) -> tuple[Journal, HangingDisk]:
    disk = HangingDisk()
    journal, _ = open_at(path, disk=disk)
    journal._next_compaction_s = float("inf")
    accepting = journal.accept(accepted("a"))
    disk.answer()
    accepting.result(0)
    return journal, disk


def test_tokens_are_handed_on_when_they_are_written_and_not_before(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    handed_on: list[int] = []
    for number in range(3):
        journal.append([(RequestId("a-0"), token(number))], lambda number=number: handed_on.append(number))  # type: ignore[misc]
    disk.busy_s = STUCK_AFTER_S / 2
    journal.tick()
    assert handed_on == []
    disk.answer()
    assert handed_on == [0, 1, 2]
    assert journal.has_written(journal.receipt("a"))


def test_a_disk_that_hangs_stops_no_running_request_and_their_tokens_are_marked(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    handed_on: list[int] = []
    journal.append([(RequestId("a-0"), token(0))], lambda: handed_on.append(0))
    disk.busy_s = HANGS_S
    journal.tick()
    assert handed_on == [0]
    for number in range(1, 50):
        journal.append([(RequestId("a-0"), token(number))], lambda number=number: handed_on.append(number))  # type: ignore[misc]
    assert handed_on == list(range(50))
    receipt = journal.receipt("a")
    assert not journal.has_written(receipt)
    assert (measured(journal, "journal_writing"), measured(journal, "journal_unwritten_steps")) == (0, 50)
    disk.answer()
    journal.tick()
    disk.answer()
    assert journal.has_written(receipt)
    assert handed_on == list(range(50)), "nothing twice"
    journal.close()
    disk.answer()
    (a,) = reopened(tmp_path / "j")
    assert a.choices[0].tokens == [token(number) for number in range(50)]


def test_a_disk_that_hangs_refuses_new_requests_and_says_why(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    waiting, flushing = journal.accept(accepted("b")), journal.flush()
    disk.busy_s = HANGS_S
    assert not waiting.done()
    journal.tick()
    with pytest.raises(JournalError, match=r"the disk under STATE_DIR has not answered for 1 s"):
        waiting.result(0)
    assert flushing.result(0) is False
    with pytest.raises(JournalError, match="has not answered"):
        journal.accept(accepted("c")).result(0)
    assert journal.flush().result(0) is False
    assert "has not answered" in str(journal.trouble())
    disk.answer()
    journal.tick()
    assert journal.trouble() is None
    accepting = journal.accept(accepted("d"))
    disk.answer()
    accepting.result(0)
    journal.close()
    disk.answer()
    assert [request.accepted.reply_id for request in reopened(tmp_path / "j")] == ["a", "d"]


def test_a_request_that_was_refused_while_it_was_being_written_is_not_there_after_a_restart(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    insert = journal._writer._store.insert_request

    def hanging(*arguments: Any) -> None:
        disk.busy_s = HANGS_S
        journal.tick()  # as the mesh thread would
        insert(*arguments)

    journal._writer._store.insert_request = hanging  # type: ignore[assignment, method-assign]
    accepting = journal.accept(accepted("b"))
    disk.answer()
    with pytest.raises(JournalError):
        accepting.result(0)
    disk.answer()
    journal.close()
    disk.answer()
    assert [request.accepted.reply_id for request in reopened(tmp_path / "j")] == ["a"]


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_request_whose_client_goes_while_it_is_written_is_not_there_after_a_restart(
    tmp_path: Path, is_begun: bool
) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    accepting = journal.accept(accepted("b"))
    if is_begun:
        disk.answer()
    accepting.cancel()
    journal.end("b", is_kept=False)
    disk.answer()
    journal.close()
    disk.answer()
    assert [request.accepted.reply_id for request in reopened(tmp_path / "j")] == ["a"]


def test_a_disk_that_hangs_is_told_of_with_its_seconds_and_again_when_they_have_doubled(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    with structlog.testing.capture_logs() as captured:
        for tenths in range(11, 60):
            disk.busy_s = tenths / 10
            journal.tick()
        disk.answer()
        journal.tick()
    assert [(entry["event"], entry.get("stuck_s")) for entry in captured] == [
        ("journal_stuck", 1.1),
        ("journal_stuck", 2.2),
        ("journal_stuck", 4.4),
        ("journal_answers_again", None),
    ]


def test_what_was_read_between_two_commits_is_durable(tmp_path: Path) -> None:
    """A step may be on its way to the disk, of the same request too: nobody has its tokens yet."""
    journal, disk = with_one_request(tmp_path / "j")
    journal.append([(RequestId("a-0"), token(0))])
    disk.answer()
    journal.append([(RequestId("a-0"), token(1, FinishReason.STOP))])
    assert not is_durable(journal)
    assert journal.has_written(journal.receipt("a"))
    receipt = journal.receipt("a")
    journal.end("a", is_kept=False)
    assert journal.has_written(receipt), "also after its end, which is not written yet"


def test_a_step_that_brings_nothing_to_be_written_makes_nothing_less_durable(tmp_path: Path) -> None:
    """Such as what the mesh still made for a choice that its stop string had ended."""
    journal, disk = with_one_request(tmp_path / "j")
    journal.accept(accepted("over"))
    disk.answer()
    journal.end("over", is_kept=False)
    handed_on: list[int] = []
    journal.append([(RequestId("a-0"), token(0))], lambda: handed_on.append(0))
    disk.answer()
    journal.append([(RequestId("over-0"), token(0))], lambda: handed_on.append(1))
    journal.append([(RequestId("a-0"), token(1))], lambda: handed_on.append(2))
    journal.append([(RequestId("over-0"), token(1))], lambda: handed_on.append(3))
    assert handed_on == [0, 1]
    assert journal.has_written(journal.receipt("a")), "its client has one token, which is written"
    disk.answer()
    assert handed_on == [0, 1, 2, 3]
    assert journal.has_written(journal.receipt("a"))


def test_a_router_that_was_replaced_hands_nothing_on_that_waits_for_the_disk(tmp_path: Path) -> None:
    journal, disk = with_one_request(tmp_path / "j")
    handed_on: list[int] = []
    journal.append([(RequestId("a-0"), token(0))], lambda: handed_on.append(0))
    accepting = journal.accept(accepted("b"))

    def replaced() -> None:
        raise FencedError("term 5")

    journal._writer._check_term = replaced
    with pytest.raises(FencedError):
        disk.answer()
    for act in (journal.tick, lambda: journal.append([]), lambda: accepting.result(0)):
        with pytest.raises(FencedError):
            act()
    assert handed_on == []


@settings(max_examples=150, deadline=None)
@given(events=st.lists(st.sampled_from(["append", "append", "other", "hang", "full", "room", "answer"]), max_size=30))
def test_steps_are_handed_on_once_and_in_order_whatever_the_disk_does(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    path = tmp_path_factory.mktemp("order") / "j"
    journal, disk = with_one_request(path)
    append, handed_on = journal._writer._store.append_steps, list[int]()
    number = num_tokens = 0

    def full(steps: object) -> None:
        raise OSError("full")

    for event in [*events, "room", "answer"]:
        if event in ("append", "other"):  # a step of another request has nothing for the disk
            outcomes = [(RequestId("a-0"), token(num_tokens))] if event == "append" else []
            journal.append(outcomes, lambda number=number: handed_on.append(number))  # type: ignore[misc]
            number, num_tokens = number + 1, num_tokens + len(outcomes)
        elif event == "hang":
            disk.busy_s = HANGS_S
            journal.tick()
        elif event in ("full", "room"):
            journal._writer._store.append_steps = full if event == "full" else append  # type: ignore[method-assign]
        else:
            disk.answer()
            journal.tick()
            disk.answer()
        assert handed_on == list(range(len(handed_on)))
    assert journal.flush()
    disk.answer()
    assert handed_on == list(range(number))
    assert journal.has_written(journal.receipt("a"))
    journal.close()
    disk.answer()
    (a,) = reopened(path)
    assert a.choices[0].tokens == [token(each) for each in range(num_tokens)]


# ---- the thread


def test_the_disk_thread_says_how_long_its_job_has_taken_and_the_end_waits_no_longer_than_it_may() -> None:
    now_s, answers = [5.0], threading.Event()
    disk = DiskThread(lambda: now_s[0])
    disk.start()
    assert disk.busy_s == 0.0
    begun = threading.Event()

    def hanging() -> None:
        begun.set()
        answers.wait(10)

    disk.submit(hanging)
    done: list[int] = []
    disk.submit(lambda: done.append(1))
    assert begun.wait(5)
    now_s[0] = 8.0
    assert disk.busy_s == 3.0
    assert not disk.close(within_s=0.05)
    assert done == []
    answers.set()
    assert disk.close(within_s=5)
    assert (disk.busy_s, done) == (0.0, [1])


def test_what_a_job_raises_is_raised_again_in_the_mesh_thread_and_the_next_job_is_done() -> None:
    disk, done = DiskThread(), threading.Event()

    def fenced() -> None:
        raise FencedError("term 5")

    housekeeping = Housekeeping(disk, fenced)
    housekeeping()
    disk.submit(done.set)
    disk.start()
    assert done.wait(5)
    with pytest.raises(FencedError):
        housekeeping()
    assert disk.close(5)


def test_the_folder_is_looked_after_now_and_then_and_never_twice_at_a_time() -> None:
    now_s, looks = [0.0], list[float]()
    disk, sockets = HangingDisk(), list[float]()
    housekeeping = Housekeeping(
        disk, lambda: looks.append(now_s[0]), lambda: sockets.append(now_s[0]), clock=lambda: now_s[0]
    )
    for tenths in range(50):
        now_s[0] = tenths / 10
        housekeeping()
    assert (len(disk.jobs), sockets) == (1, []), "nor does the mesh thread touch the folder while the disk hangs"
    disk.answer()
    housekeeping()
    assert sockets == [4.9]
    prompt = Housekeeping(PromptDisk(), lambda: looks.append(now_s[0]), clock=lambda: now_s[0])
    looks.clear()
    for tenths in range(50):
        now_s[0] = tenths / 10
        prompt()
    assert len(looks) == 10


def test_work_that_hangs_is_not_waited_for() -> None:
    answers = threading.Event()

    def hanging() -> None:
        answers.wait(10)

    assert not finish_within(hanging, 0.05)
    answers.set()
    assert finish_within(lambda: None, 5)
