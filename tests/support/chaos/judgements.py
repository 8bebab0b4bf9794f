"""Verdicts of a history by name."""

from __future__ import annotations

from chaos.record.history import (
    Event,
)
from chaos.verdicts.judgement import Bounds, RunJudgement, judge
from chaos.verdicts.verdict import State


def states(judgement: RunJudgement) -> dict[str, State]:
    return {verdict.name: verdict.state for verdict in judgement.verdicts}


def broken(events: list[Event], bounds: Bounds | None = None) -> set[str]:
    judgement = judge(events, bounds or Bounds())
    return {name for name, state in states(judgement).items() if state is State.BROKEN}
