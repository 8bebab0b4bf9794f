"""The command line, and what a failure is reported as."""

from __future__ import annotations

import pytest

from tests.benchmarks.peers.__main__ import parse_plan, parse_settings
from tests.benchmarks.peers.contenders import last_line


def test_settings_of_a_mesh_are_pairs_between_commas() -> None:
    assert parse_settings("") == {}
    assert parse_settings("PP=1,THREADS=2") == {"PP": "1", "THREADS": "2"}


@pytest.mark.parametrize("words", ["PP", "=1"])
def test_what_is_no_pair_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="no NAME=VALUE"):
        parse_settings(words)


def test_the_mesh_runs_as_it_ships_and_with_one_stage() -> None:
    assert parse_plan([]).meshes == ({}, {"PP": "1"})


def test_quick_is_one_short_round_of_the_same_shapes() -> None:
    quick, whole = parse_plan(["--quick"]), parse_plan([])
    assert quick.rounds == 1
    assert quick.load.concurrencies == whole.load.concurrencies
    assert quick.load.answer_tokens < whole.load.answer_tokens


def test_a_reason_is_the_last_line_that_says_something() -> None:
    assert last_line("warning\n  no compiler \n\n") == "no compiler"
    assert last_line("") == "it gave no reason"
