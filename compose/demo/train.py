"""Trains the demo model: python -m compose.demo.train DIR [--tokens N] [--seed N] [--threads N]

DIR receives `progress.pt` (from which a stopped run goes on), `log.jsonl` and `loss.png`. The same seed, sizes and
number of threads give the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from compose.checkpoint_folder import ModelSizes
from compose.demo.dataset import NO_TARGET, Batch, ChatMaker, held_out_accuracy, training_batches
from compose.demo.model import DemoModel
from compose.demo.optimizer import build_optimizers, scheduled_rate
from compose.demo.tasks.catalog import TASKS, WEIGHTS
from compose.demo.tokenizer import build_tokenizer

BALANCE_WEIGHT = 0.01
LONG_CHATS_FROM = 0.5
SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the result."""

    total_tokens: int
    tokens_per_batch: int
    seed: int
    measure_every_tokens: int = 500_000
    chats_per_task: int = 100


class Training:
    """Model, optimizers and how far they are; everything here is saved and restored together."""

    def __init__(self, directory: Path, recipe: Recipe, sizes: ModelSizes, maker: ChatMaker) -> None:
        self.directory, self.recipe, self.maker = directory, recipe, maker
        self.model = DemoModel(sizes, recipe.seed)
        self.optimizers = build_optimizers(self.model)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.num_tokens = self.num_steps = self.pool = self.batches_of_pool = 0
        self.spent_s = 0.0

    @property
    def progress(self) -> float:
        """0..1."""
        return min(1.0, self.num_tokens / self.recipe.total_tokens)

    def step(self, batch: Batch) -> dict[str, Any]:
        """One update. Returns what is worth logging."""
        for optimizer, base_rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base_rate * scheduled_rate(self.progress)
        is_answer = batch.targets.flatten() != NO_TARGET
        logits, balance, _ = self.model(batch.ids, is_answer)
        losses = functional.cross_entropy(logits, batch.targets.flatten()[is_answer], reduction="none")
        loss = losses.mean()
        (loss + BALANCE_WEIGHT * balance).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.num_steps += 1
        self.num_tokens += batch.num_tokens
        self.batches_of_pool += 1
        tasks = _mean_by_task(losses.detach(), batch.tasks.flatten()[is_answer])
        return {"loss": round(loss.item(), 4), "balance": round(balance.item(), 4), "tasks": tasks}

    def save(self) -> None:
        """Writes all or nothing: a run may be killed at any moment."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counts": (self.num_tokens, self.num_steps, self.pool, self.batches_of_pool, self.spent_s),
            "sizes": asdict(self.model.sizes),
        }
        part = self.directory / "progress.pt.part"
        torch.save(state, part)
        os.replace(part, self.directory / "progress.pt")

    def restore(self) -> None:
        """Goes on where `progress.pt` says, if there is one."""
        path = self.directory / "progress.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.num_tokens, self.num_steps, self.pool, self.batches_of_pool, self.spent_s = state["counts"]

    def run(self, bar: Progress) -> None:
        """Trains to the end of the recipe."""
        row = bar.add_task("training", total=self.recipe.total_tokens, completed=self.num_tokens, loss="")
        saved_at = started_at = time.monotonic()
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as log:
            while self.progress < 1:
                for batch in self._rest_of_pool():
                    before = self.num_tokens
                    entry = self.step(batch)
                    if _crosses(before, self.num_tokens, self.recipe.measure_every_tokens) or self.progress >= 1:
                        entry["accuracy"] = held_out_accuracy(
                            self.model, self.maker, TASKS, self.recipe.chats_per_task, self.recipe.seed
                        )
                    now = time.monotonic()
                    self.spent_s, started_at = self.spent_s + now - started_at, now
                    entry |= {"step": self.num_steps, "tokens": self.num_tokens, "spent_s": round(self.spent_s, 1)}
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    bar.update(row, completed=self.num_tokens, loss=f"loss {entry['loss']:.3f}")
                    if now - saved_at > SAVE_EVERY_S:
                        self.save()
                        saved_at = now
                    if self.progress >= 1:
                        break
                else:
                    self.pool, self.batches_of_pool = self.pool + 1, 0
        self.save()

    def _rest_of_pool(self) -> list[Batch]:
        # Whether a pool has long chats must not depend on how much of it is done already.
        with_long_chats = self.num_tokens > LONG_CHATS_FROM * self.recipe.total_tokens and self.batches_of_pool == 0
        batches = training_batches(
            self.maker, self.recipe.seed, self.pool, self.recipe.tokens_per_batch, with_long_chats
        )
        return batches[self.batches_of_pool :]


def _mean_by_task(losses: Tensor, tasks: Tensor) -> dict[str, float]:
    counts = tasks.bincount(minlength=len(TASKS))
    sums = torch.zeros(len(TASKS)).index_add(0, tasks, losses)
    return {
        task.name: round((sums[index] / counts[index]).item(), 4) for index, task in enumerate(TASKS) if counts[index]
    }


def _crosses(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 at the end of the recipe."""
    parser = argparse.ArgumentParser(prog="python -m compose.demo.train", description="Train the demo model.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--tokens-per-batch", type=int, default=2560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    torch.manual_seed(parsed.seed)
    parsed.directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(TASKS)
    maker = ChatMaker(tokenizer, TASKS, WEIGHTS)
    recipe = Recipe(parsed.tokens, parsed.tokens_per_batch, parsed.seed)
    training = Training(parsed.directory, recipe, ModelSizes(vocabulary=tokenizer.get_vocab_size()), maker)
    training.restore()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"))
    with Progress(*columns, TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        training.run(bar)
    plot_loss(parsed.directory / "log.jsonl", parsed.directory / "loss.png")
    return 0


SMOOTHED_OVER_STEPS = 25


def plot_loss(log: Path, image: Path) -> None:
    """Reads the log lines of `train` and writes a PNG. Raises OSError where one of both cannot be."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, (losses, accuracies) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True)
    for task in sorted({task for entry in entries for task in entry["tasks"]}):
        points = [(entry["tokens"] / 1e6, entry["tasks"][task]) for entry in entries if task in entry["tasks"]]
        x, y = np.array(points).T
        window = min(SMOOTHED_OVER_STEPS, len(y))
        losses.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), label=task, linewidth=1)
        measured = [entry for entry in entries if "accuracy" in entry]
        accuracies.plot(
            [entry["tokens"] / 1e6 for entry in measured], [100 * entry["accuracy"][task] for entry in measured]
        )
    losses.set(ylabel="loss of an answer token (nats)", yscale="log")
    losses.legend(fontsize=7, ncols=3)
    accuracies.set(ylabel="held-out answers right (%)", xlabel="million tokens")
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
