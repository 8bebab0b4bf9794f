"""A suite that is wrong is refused by the field that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaos.experiment import SUITES, ExperimentError, parse_experiment, read_experiment


def suite(**changes: Any) -> dict[str, Any]:
    timeline = {"count": 3, "faults": [{"kind": "kill", "victims": {"kind": "expert"}}]}
    return {"name": "mine", "timeline": timeline | changes.pop("timeline", {})} | changes


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_suites_that_ship_are_sound_and_named_as_their_file(path: Path) -> None:
    experiment = read_experiment(path.stem)
    assert experiment.name == path.stem
    assert experiment.load.streams >= 16


@pytest.mark.parametrize(("name", "count"), [("smoke", 20), ("nightly", 200), ("soak", 1000)])
def test_suites_have_as_many_faults_as_promised(name: str, count: int) -> None:
    assert read_experiment(name).timeline.count == count


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "name: Field required"),
        (suite(load={"stream": 3}), "load.stream: Extra inputs"),
        (suite(load={"streams": 0}), "load.streams: Input should be greater"),
        (suite(load={"greedy": 1.5}), "load.greedy: Input should be less"),
        (suite(load={"prompt_words": [9, 3]}), "load: prompt_words: the first is the fewest"),
        (suite(timeline={"count": 0}), "timeline.count: Input should be greater"),
        (suite(timeline={"faults": []}), "timeline.faults: Tuple should have at least 1 item"),
        (
            suite(timeline={"faults": [{"kind": "burn"}]}),
            "timeline.faults.0: kind: there is no fault 'burn'; there are",
        ),
        (suite(timeline={"spacing_s": [3, 1]}), "timeline: spacing_s: the first is the shortest"),
        (suite(timeline={"keep": {"expat": 1}}), "timeline.keep.expat"),
        (
            suite(timeline={"faults": [{"kind": "flap", "parameters": {"times": 0}}]}),
            "timeline: faults: parameters of flap: times=0 must be a whole number from 1 to 100",
        ),
        (
            suite(timeline={"faults": [{"kind": "kill", "parameters": {"how": "hard"}}]}),
            "timeline: faults: parameters of kill: how: not known here",
        ),
        (
            suite(timeline={"faults": [{"kind": "pause", "heal_after_s": [3, 1]}]}),
            "timeline.faults.0: heal_after_s: the first is the shortest",
        ),
        (
            suite(timeline={"faults": [{"kind": "kill", "victims": {"rule": "most"}}]}),
            "timeline.faults.0.victims.rule: Input should be 'random', 'same'",
        ),
        (suite(bounds={"stall_s": {"kill": 1.0}}), "bounds: stall_s: needs a value for `default`"),
        (suite(bounds={"stall_s": {"default": 1, "kill/gpu": 1}}), "bounds: stall_s: 'kill/gpu' is not a fault kind"),
        (suite(bounds={"leaks": {"files": -1}}), "bounds.leaks.files: Input should be greater"),
    ],
)
def test_a_wrong_field_is_named(document: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExperimentError) as error:
        parse_experiment(document)
    assert str(error.value).startswith(sentence)


def test_a_suite_may_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntimeline: {count: 1, faults: [{kind: kill}]}\n")
    assert read_experiment(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "no suite"), ("- 1\n", "must hold a mapping"), ("a: [\n", "is not YAML")]
)
def test_a_file_that_is_no_suite_is_a_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExperimentError, match=sentence):
        read_experiment(str(path))
