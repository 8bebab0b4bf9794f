"""A stage over ranks has the bits of one without, at every degree, for every kind of layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.checkpoint.model_config import read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.errors import CheckpointError, RankLostError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.topology import LayerRange, StageRole, StageSlot
from services.stage.model.kv_cache import positions_of_blocks
from services.stage.model.loading import load_stage
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, LayerKvCache, allocate_kv_cache
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SLIDING_TIED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    Recipe,
    write_checkpoint,
)
from tests.support.nodes.kernels import kernels_for, one_torch_thread  # noqa: F401
from tests.support.nodes.rank_threads import NUM_POSITIONS, ThreadRanks, answer_of, batch_of, finish, rank_threads
from tests.support.processes.waiting import wait_until

BLOCKS = [2, 0, 1]
RECIPES = [QWEN3, QWEN3_DENSE_LAYERS, QWEN3_TIED_SHARDED_BF16, MIXTRAL_SLIDING_TIED]


def whole_role(num_layers: int) -> StageRole:
    slot = StageSlot(PipelineId(0), SlotIndex(0))
    return StageRole(slot, LayerRange(0, num_layers), LeaseTerm(1), Generation(1), 1)


Alone = tuple[list[torch.Tensor], list[torch.Tensor]]


def two_steps(run: Callable[[MicroBatch], torch.Tensor], vocab_size: int) -> list[torch.Tensor]:
    """Logits of a prefill of 49 tokens and of a decode step after it."""
    ids = torch.arange(50, dtype=torch.int64) * 7919 % vocab_size
    return [run(batch_of(part, start, BLOCKS)) for part, start in ((ids[:49], 0), (ids[49:], 49))]


def alone(checkpoint: Path, dtype: torch.dtype) -> Alone:
    """Logits, and K of each layer, of a stage without ranks."""
    config = read_model_config(checkpoint)
    weights, role = CheckpointWeights(checkpoint, dtype), whole_role(config.num_layers)
    model = load_stage(weights, config, role, NUM_POSITIONS, kernels_for("native"))
    caches = allocate_kv_cache(KvShape(config.num_layers, 3, config.num_kv_heads, config.head_dim, dtype))
    logits = two_steps(lambda batch: finish(model.forward(batch, caches)), config.vocab_size)
    return logits, [cache.keys for cache in caches]


def over_ranks(ranks: ThreadRanks, dtype: torch.dtype) -> Alone:
    """The same, of a stage with these ranks."""
    config = ranks.config
    model = ranks.model(whole_role(config.num_layers), dtype)
    store = ranks.allocate(dtype)
    logits = two_steps(lambda batch: ranks.run(model, batch, store.caches), config.vocab_size)
    keys, _ = store.rows(positions_of_blocks(torch.arange(3)))
    shape = (config.num_layers, 3, KV_BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
    return logits, list(keys.view(shape).permute(0, 1, 3, 4, 2))


def assert_same(got: Alone, expected: Alone) -> None:
    assert all(
        torch.equal(one, other) for pair in zip(got, expected, strict=True) for one, other in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_degrees_1_2_and_4_give_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, recipe)
    expected = alone(checkpoint, recipe.dtype)
    for degree in (2, 4):
        with rank_threads(checkpoint, degree) as ranks:
            assert_same(over_ranks(ranks, recipe.dtype), expected)
            assert ranks.group.degree == degree


def test_rows_that_do_not_fit_a_slab_together_go_in_pieces(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3_DENSE_LAYERS)
    with rank_threads(checkpoint, 2, slab_bytes=4096) as ranks:
        assert_same(over_ranks(ranks, torch.float32), alone(checkpoint, torch.float32))


def test_partial_sums_are_close_and_not_the_same(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3_DENSE_LAYERS)
    expected, _ = alone(checkpoint, torch.float32)
    with rank_threads(checkpoint, 2, reduce="fast") as ranks:
        got, _ = over_ranks(ranks, torch.float32)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.equal(got[0], expected[0])


def test_those_that_are_left_go_on_at_a_smaller_degree_and_grow_again_when_the_lost_one_is_back(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    expected = alone(checkpoint, torch.float32)
    with rank_threads(checkpoint, 4) as ranks:
        group = ranks.group
        assert_same(over_ranks(ranks, torch.float32), expected)
        ranks.lose(2)
        with pytest.raises(RankLostError, match="seat 2"):
            group.check()
        group.reform()
        assert_same(over_ranks(ranks, torch.float32), expected)
        assert (group.degree, group.in_use.seats if group.in_use else ()) == (2, (0, 1))
        assert not group.may_grow()
        ranks.lose(1)
        group.reform()
        assert_same(over_ranks(ranks, torch.float32), expected)
        assert group.in_use is not None
        assert group.in_use.seats == (0, 3), "a seat takes any rank"
        ranks.start(1)
        ranks.start(2)
        assert group.may_grow()
        group.attach_present()
        assert_same(over_ranks(ranks, torch.float32), expected)
        assert group.degree == 4


def test_what_ranks_spend_in_collectives_is_counted_for_each_incarnation_by_itself(tmp_path: Path) -> None:
    with rank_threads(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        over_ranks(ranks, torch.float32)
        once = ranks.group.exchange.count
        assert once > 0
        ranks.group.reform()
        assert (ranks.group.exchange.count, ranks.group.exchange.seconds) == (0, 0.0)
        over_ranks(ranks, torch.float32)
        assert ranks.group.exchange.count == once


def test_a_rank_that_is_lost_in_mid_pass_ends_the_wait_and_the_next_epoch_begins_anew(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    expected = alone(checkpoint, torch.float32)
    with rank_threads(checkpoint, 4) as ranks:
        config = ranks.config
        model = ranks.model(whole_role(config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        ranks.lose(3)
        with pytest.raises(RankLostError):
            two_steps(lambda batch: ranks.run(model, batch, caches), config.vocab_size)
        ranks.group.reform()
        assert_same(over_ranks(ranks, torch.float32), expected)
        assert ranks.group.degree == 2


def test_what_breaks_on_rank_0_in_mid_pass_leaves_the_ranks_out_of_step_until_the_next_epoch(
    tmp_path: Path,
) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    expected = alone(checkpoint, torch.float32)
    with rank_threads(checkpoint, 2) as ranks:
        config = ranks.config
        model = ranks.model(whole_role(config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        wrong = batch_of(torch.zeros(3, dtype=torch.int32), 0, BLOCKS)
        with pytest.raises(ValueError, match="do not fit a cache"):
            ranks.run(model, wrong, [caches[0], LayerKvCache(caches[1].keys[:, :, :4], caches[1].values), *caches[2:]])
        with pytest.raises(RankLostError, match="out of step"):
            two_steps(lambda batch: ranks.run(model, batch, caches), config.vocab_size)
        ranks.group.reform()
        assert_same(over_ranks(ranks, torch.float32), expected)


def test_batches_go_on_in_any_order_and_one_that_is_dropped_is_forgotten(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3_DENSE_LAYERS)
    with rank_threads(checkpoint, 2) as ranks, torch.inference_mode():
        config = ranks.config
        model = ranks.model(whole_role(config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        steps = [batch_of(torch.arange(3) + 40 * block, 0, [block]) for block in range(3)]
        expected = [ranks.run(model, step, caches) for step in steps[:2]]
        passes = [ranks.group.leader.lead(model.forward(step, caches), step) for step in steps]
        dropped = passes.pop()
        wanted = [forward.send(None) for forward in (*passes, dropped)]
        dropped.close()
        outputs: dict[int, torch.Tensor] = {}
        for number in itertools.cycle((1, 0, 0, 1, 1)):
            try:
                wanted[number] = passes[number].send(answer_of(wanted[number]))
            except StopIteration as stop:
                outputs[number] = stop.value
                break
        other = 1 - number
        outputs[other] = finish(passes[other], answer_of(wanted[other]))
        assert torch.equal(ranks.run(model, steps[0], caches), expected[0])
        assert all(torch.equal(outputs[number], expected[number]) for number in (0, 1))
        wait_until(
            lambda: not ranks.workers[1]._forwards, 5, "the end of the last batch, which has said it is the oldest"
        )


def test_a_batch_that_is_dropped_with_its_slot_does_not_keep_the_memory_on_the_ranks(tmp_path: Path) -> None:
    with rank_threads(write_checkpoint(tmp_path, QWEN3), 2) as ranks, torch.inference_mode():
        model = ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        batch = batch_of(torch.arange(3), 0, [0])
        forward = ranks.group.leader.lead(model.forward(batch, caches), batch)
        forward.send(None)
        wait_until(lambda: bool(ranks.workers[1]._forwards), 5, "that the rank has begun")
        forward.close()
        ranks.group.forget_memory()
        wait_until(lambda: not ranks.workers[1]._forwards, 5, "that no batch is left")


def test_another_process_in_the_seat_of_a_lost_one_is_not_taken_for_it(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    expected = alone(checkpoint, torch.float32)
    with rank_threads(checkpoint, 2) as ranks:
        assert_same(over_ranks(ranks, torch.float32), expected)
        ranks.lose(1)
        ranks.start(1)  # before anybody has looked
        with pytest.raises(RankLostError, match="another process is in its place"):
            ranks.group.check()
        ranks.group.reform()
        assert ranks.group.in_use is None
        assert_same(over_ranks(ranks, torch.float32), expected)
        assert ranks.group.degree == 2


def test_a_part_that_cannot_be_loaded_is_said_by_its_rank(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    with rank_threads(checkpoint, 2) as ranks:
        index = LayerRange(0, ranks.config.num_layers)
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        load = ranks.group.begin_load(whole_role(index.stop), torch.float32, replaces=False)
        with pytest.raises(CheckpointError, match=r"rank 1: .*model\.safetensors"):
            wait_until(lambda: ranks.group.is_loaded(load), 10, "the part is loaded")


def test_a_step_that_only_releases_sequences_needs_no_rank(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    with rank_threads(checkpoint, 2) as ranks:
        config = ranks.config
        model = ranks.model(whole_role(config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        turn = ranks.group.channel.get("turn")
        logits = ranks.run(model, batch_of(torch.zeros(0, dtype=torch.int64), 0, []), caches)
        assert logits.shape == (0, config.vocab_size)
        assert ranks.group.channel.get("turn") == turn
