"""The demo model on a mesh says what transformers says, with the same perplexity, in short chats and long ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from compose.demo.evaluate import LONG_CHAT_TURNS, draw_questions
from compose.demo_checkpoint import DEMO_CHECKPOINT
from tests.support.checkpoints.reference import Reference
from tests.support.served.mesh_client import Answer, Ask
from tests.support.served.served_mesh import ServedMesh, served_mesh

pytestmark = pytest.mark.parity
QUESTIONS_PER_TASK = 4
MAX_TOKENS = 60
MAX_RELATIVE_DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def mesh() -> Iterator[ServedMesh]:
    with served_mesh(DEMO_CHECKPOINT) as served:
        yield served


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(DEMO_CHECKPOINT)


def answers(mesh: ServedMesh, reference: Reference, num_per_task: int, num_earlier: int) -> list[Answer]:
    questions = draw_questions(num_per_task, num_earlier, seed=2)
    prompts = [
        reference.tokenizer.apply_chat_template(question.messages(), tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    return mesh.client.ask_all([Ask(prompt, MAX_TOKENS) for prompt in prompts])


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.mark.parametrize("num_earlier", [0, LONG_CHAT_TURNS], ids=["one question", "after 1,000 tokens"])
def test_perplexity_is_that_of_transformers(mesh: ServedMesh, reference: Reference, num_earlier: int) -> None:
    num_per_task = 1 if num_earlier else QUESTIONS_PER_TASK
    ours: list[float] = []
    theirs: list[float] = []
    for answer in answers(mesh, reference, num_per_task, num_earlier):
        table = reference.logprobs(answer.prompt_token_ids, answer.token_ids)
        ours += answer.logprobs
        theirs += [float(row[token_id]) for row, token_id in zip(table, answer.token_ids, strict=True)]
    assert perplexity(ours) == pytest.approx(perplexity(theirs), rel=MAX_RELATIVE_DIFFERENCE)


def test_answers_end_by_themselves(mesh: ServedMesh, reference: Reference) -> None:
    assert {answer.finish_reason for answer in answers(mesh, reference, 1, 0)} == {"stop"}
