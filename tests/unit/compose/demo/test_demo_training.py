"""The training loop learns, resumes where it stopped, and its optimizer does what its name says."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from rich.progress import Progress, TextColumn

from compose.checkpoint_folder import ModelSizes
from compose.demo.dataset import NO_TARGET, ChatMaker, training_batches
from compose.demo.held_out import Split
from compose.demo.model import balance_loss
from compose.demo.optimizer import orthogonalise, scheduled_rate
from compose.demo.tasks.catalog import TASKS, WEIGHTS
from compose.demo.tokenizer import build_tokenizer
from compose.demo.train import Recipe, Training

TOKENIZER = build_tokenizer(TASKS)
MAKER = ChatMaker(TOKENIZER, TASKS, WEIGHTS)
SIZES = ModelSizes(
    vocabulary=TOKENIZER.get_vocab_size(), layers=2, width=32, heads=2, kv_heads=1, head_width=16, expert_width=32
)


def test_what_is_learned_is_each_answer_and_its_end() -> None:
    random = Random(0)
    exchanges = [task.draw(random, Split.TRAINING) for task in TASKS[:3]]
    chat = MAKER.write(exchanges)
    learned = [target for target in chat.targets if target != NO_TARGET]
    assert TOKENIZER.decode(learned, skip_special_tokens=False) == "".join(
        f"{exchange.answer}<|end|>" for exchange in exchanges
    )
    # A target stands where the token before it is read.
    assert all(
        target in (NO_TARGET, following) for target, following in zip(chat.targets, [*chat.ids[1:], 0], strict=True)
    )


def test_batches_hold_every_chat_once_and_keep_to_their_size() -> None:
    chats = MAKER.pool(Random(1), with_long_chats=False)[:200]
    batches = MAKER.batches(chats, tokens_per_batch=1024)
    assert sum(len(batch.ids) for batch in batches) == 200
    assert all(batch.num_tokens <= 1024 or len(batch.ids) == 1 for batch in batches)


def test_the_same_seed_and_pool_give_the_same_batches() -> None:
    first, second = (training_batches(MAKER, 3, 5, 1024, long_chats=False)[0] for _ in range(2))
    assert torch.equal(first.ids, second.ids)


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    recipe = Recipe(total_tokens=20_000, tokens_per_batch=2048, seed=1, measure_every_tokens=10**9, chats_per_task=2)
    losses = []
    unbroken, broken = (Training(tmp_path / name, recipe, SIZES, MAKER) for name in ("unbroken", "broken"))
    for training in (unbroken, broken):
        training.directory.mkdir()
    with Progress(TextColumn(""), disable=True) as bar:
        unbroken.run(bar)
    for batch in broken._rest_of_pool()[:4]:
        losses.append(broken.step(batch)["loss"])
    broken.save()
    resumed = Training(tmp_path / "broken", recipe, SIZES, MAKER)
    resumed.restore()
    with Progress(TextColumn(""), disable=True) as bar:
        resumed.run(bar)
    assert resumed.num_steps == unbroken.num_steps
    for mine, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_the_loss_falls() -> None:
    recipe = Recipe(total_tokens=60_000, tokens_per_batch=1024, seed=1)
    training = Training(Path(), recipe, SIZES, MAKER)
    losses = [training.step(batch)["loss"] for batch in training._rest_of_pool()[:30]]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 32, 32), (3, 64, 32), (3, 32, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.max() < 1.4
        assert values.median() > 0.6


def test_even_use_of_experts_has_balance_loss_one_and_uneven_use_more() -> None:
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.arange(16).view(8, 2) % 4) == pytest.approx(1)
    one_sided = torch.tensor([[0.7, 0.3, 0.0, 0.0]]).repeat(8, 1)
    assert balance_loss(one_sided, torch.tensor([[0, 1]]).repeat(8, 1)) == pytest.approx(2)


def test_the_rate_rises_stays_and_falls_to_almost_nothing() -> None:
    assert scheduled_rate(0) < 0.2
    assert scheduled_rate(0.2) == scheduled_rate(0.35) == 1
    assert scheduled_rate(0.7) == pytest.approx(0.5)
    assert scheduled_rate(1) == pytest.approx(0.01)
