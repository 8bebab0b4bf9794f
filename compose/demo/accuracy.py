"""Accuracy on held-out questions without generating: greedy decoding gives an answer if each of its tokens wins."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import nn

from compose.demo.dataset import NO_TARGET, ChatMaker
from compose.demo.tasks.task import Task

_TOKENS_PER_BATCH = 8192


@torch.no_grad()
def held_out_accuracy(
    model: nn.Module, maker: ChatMaker, tasks: Sequence[Task], chats_per_task: int, seed: int
) -> dict[str, float]:
    """Share of held-out questions, task by task, that greedy decoding would answer word for word."""
    model.eval()
    accuracy = {}
    for task in tasks:
        chats = maker.held_out(task, Random(f"{seed} {task.name}"), chats_per_task)
        num_right = 0
        for batch in maker.batches(chats, _TOKENS_PER_BATCH):
            logits, _, _ = model(batch.ids)
            is_right = (logits.argmax(dim=-1).view_as(batch.ids) == batch.targets) | (batch.targets == NO_TARGET)
            num_right += int(is_right.all(dim=-1).sum())
        accuracy[task.name] = num_right / chats_per_task
    model.train()
    return accuracy
