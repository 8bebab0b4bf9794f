"""Chats as token ids, without end: drawn from a seed, cut into batches of chats of like length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from compose.demo.held_out import Split
from compose.demo.tasks.task import Exchange, Task
from compose.demo.tokenizer import ASSISTANT, END_OF_TEXT, TURN_END, USER, token_id

POOL_CHATS = 4096
# One chat in five has several turns, so that the model answers the last question and not the first.
TURNS = (1, 1, 1, 1, 1, 1, 1, 1, 2, 3)
# Long chats, from half-way on, teach that far tokens look like near ones; 40 a pool at the end taught too little.
LONG_CHAT_TOKENS = 1400
LONG_CHATS_A_POOL = 80
HELD_OUT_TOKENS_PER_BATCH = 8192
NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """B chats of one length T, filled up with end-of-text on the right."""

    ids: Tensor
    """[B, T] int64."""
    targets: Tensor
    """[B, T] int64: the next token where it is part of an answer, NO_TARGET elsewhere."""
    tasks: Tensor
    """[B, T] int64: index of the task that a target belongs to."""

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, fill included."""
        return self.ids.numel()


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat in tokens."""

    ids: Sequence[int]
    targets: Sequence[int]
    tasks: Sequence[int]


class ChatMaker:
    """Draws exchanges and writes them as the chat template does."""

    def __init__(self, tokenizer: Tokenizer, tasks: Sequence[Task], weights: Mapping[str, float]) -> None:
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._weights = [weights[task.name] for task in tasks]
        self._task_ids = {task.name: index for index, task in enumerate(tasks)}
        self._user, self._assistant, self._turn_end, self._fill = (
            token_id(tokenizer, token) for token in (USER, ASSISTANT, TURN_END, END_OF_TEXT)
        )

    def pool(self, random: Random, with_long_chats: bool) -> list[Chat]:
        """Returns a pool of training chats."""
        chats = [self._draw_chat(random, random.choice(TURNS)) for _ in range(POOL_CHATS)]
        if with_long_chats:
            chats += [self._draw_long_chat(random) for _ in range(LONG_CHATS_A_POOL)]
        return chats

    def held_out(self, task: Task, num_chats: int, seed: int) -> list[Batch]:
        """Returns single questions of one task that training never sees."""
        random = Random(f"{seed} {task.name}")
        chats = [self.write([task.draw(random, Split.HELD_OUT)]) for _ in range(num_chats)]
        return self.batches(chats, HELD_OUT_TOKENS_PER_BATCH)

    def write(self, exchanges: Sequence[Exchange]) -> Chat:
        """Turns one after the other; what is learned is each answer and the token that ends it."""
        ids: list[int] = []
        targets: list[int] = []
        tasks: list[int] = []
        for exchange in exchanges:
            question, answer = (self._tokenizer.encode(text).ids for text in (exchange.question, exchange.answer))
            turn = [self._user, *question, self._turn_end, self._assistant, *answer, self._turn_end]
            ids += turn
            targets += [NO_TARGET] * (len(question) + 2) + [*answer, self._turn_end, NO_TARGET]
            tasks += [self._task_ids[exchange.task]] * len(turn)
        return Chat(ids, targets, tasks)

    def batches(self, chats: Sequence[Chat], tokens_per_batch: int) -> list[Batch]:
        """Returns all chats, shortest first. Chats of like length share a batch, so little is filled up."""
        by_length = sorted(chats, key=lambda chat: len(chat.ids))
        batches: list[Batch] = []
        start = 0
        while start < len(by_length):
            stop = start + 1
            while stop < len(by_length) and (stop + 1 - start) * len(by_length[stop].ids) <= tokens_per_batch:
                stop += 1
            batches.append(self._batch(by_length[start:stop]))
            start = stop
        return batches

    def _draw_chat(self, random: Random, num_turns: int) -> Chat:
        tasks = random.choices(self._tasks, self._weights, k=num_turns)
        return self.write([task.draw(random, Split.TRAINING) for task in tasks])

    def _draw_long_chat(self, random: Random) -> Chat:
        length = random.randint(100, LONG_CHAT_TOKENS)
        exchanges: list[Exchange] = []
        num_tokens = 0
        while num_tokens < length:
            exchanges.append(random.choices(self._tasks, self._weights)[0].draw(random, Split.TRAINING))
            num_tokens += len(self.write(exchanges[-1:]).ids)
        return self.write(exchanges)

    def _batch(self, chats: Sequence[Chat]) -> Batch:
        length = max(len(chat.ids) for chat in chats)

        def rectangle(rows: list[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.int64)

        return Batch(
            rectangle([chat.ids for chat in chats], self._fill),
            rectangle([chat.targets for chat in chats], NO_TARGET),
            rectangle([chat.tasks for chat in chats], 0),
        )


def training_batches(maker: ChatMaker, seed: int, pool: int, tokens_per_batch: int, long_chats: bool) -> list[Batch]:
    """Returns the batches of pool number `pool`, in random order: the same for the same arguments, so a run can be
    resumed."""
    random = Random(f"{seed} pool {pool}")
    batches = maker.batches(maker.pool(random, long_chats), tokens_per_batch)
    random.shuffle(batches)
    return batches


@torch.no_grad()
def held_out_accuracy(
    model: nn.Module, maker: ChatMaker, tasks: Sequence[Task], chats_per_task: int, seed: int
) -> dict[str, float]:
    """Returns the share of held-out questions, task by task, that greedy decoding would answer word for word.

    Nothing is generated: greedy decoding gives an answer if each of its tokens wins.
    """
    model.eval()
    accuracy = {}
    for task in tasks:
        num_right = 0
        for batch in maker.held_out(task, chats_per_task, seed):
            logits, _, _ = model(batch.ids)
            is_right = (logits.argmax(dim=-1).view_as(batch.ids) == batch.targets) | (batch.targets == NO_TARGET)
            num_right += int(is_right.all(dim=-1).sum())
        accuracy[task.name] = num_right / chats_per_task
    model.train()
    return accuracy
