"""The command line."""

from __future__ import annotations

import pytest

from tests.benchmarks.agents.__main__ import parse_plan
from tests.benchmarks.make_bench_model import SIZES


def test_by_default_there_are_eight_conversations_of_twenty_turns_behind_4000_tokens() -> None:
    traffic = parse_plan([]).traffic
    assert (traffic.conversations, traffic.turns, traffic.system_tokens) == (8, 20, 4000)
    assert traffic.context_tokens < SIZES["bench"].context_tokens


def test_the_mesh_runs_as_it_ships_and_without_its_cache() -> None:
    assert parse_plan([]).meshes == ({}, {"PREFIX_CACHE": "off"})


def test_quick_is_two_turns_of_the_same_shape() -> None:
    quick, whole = parse_plan(["--quick"]).traffic, parse_plan([]).traffic
    assert quick.turns == 2
    assert (quick.conversations, quick.system_tokens) == (whole.conversations, whole.system_tokens)


@pytest.mark.parametrize("words", ["--think-s 2 1", "--answer-tokens 1 5", "--turns 0"])
def test_what_cannot_be_drawn_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_plan(words.split())
    assert "error" in capsys.readouterr().err
