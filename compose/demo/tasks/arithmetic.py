"""Adding and subtracting whole numbers of up to two digits; no result is below zero."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_last_number

MAX_DIGITS = 2


def draw_number(random: Random, max_digits: int) -> int:
    """Short numbers as often as long ones: by the size alone, nine in ten would be long."""
    return random.randrange(10 ** random.choice((*range(1, max_digits + 1), max_digits)))


def _draw_sum(random: Random, split: Split) -> Content:
    left, right = draw_number(random, MAX_DIGITS), draw_number(random, MAX_DIGITS)
    answer = f"{left} + {right} = {left + right}."
    return Content("sum", {"left": str(left), "right": str(right)}, answer, (f"adding {left} {right}",))


def _draw_difference(random: Random, split: Split) -> Content:
    small, large = sorted((draw_number(random, MAX_DIGITS), draw_number(random, MAX_DIGITS)))
    answer = f"{large} - {small} = {large - small}."
    return Content("difference", {"large": str(large), "small": str(small)}, answer, (f"subtracting {large} {small}",))


ADDING = Task(
    name="adding",
    phrasings={
        "sum": expand(
            "[What is|How much is|Calculate|Compute|Work out|Tell me] {left} [+|plus] {right}?",
            "[Add|Add up|Sum] {left} and {right}.",
            "[What is|Give me|Find] the sum of {left} and {right}.",
            "Add {right} to {left}.",
            "{left} [+|plus] {right}[| =]?",
        )
    },
    draw_content=_draw_sum,
    read=read_last_number,
)

SUBTRACTING = Task(
    name="subtracting",
    phrasings={
        "difference": expand(
            "[What is|How much is|Calculate|Compute|Work out|Tell me] {large} [-|minus] {small}?",
            "[Subtract|Take|Take away] {small} from {large}.",
            "[What is|Give me|Find] the difference of {large} and {small}.",
            "{large} [-|minus] {small}[| =]?",
        )
    },
    draw_content=_draw_difference,
    read=read_last_number,
)
