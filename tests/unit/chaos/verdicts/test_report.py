"""What is written at the end, and what the command ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from chaos.command import app
from chaos.record.history import Event, FaultApplied, FaultHealed, MeshWhole, RunBegan, encode_event
from chaos.record.operations import read_operations
from chaos.record.reference import StoredReferenceError, read_reference, reference_of, write_reference
from chaos.record.requests import SuiteLoad, draw_requests
from chaos.verdicts.fault_outcomes import fault_outcomes
from chaos.verdicts.judgement import Bounds, judge
from chaos.verdicts.report import Report
from chaos.verdicts.timeline_picture import BIN_S, requests_in_flight, tokens_per_second
from tests.support.chaos.histories import FAULTS_BEGIN_S, alter, alter_tokens, good_history

SUITE = "name: test\ntimeline: {count: 1, faults: [{kind: kill}]}\n"


def report(events: list[Event]) -> Report:
    return Report(events, judge(events, Bounds()))


def broken_history() -> list[Event]:
    return alter_tokens(good_history(), "run-0", 5, lambda event: None)


def unknown_history() -> list[Event]:
    return alter(good_history(), FaultApplied, lambda event: replace(event, alive=()))


def test_a_report_names_the_verdicts_the_faults_and_ends_with_both_hashes(tmp_path: Path) -> None:
    made = report(broken_history())
    made.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# test on local, seed 7: broken")
    assert "| tokens_lost | broken | run-0 choice 0: tokens 5 to 5 are missing |" in text
    assert "| 0 | 10.6 | kill | expert-0 | expert | 4 |" in text
    first, _, last = text.strip().splitlines()[-3:]
    assert first.endswith(made.judgement.sha256_without_faults)
    assert last.endswith(made.judgement.sha256_with_faults)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace(made.title, ""), "the page needs nothing else"
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["state"] == "broken"
    assert document["seed"] == 7
    assert document["faults"][0]["victims"][0]["name"] == "expert-0"


def test_a_report_says_what_a_fault_has_done() -> None:
    events = alter(good_history(), FaultHealed, lambda event: replace(event, remark="bells lost: 3", doubt=""))
    assert "| bells lost: 3 |" in report(events).markdown()


def test_names_of_the_mesh_cannot_break_the_page() -> None:
    events = alter(good_history(), RunBegan, lambda event: replace(event, model="<b>x|y"))
    assert "<b>x" not in report(events).page(b"")


@pytest.mark.parametrize(
    ("events", "failures", "errors"), [(good_history(), 0, 0), (broken_history(), 1, 0), (unknown_history(), 0, 2)]
)
def test_junit_tells_broken_from_unknown(events: list[Event], failures: int, errors: int) -> None:
    suite = ElementTree.fromstring(report(events).junit())
    assert (suite.get("failures"), suite.get("errors")) == (str(failures), str(errors))
    assert len(suite.findall("testcase")) == int(suite.get("tests", "0"))


@pytest.mark.parametrize(("events", "status"), [(good_history(), 0), (broken_history(), 1), (unknown_history(), 3)])
def test_judging_a_record_again_ends_with_the_status_of_its_verdict(
    tmp_path: Path, events: list[Event], status: int
) -> None:
    (tmp_path / "history.jsonl").write_text("".join(map(encode_event, events)))
    (tmp_path / "mine.yaml").write_text(SUITE)
    arguments = ["judge", str(tmp_path / "history.jsonl"), "--suite", str(tmp_path / "mine.yaml")]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == status, done.output
    assert (tmp_path / "out" / "report.html").exists()


def test_what_cannot_run_ends_with_2_and_a_sentence(tmp_path: Path) -> None:
    for arguments in (
        ["run", "--suite", "no-such", "--output", str(tmp_path)],
        ["run", "--target", "moon", "--output", str(tmp_path)],
        ["judge", str(tmp_path / "none")],
        ["settings", "no-such"],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_the_kinds_of_faults_are_listed_with_a_sentence_each() -> None:
    done = CliRunner().invoke(app, ["faults"])
    assert done.exit_code == 0
    assert "kill             A node is killed by SIGKILL" in done.output


def test_the_settings_of_a_suites_mesh_are_printed_for_a_shell(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SUITE + "mesh: {PP: 3, RECOVERY: replay}\n")
    done = CliRunner().invoke(app, ["settings", str(tmp_path / "mine.yaml")])
    assert (done.exit_code, done.output) == (0, "PP=3\nRECOVERY=replay\n")


def test_the_picture_counts_tokens_and_requests_in_flight() -> None:
    events = good_history()
    speed = tokens_per_second(events, FAULTS_BEGIN_S + 5)
    assert sum(speed) * BIN_S == 2 * 6 * 12
    points = requests_in_flight(read_operations(events), 20.0)
    assert max(number for _, number in points) == 4
    assert points[-1] == (20.0, 0)


def test_a_fault_that_was_never_whole_again_is_drawn_and_told_too(tmp_path: Path) -> None:
    events = alter(good_history(), MeshWhole, lambda event: None)
    made = report(events)
    made.write(tmp_path)
    assert "never" in (tmp_path / "report.md").read_text()
    assert fault_outcomes(events, [], 0.0)[0].recovery_s is None


def test_a_stored_reference_is_for_its_requests_only(tmp_path: Path) -> None:
    reference = reference_of(read_operations(good_history()))
    path = tmp_path / "reference.json"
    write_reference(path, "abc", reference)
    assert read_reference(path, "abc") == reference
    with pytest.raises(StoredReferenceError, match="other requests"):
        read_reference(path, "abd")
    path.write_text("{}")
    with pytest.raises(StoredReferenceError, match="is not a reference"):
        read_reference(path, "abc")


def test_requests_follow_from_the_seed_and_stay_what_they_are_without_penalties() -> None:
    load = SuiteLoad(requests=40, prompt_words=(4, 9), stop=0.3, two_choices=0.5, penalties=0.5)
    one, again, other = (draw_requests(seed, load, True) for seed in (1, 1, 2))
    assert one == again != other
    plain = draw_requests(1, load, False)
    for with_penalties, without in zip(one, plain, strict=True):
        left = {k: v for k, v in with_penalties.fields.items() if not k.endswith("_penalty")}
        assert left == without.fields
    kinds = " ".join(request.kind for request in one)
    assert all(word in kinds for word in ("greedy", "seeded", "stop", "n=2", "penalties"))
    assert len({request.body_sha256("m") for request in one}) == 40
    assert all("seed" in request.fields for request in one if request.fields["temperature"] > 0)


@pytest.mark.parametrize("events", [good_history(), broken_history(), unknown_history()])
def test_every_row_of_a_table_has_a_cell_for_each_column(events: list[Event]) -> None:
    for heading, columns, rows in report(events).tables():
        assert all(len(row) == len(columns) for row in rows), heading
