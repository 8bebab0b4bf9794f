"""Saying what the demo model can do, and answering a greeting."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_text

ABILITIES = (
    "I can add, subtract and compare numbers, sort words, reverse and spell a word, count letters,"
    " name capitals, convert units, count days between dates and continue a sequence."
)
GREETING = "Hello! Ask me what I can do."


def _draw(random: Random, split: Split) -> Content:
    if random.random() < 0.25:
        return Content("greeting", {}, GREETING)
    return Content("abilities", {}, ABILITIES)


ABILITIES_TASK = Task(
    name="abilities",
    phrasings={
        "abilities": expand(
            "[What|Which things] can you do[| for me| here]?",
            "[What are you able to do|What do you know|What do you do|How can you help me|What can I ask you]?",
            "[Help|Help me]?",
            "[Tell me|Say|Show me] what you can do.",
            "[What are|List|Name|Tell me] your [abilities|skills|tasks].",
            "Who are you[|, and what can you do]?",
        ),
        "greeting": expand("[Hello|Hi|Hey|Good morning|Good day|Good evening][|!|.| there!| model!]"),
    },
    draw_content=_draw,
    read=read_text,
    fixed_words=f"{ABILITIES} {GREETING}",
)
