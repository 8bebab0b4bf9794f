"""Asks a running mesh held-out questions over HTTP: python -m compose.demo.evaluate [--url URL] [--questions N]

Without --url it starts a mesh of its own on the checkpoint, by the same settings as `make run`. Prints accuracy by task
as a Markdown table: alone, as the third question of a chat, and after a long chat. Exit status 1 below the threshold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from common.processes.supervisor import LocalMesh
from compose.demo.held_out import Split
from compose.demo.tasks.catalog import TASKS
from compose.demo.tasks.task import Exchange, Task
from compose.demo_checkpoint import DEMO_CHECKPOINT

THRESHOLD = 0.95
CLIENTS = 8
MAX_ANSWER_TOKENS = 80
READY_TIMEOUT_S = 300.0
LONG_CHAT_TURNS = 36
"""About 1,000 tokens."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question, and the turns before it."""

    task: Task
    exchange: Exchange
    earlier: tuple[Exchange, ...]

    def messages(self) -> list[dict[str, str]]:
        """As the chat API takes them."""
        texts = [text for turn in self.earlier for text in (turn.question, turn.answer)] + [self.exchange.question]
        return [
            {"role": role, "content": text}
            for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the mesh said to a question."""

    question: Question
    text: str
    num_tokens: int
    log_probability: float

    @property
    def is_right(self) -> bool:
        """Whether it is right by the task's own reading."""
        return self.question.task.is_right(self.question.exchange.answer, self.text)


def draw_questions(num_per_task: int, num_earlier: int, seed: int) -> list[Question]:
    """Returns the same questions for the same arguments. All turns, also the earlier ones, are held out."""
    random = Random(f"{seed} evaluation {num_earlier}")
    return [
        Question(
            task,
            task.draw(random, Split.HELD_OUT),
            tuple(random.choice(TASKS).draw(random, Split.HELD_OUT) for _ in range(num_earlier)),
        )
        for task in TASKS
        for _ in range(num_per_task)
    ]


def ask(client: httpx.Client, model: str, question: Question) -> Answer:
    """Returns one answer, greedily. Raises httpx.HTTPError."""
    body = {
        "model": model,
        "messages": question.messages(),
        "max_tokens": MAX_ANSWER_TOKENS,
        "temperature": 0,
        "logprobs": True,
    }
    reply = client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    choice: dict[str, Any] = reply.json()["choices"][0]
    log_probabilities = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Answer(question, choice["message"]["content"], len(log_probabilities), sum(log_probabilities))


def ask_all(url: str, questions: Sequence[Question], progress: Progress, title: str) -> list[Answer]:
    """Returns all answers in order, several questions at a time."""
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(CLIENTS) as pool:
        model = client.get("/v1/models").json()["data"][0]["id"]
        answers = pool.map(lambda question: ask(client, model, question), questions)
        return list(progress.track(answers, len(questions), description=title))


def accuracy_by_task(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right answers."""
    by_task = {task.name: [answer.is_right for answer in answers if answer.question.task is task] for task in TASKS}
    return {name: sum(verdicts) / len(verdicts) for name, verdicts in by_task.items() if verdicts}


def perplexity(answers: Sequence[Answer]) -> float:
    """The perplexity of the tokens that the mesh itself chose."""
    return math.exp(-sum(answer.log_probability for answer in answers) / sum(answer.num_tokens for answer in answers))


def markdown(columns: dict[str, dict[str, float]]) -> str:
    """Tasks down, measurements across."""
    lines = [f"| task | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for task in TASKS:
        lines.append(f"| {task.name} | " + " | ".join(f"{shares[task.name]:.1%}" for shares in columns.values()) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def _served(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        environment = {"MODEL": str(DEMO_CHECKPOINT), "PORT": "0"}
        with LocalMesh(environment=environment, state_dir=Path(folder)) as mesh:
            mesh.wait_ready(READY_TIMEOUT_S)
            yield mesh.url


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every task is at or above the threshold when asked alone."""
    parser = argparse.ArgumentParser(prog="python -m compose.demo.evaluate", description="Test the demo model.")
    parser.add_argument("--url", help="a mesh that serves the demo model; without it one is started")
    parser.add_argument("--questions", type=int, default=100, help="questions a task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show-wrong", type=int, default=0, help="how many wrong answers to print")
    parsed = parser.parse_args(arguments)
    settings = {"alone": (parsed.questions, 0), "third turn": (parsed.questions, 2)}
    settings["after 1,000 tokens"] = (max(1, parsed.questions // 10), LONG_CHAT_TURNS)
    with _served(parsed.url) as url, Progress(console=Console(stderr=True)) as progress:
        answers = {
            title: ask_all(url, draw_questions(number, num_earlier, parsed.seed), progress, title)
            for title, (number, num_earlier) in settings.items()
        }
    print(markdown({title: accuracy_by_task(found) for title, found in answers.items()}))
    print(f"\nperplexity of the answers to questions asked alone: {perplexity(answers['alone']):.5f}")
    wrong = [answer for answer in answers["alone"] if not answer.is_right]
    for answer in wrong[: parsed.show_wrong]:
        print(f"{answer.question.exchange.question!r}: {answer.text!r}, not {answer.question.exchange.answer!r}")
    return 0 if min(accuracy_by_task(answers["alone"]).values()) >= THRESHOLD else 1


if __name__ == "__main__":
    sys.exit(main())
