"""Comparing two different numbers of up to three digits: which one is larger, which one is smaller."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.arithmetic import draw_number
from compose.demo.tasks.task import Content, Task, read_last_number

MAX_DIGITS = 3


def _draw(random: Random, split: Split) -> Content:
    left, right = draw_number(random, MAX_DIGITS), draw_number(random, MAX_DIGITS)
    while left == right:
        left, right = draw_number(random, MAX_DIGITS), draw_number(random, MAX_DIGITS)
    kind = random.choice(("larger", "smaller"))
    chosen = max(left, right) if kind == "larger" else min(left, right)
    small, large = sorted((left, right))
    slots = {"left": str(left), "right": str(right)}
    # Both orders of a pair are held out together.
    return Content(kind, slots, f"Of {left} and {right}, {chosen} is {kind}.", (f"comparing {small} {large}",))


def _phrasings(comparative: str, superlative: str) -> tuple[str, ...]:
    return expand(
        f"[Which is|Which number is|What is|Tell me which is] [{comparative}], {{left}} or {{right}}?",
        f"[Which of {{left}} and {{right}} is|Of {{left}} and {{right}}, which is] [{comparative}]?",
        f"[What is|Give me|Name|Find] the [{comparative}|{superlative}] of {{left}} and {{right}}.",
        f"Compare {{left}} and {{right}}: which is [{comparative}]?",
    )


COMPARING = Task(
    name="comparing",
    phrasings={
        "larger": _phrasings("larger|bigger|greater", "largest"),
        "smaller": _phrasings("smaller|less|lower", "smallest"),
    },
    draw_content=_draw,
    read=read_last_number,
)
