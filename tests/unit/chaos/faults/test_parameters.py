"""What suites may write under `parameters`, and what holds where they write nothing."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.faults.base import allowed_values
from chaos.faults.catalog import FAULTS

RANGES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("bandwidth", "kbit_per_s"): (1000.0, 8.0, 1e8),
    ("clock_jump", "offset_s"): (3600.0, -1e9, 1e9),
    ("cpu_hog", "per_cpu"): (1.0, 0.1, 16.0),
    ("cpu_quota", "percent"): (20.0, 5.0, 10_000.0),
    ("cut_in_call", "every_s"): (0.3, 0.0, 10.0),
    ("delay", "delay_ms"): (50.0, 0.1, 60_000.0),
    ("disk_full", "left_kib"): (0, 0, 1 << 20),
    ("flap", "times"): (3, 1, 100),
    ("flap", "off_s"): (0.5, 0.01, 60.0),
    ("flap", "on_s"): (0.5, 0.01, 60.0),
    ("frames", "percent"): (5.0, 0.01, 100.0),
    ("frames", "seed"): (0, 0, 2**31),
    ("kill_in_call", "within_s"): (5.0, 0.0, 60.0),
    ("lose_bells", "every_s"): (0.1, 0.01, 10.0),
    ("lose_files", "kill_after_s"): (2.0, 0.0, 60.0),
    ("loss", "percent"): (5.0, 0.01, 100.0),
    ("memory_limit", "headroom_mib"): (8, 1, 4096),
    ("restart", "timeout_s"): (20.0, 1.0, 120.0),
    ("rolling_restart", "pause_s"): (5.0, 0.0, 600.0),
    ("rolling_restart", "timeout_s"): (20.0, 1.0, 120.0),
    ("rolling_restart", "within_s"): (300.0, 1.0, 3600.0),
    ("scale", "change"): (1, -16, 16),
    ("spoil_rings", "every_s"): (0.2, 0.01, 10.0),
    ("spoil_rings", "head_share"): (0.2, 0.0, 1.0),
    ("spoil_rings", "seed"): (0, 0, 2**31),
    ("stop", "timeout_s"): (20.0, 1.0, 120.0),
}
"""By kind and parameter: default, least, most. Those of whole numbers are whole here too."""
WORDS = {
    ("cut", "kind"): ("off", "pair", "one_way", "one_way_back", "halves"),
    ("cut_in_call", "frame"): ("answer", "question"),
    ("deny_rings", "what"): ("memory", "names"),
    ("frames", "kind"): ("corrupt", "truncate", "replay", "reorder", "lose"),
    ("kill_in_call", "state"): ("taken", "asked", "answered"),
    ("lose_files", "what"): ("sockets", "folder", "all"),
    ("scale", "kind"): ("expert", "stage"),
    ("stall", "direction"): ("both", "from", "to"),
}
"""By kind and parameter: the default first."""


@pytest.mark.parametrize(("kind", "name"), RANGES)
def test_a_number_is_taken_inside_its_range_and_nowhere_else(kind: str, name: str) -> None:
    default, low, high = RANGES[kind, name]
    for value in (default, low, high):
        assert getattr(FAULTS[kind].from_suite({name: value}), name) == value
    assert getattr(FAULTS[kind].from_suite({}), name) == default
    is_whole = isinstance(default, int)
    sort = "a whole number" if is_whole else "a number"
    wrong: list[Any] = [low - 1, high + 1, True, "1", None, [1], *([1.5, 1.0] if is_whole else [float("nan")])]
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name}={value!r} must be {sort} from".replace("[", r"\[")):
            FAULTS[kind].from_suite({name: value})


@pytest.mark.parametrize(("kind", "name"), WORDS)
def test_a_word_is_one_of_those_that_are_known(kind: str, name: str) -> None:
    words = WORDS[kind, name]
    for word in words:
        assert getattr(FAULTS[kind].from_suite({name: word}), name) == word
    assert getattr(FAULTS[kind].from_suite({}), name) == words[0]
    for value in ("most", None, 1):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be one of .*{words[-1]}"):
            FAULTS[kind].from_suite({name: value})


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_a_parameter_that_a_fault_has_not_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match="colour, heat: not known here"):
        FAULTS[kind].from_suite({"heat": 1, "colour": "red"})


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_all_parameters_of_a_fault_are_listed_above_and_no_others(kind: str) -> None:
    assert set(FAULTS[kind].parameters()) == {name for of, name in (*RANGES, *WORDS) if of == kind}


def test_what_a_parameter_must_be_is_said_in_words() -> None:
    words = {name: allowed_values(annotation) for name, annotation in FAULTS["frames"].parameters().items()}
    assert words == {
        "kind": "one of corrupt, truncate, replay, reorder, lose",
        "percent": "a number from 0.01 to 100",
        "seed": "a whole number from 0 to 2147483648",
    }
