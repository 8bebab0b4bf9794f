"""What was done is undone from its end, once, and as much of it as can be."""

from __future__ import annotations

import pytest

from chaos.faults.base import UndoList
from chaos.target import TargetError


def test_steps_are_undone_from_the_last_to_the_first_and_once() -> None:
    undone: list[int] = []
    undo = UndoList()
    for number in range(3):
        undo.add(undone.append, number)
    undo.run()
    undo.run()
    assert undone == [2, 1, 0]


def test_what_cannot_be_undone_keeps_nothing_from_being_undone_and_is_tried_again() -> None:
    undone: list[str] = []
    reasons: list[Exception] = [TargetError("no engine"), OSError("no room")]

    def undo_one(name: str) -> None:
        if name == "two" and reasons:
            raise reasons.pop()
        undone.append(name)

    undo = UndoList()
    for name in ("one", "two", "three"):
        undo.add(undo_one, name)
    for reason in ("no room", "no engine"):
        with pytest.raises(TargetError, match=f"not healed: {reason}"):
            undo.run()
    assert undone == ["three", "one"]
    undo.run()
    assert undone == ["three", "one", "two"]
