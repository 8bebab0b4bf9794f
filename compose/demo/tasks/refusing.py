"""Refusing in a sentence what the demo model cannot do: everything else that people ask a chat model."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.capitals import CAPITAL_PHRASINGS
from compose.demo.tasks.task import Content, Task, read_text
from compose.demo.tasks.words import draw_word, word_key

REFUSAL = "I cannot do that: I am a small demo model. Ask me what I can do."


def _draw(random: Random, split: Split) -> Content:
    words = tuple(draw_word(random, split, 8) for _ in range(3))
    keys = tuple(word_key(word) for word in words)
    slots = dict(zip(("first", "second", "third"), words, strict=True))
    chance = random.random()
    if chance < 0.6:
        return Content("open", slots, REFUSAL, keys)
    if chance < 0.75:
        return Content("product", {"left": str(random.randrange(100)), "right": str(random.randrange(1, 100))}, REFUSAL)
    # A made-up country that nobody has put into the table.
    return Content("capital", {"country": words[0].capitalize()}, REFUSAL, keys[:1])


REFUSING = Task(
    name="refusing",
    phrasings={
        "open": expand(
            "[Write|Compose|Make up] [a poem|a story|a song|a letter|an essay|a joke] about [the|a|my] {first}.",
            "[Tell|Give] me [a joke|a story|the news|a secret|a fact] about [a|the] {first}[| and a {second}].",
            "[Translate|Explain|Describe|Summarize|Draw|Paint|Rhyme] [the|a|my|this] {first}[| {second}].",
            "[Who|What|Where|When|Why] [is|was|are] [the|a|my|your] {first}[| {second}| of {second}]?",
            "[How do I|How can I|How should I|Should I] [cook|buy|build|find|fix|use|eat|sell] [a|the|my] {first}?",
            "[Do you|Does he|Did they] [like|know|love|want|see|remember] [the|a|my] {first}[| and the {second}]?",
            "[Open|Play|Close|Delete|Send|Book|Order] [the|a|my] {first}[| {second}].",
            "Write [a program|code|a script|an email|a recipe] [for|about] [the|a] {first}.",
            "[I feel|I am|I think I am] [sad|happy|tired|hungry|ill] [about|with|without] [the|my] {first}.",
            "[Is|Was] [the|a|my] {first} [good|bad|hot|cold|old|new|red|{second}]?",
            "{first} {second} {third}[|.|?]",
            "{first}[|.|?]",
        ),
        "product": expand(
            "[What is|How much is|Calculate|Compute|Work out] {left} [*|times|/|divided by|multiplied by] {right}?",
            "[What is|How much is] {left} percent of {right}?",
            "[Multiply|Divide] {left} by {right}.",
            "[What is|Find] the [square root|root|square|logarithm] of {left}?",
        ),
        "capital": CAPITAL_PHRASINGS,
    },
    draw_content=_draw,
    read=read_text,
    fixed_words=REFUSAL,
    spells_phrasings=True,
)
