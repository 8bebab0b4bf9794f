"""A request over which the router ends three times in a row is set aside: kept on disk, told to its client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import SetAsideError
from services.router.engine import Token
from services.router.journal.culprits import Ending, Record, judge
from services.router.journal.records import JournalledChoice, JournalledRequest
from services.router.journal.set_aside import (
    MAX_KEPT,
    Attention,
    SetAside,
    attention_path,
    read_ending,
    without_culprits,
)
from tests.support.front.journals import accepted


def journalled(name: str, num_tokens: int = 3, ended_s: float | None = None) -> JournalledRequest:
    choice = JournalledChoice(fresh=[Token(number) for number in range(num_tokens)])
    request = accepted(name, num_choices=2, client_request_id=f"own-{name}")
    return JournalledRequest(request, (choice, JournalledChoice()), ended_s, 1)


A, B, C = (journalled(name) for name in "abc")


# Who is to blame


def test_who_is_handled_at_three_ends_in_a_row_is_set_aside() -> None:
    record = Record()
    for _ in range(2):
        judgement = judge(record, Ending("b-1"), [A, B])
        assert not judgement.set_aside
        record = judgement.record
    judgement = judge(record, Ending("b-0"), [A, B])
    assert list(judgement.set_aside) == ["b"]
    assert "3 times in a row" in judgement.set_aside["b"]
    assert judgement.record == Record()


def test_who_is_being_restored_at_three_ends_in_a_row_is_set_aside_unless_it_was_anothers_turn() -> None:
    record = Record()
    for ending in (Ending(restored="b-0"), Ending("a-0", restored="b-0"), Ending(restored="b-0")):
        judgement = judge(record, ending, [A, B])
        assert not judgement.set_aside
        record = judgement.record
    assert list(judge(record, Ending(restored="b-0"), [A, B]).set_aside) == ["b"]


def test_who_gets_further_in_between_is_not_to_blame() -> None:
    record = Record()
    for num_tokens in range(5, 15):
        judgement = judge(record, Ending("b-1"), [A, journalled("b", num_tokens)])
        assert not judgement.set_aside
        record = judgement.record


def test_an_end_from_outside_begins_the_count_anew() -> None:
    record = judge(judge(Record(), Ending("b-0"), [B]).record, Ending("b-0"), [B]).record
    record = judge(record, Ending(), [B]).record
    assert not judge(record, Ending("b-0"), [B]).set_aside


def test_two_that_end_the_router_in_turn_are_both_set_aside() -> None:
    record, gone = Record(), set[str]()
    for name in "abababab":
        living = [request for request in (A, B, C) if request.accepted.reply_id not in gone]
        judgement = judge(record, Ending(f"{name}-0"), living)
        record = judgement.record
        gone |= judgement.set_aside.keys()
    assert gone == {"a", "b"}


def test_who_has_ended_is_to_blame_where_it_is_planned_again_and_nowhere_else() -> None:
    ended = journalled("b", ended_s=5.0)
    record = judge(Record(), Ending("b-0", is_broken=True), [A, ended]).record
    assert not record.ends
    assert list(record.unnamed) == ["a"]
    for _ in range(2):
        judgement = judge(record, Ending(restored="b-0"), [A, ended])
        assert not judgement.set_aside
        record = judgement.record
    assert list(judge(record, Ending(restored="b-0"), [A, ended]).set_aside) == ["b"]


def test_a_request_that_is_gone_is_nobodys_fault() -> None:
    assert judge(Record(), Ending("z-0"), [A]).record == Record()


def test_errors_that_no_request_can_be_named_for_halve_the_line_from_the_third_on() -> None:
    record, line = Record(), [A, B, C]
    seen = []
    for _ in range(5):
        judgement = judge(record, Ending("", is_broken=True), line)
        record = judgement.record
        line = [request for request in line if request.accepted.reply_id not in judgement.set_aside]
        seen.append([request.accepted.reply_id for request in line])
    assert seen == [["a", "b", "c"], ["a", "b", "c"], ["a"], [], []]


def test_errors_far_apart_that_no_request_can_be_named_for_are_nobodys_who_got_on_meanwhile() -> None:
    """One a month: whoever is under way at the third has had nothing to do with the first."""
    record = Record()
    for month in range(6):
        line = [journalled("a", 5 + month), journalled(f"new-{month}", 0)]
        judgement = judge(record, Ending("", is_broken=True), line)
        assert not judgement.set_aside
        record = judgement.record


def test_of_those_under_way_only_who_got_no_token_between_three_unnamed_errors_is_set_aside() -> None:
    record = Record()
    for time in range(3):
        line = [journalled("a", 5 + time), B, journalled(f"new-{time}", 0)]
        judgement = judge(record, Ending("", is_broken=True), line)
        record = judgement.record
    assert list(judgement.set_aside) == ["b"]
    assert "3 times in a row" in judgement.set_aside["b"]


# The note that a killed router leaves

CHILD = """
import os, signal, sys
from pathlib import Path
from services.router.journal.set_aside import Attention
attention = Attention(Path(sys.argv[1]), Path(sys.argv[1] + ".ending"))
attention("first")
attention("")
attention.restoring("cmpl-9-0")
if sys.argv[2] != "restore": attention.restoring("")
if sys.argv[2] != "restore": attention("cmpl-7-0")
if sys.argv[2] == "exit": os._exit(3)
if sys.argv[2] == "break": attention.note_break()
if sys.argv[2] == "over": attention("")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("how", "ending"),
    [
        ("kill", Ending("cmpl-7-0")),
        ("exit", Ending("cmpl-7-0")),
        ("restore", Ending(restored="cmpl-9-0")),
        ("break", Ending("cmpl-7-0", is_broken=True)),
        ("over", Ending()),
    ],
)
def test_whose_turn_it_was_is_there_after_the_process_was_killed(tmp_path: Path, how: str, ending: Ending) -> None:
    path = tmp_path / "attention"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), how], check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    assert child.returncode in (3, -signal.SIGKILL)
    broken = tmp_path / "attention.ending"
    assert read_ending(path, broken) == ending
    broken.unlink(missing_ok=True)
    Attention(path, broken)
    assert read_ending(path, broken) == Ending(), "a new router begins without"


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b"\xff" * 512, b"\xff" * 1024])
def test_a_note_that_is_not_there_or_no_note_names_nobody_who_lives(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "attention"
    if content is not None:
        path.write_bytes(content)
        (tmp_path / "ending").write_bytes(content)
    assert not judge(Record(), read_ending(path, tmp_path / "ending"), [A]).record.ends


def test_a_note_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "attention"
    attention = Attention(path, tmp_path / "ending")
    path.unlink()
    attention.look_after()
    attention("x" * 1000)
    assert read_ending(path, tmp_path / "ending") == Ending("x" * 250)


def test_a_router_that_ends_in_order_leaves_no_note_and_two_folders_have_two(tmp_path: Path) -> None:
    path = attention_path(tmp_path)
    assert path != attention_path(tmp_path / "other")
    attention = Attention(path, tmp_path / "ending.json")
    attention("a-0")
    attention.close()
    assert not path.exists()


# What becomes of it


def run_lives(folder: Path, requests: list[JournalledRequest], handled: str, count: int) -> tuple[list[str], list[str]]:
    """Who is gone on with after so many routers ended over one request, and whom the journal was told to forget."""
    forgotten: list[str] = []
    going_on = requests
    for _ in range(count):
        Attention(attention_path(folder), folder / "ending.json")(handled)
        going_on, _ = without_culprits(folder, requests, forgotten.append)
    attention_path(folder).unlink()
    return [request.accepted.reply_id for request in going_on], forgotten


def test_after_three_ends_the_others_go_on_and_the_client_is_told_for_good(tmp_path: Path) -> None:
    requests = [journalled("a"), journalled("b"), journalled("old", ended_s=5.0)]
    assert run_lives(tmp_path, requests, requests[1].accepted.choice_ids[0], 2) == (["a", "b", "old"], [])
    assert run_lives(tmp_path, requests, requests[1].accepted.choice_ids[0], 1) == (["a", "old"], ["b"])
    for again in (SetAside(tmp_path / "set-aside"), SetAside(tmp_path / "set-aside")):
        for name in ("b", "own-b"):
            with pytest.raises(SetAsideError, match="3 times in a row") as told:
                again.refuse(requests[1].accepted.tenant, name)
            assert (told.value.http_status, told.value.code) == (500, "request_set_aside")
        again.refuse("another tenant", "b")
        again.refuse(requests[0].accepted.tenant, "a")
    (path,) = (tmp_path / "set-aside").iterdir()
    kept = json.loads(path.read_text())
    assert (kept["reply_id"], kept["choices"]) == ("b", [[0, 1, 2], []])
    assert path.parent.stat().st_mode & 0o077 == 0, "prompts stand in it in clear"
    # A router that is killed before its journal has forgotten the request does not go on with it either.
    assert run_lives(tmp_path, requests, "", 1) == (["a", "old"], ["b"])


def test_after_three_ends_over_one_that_had_ended_its_client_is_told_and_it_is_planned_no_more(tmp_path: Path) -> None:
    requests, forgotten = [journalled("a"), journalled("old", ended_s=5.0)], list[str]()
    for _ in range(3):
        Attention(attention_path(tmp_path), tmp_path / "ending.json").restoring(requests[1].accepted.choice_ids[0])
        assert forgotten == []
        going_on, folder = without_culprits(tmp_path, requests, forgotten.append)
    attention_path(tmp_path).unlink()
    assert (going_on, forgotten) == (requests[:1], ["old"])
    with pytest.raises(SetAsideError, match="3 times in a row"):
        folder.refuse(requests[1].accepted.tenant, "own-old")


def test_what_is_kept_aside_is_bounded_and_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    folder = SetAside(tmp_path / "set-aside")
    for number in range(MAX_KEPT + 5):
        folder.keep(journalled(f"r{number}", 0), "why")
    assert len(list((tmp_path / "set-aside").iterdir())) == MAX_KEPT
    next((tmp_path / "set-aside").iterdir()).write_text("{")
    SetAside(tmp_path / "set-aside")


def test_what_is_no_file_among_what_is_kept_aside_ends_no_router_and_stays(tmp_path: Path) -> None:
    odd = tmp_path / "set-aside" / "folder.json"
    odd.mkdir(parents=True)
    (tmp_path / "set-aside" / "link.json").symlink_to(tmp_path / "nowhere")
    folder = SetAside(tmp_path / "set-aside")
    for number in range(MAX_KEPT + 1):
        folder.keep(journalled(f"r{number}", 0), "why")
    assert odd.is_dir()
    assert len(list((tmp_path / "set-aside").iterdir())) == MAX_KEPT + 2


def test_shared_memory_that_cannot_be_had_costs_the_note_and_nothing_else(tmp_path: Path) -> None:
    attention = Attention(tmp_path / "missing" / "attention", tmp_path / "ending")
    attention("a-0")
    attention.look_after()
    attention.note_break()
    assert read_ending(tmp_path / "nothing", tmp_path / "ending") == Ending("a-0", is_broken=True)
    attention.close()


LIFE = """
import os, sys
from pathlib import Path
from unittest import mock
from common.ids import Generation, PipelineId
from services.router.scheduling.request import Request
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.journal.set_aside import Attention, attention_path, without_culprits
from tests.support.front.journals import accepted, open_at
from tests.support.router.scheduling import open_pipeline
from tests.support.router.simulated_pipeline import build_request

folder = Path(sys.argv[1])
journal, journalled = open_at(folder / "journal.sqlite3")
if not journalled and not (folder / "set-aside").exists():
    for name in "abc":
        journal.accept(accepted(name))
    journal.close()
    journal, journalled = open_at(folder / "journal.sqlite3")
journalled, _ = without_culprits(folder, journalled, lambda name: journal.end(name, is_kept=False))
scheduler = Scheduler(
    SchedulerSettings(), attend=Attention(attention_path(folder), folder / "ending.json")
)
for request in journalled:
    scheduler.add(build_request(request.accepted.choice_ids[0], 5, 5).restored([]), 0.0)
open_pipeline(scheduler, PipelineId(0), Generation(1), 100, 1, 0.0)
original = Request.token_ids

def token_ids(request, start, stop):
    if request.request_id == "b-0":
        os.kill(os.getpid(), 9)
    return original(request, start, stop)

with mock.patch.object(Request, "token_ids", token_ids):
    (plan,) = scheduler.schedule(0.0)
journal.close()
print(len(plan.chunks), [request.accepted.reply_id for request in journalled])
"""


def test_a_journal_that_kills_every_router_that_restores_it_does_so_three_times(tmp_path: Path) -> None:
    said = []
    for _ in range(5):
        life = subprocess.run(
            [sys.executable, "-c", LIFE, str(tmp_path)],
            check=False,
            capture_output=True,
            env=os.environ | {"PYTHONPATH": "."},
        )
        said.append((life.returncode, life.stdout.decode().splitlines()[-1:]))
    attention_path(tmp_path).unlink()
    killed: tuple[int, list[str]] = (-signal.SIGKILL, [])
    assert said == [killed] * 3 + [(0, ["2 ['a', 'c']"])] * 2
