"""All tasks of the demo model, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Mapping

from compose.demo.tasks.abilities import ABILITIES_TASK
from compose.demo.tasks.arithmetic import ADDING, SUBTRACTING
from compose.demo.tasks.capitals import CAPITALS_TASK
from compose.demo.tasks.comparing import COMPARING
from compose.demo.tasks.dates import DATES
from compose.demo.tasks.letters import COUNTING, REVERSING, SPELLING
from compose.demo.tasks.refusing import REFUSING
from compose.demo.tasks.sequences import SEQUENCES
from compose.demo.tasks.sorting import SORTING
from compose.demo.tasks.task import Task
from compose.demo.tasks.units import UNITS

TASKS: tuple[Task, ...] = (
    ADDING,
    SUBTRACTING,
    COMPARING,
    SORTING,
    REVERSING,
    SPELLING,
    COUNTING,
    CAPITALS_TASK,
    UNITS,
    DATES,
    SEQUENCES,
    ABILITIES_TASK,
    REFUSING,
)

# What is slow to learn is drawn more often; what is learned by heart after a few thousand questions, less.
WEIGHTS: Mapping[str, float] = {
    "adding": 1.6,
    "subtracting": 2.0,
    "comparing": 1.4,
    "sorting": 1.9,
    "reversing": 1.6,
    "spelling": 0.4,
    "counting letters": 0.7,
    "capitals": 0.6,
    "units": 0.8,
    "dates": 1.1,
    "sequences": 1.8,
    "abilities": 0.15,
    "refusing": 0.7,
}
