"""Continuing a sequence of numbers with one step, up or down: the next three."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_list

MAX_FIRST = 50
MAX_STEP = 10
GIVEN = 4
ASKED = 3


def _draw(random: Random, split: Split) -> Content:
    step = random.randint(1, MAX_STEP)
    first = random.randrange(MAX_FIRST)
    numbers = [first + index * step for index in range(GIVEN + ASKED)]
    if random.random() < 0.35:
        numbers.reverse()
    # A descending sequence shares its key with the ascending one: the same numbers.
    given, asked = numbers[:GIVEN], numbers[GIVEN:]
    slots = {"numbers": ", ".join(map(str, given))}
    return Content("continue", slots, ", ".join(map(str, asked)) + ".", (f"sequence {first} {step}",))


SEQUENCES = Task(
    name="sequences",
    phrasings={
        "continue": expand(
            "[Continue|Go on with|Extend|Complete] [the sequence|this sequence|the numbers|the series]: {numbers}",
            "What [comes|numbers come] [next|after these]: {numbers}?",
            "[Continue|Extend|Go on][|:] {numbers}",
            "What [comes next in|comes after] {numbers}?",
        )
    },
    draw_content=_draw,
    read=read_list,
)
