"""What rank 0 says comes out as it went in: numbers of any kind, and tensors."""

from __future__ import annotations

import pytest
import torch

from services.stage.model.micro_batch import MicroBatch
from services.stage.model.tp_shard import TpShard
from services.stage.ranks.commands import (
    BeginBatch,
    Command,
    ForgetMemory,
    LoadShard,
    MoveKv,
    OpenMemory,
    Resume,
    decode,
    encode,
)
from services.stage.ranks.shared_channel import MESSAGE_VALUES
from tests.support.nodes.rank_threads import batch_of

ORDER = LoadShard(7, 2, 3, 5, 1, 2, torch.bfloat16, adds_partial_sums=False, num_parts=4, replaces=True)


@pytest.mark.parametrize(
    ("command", "tensors"),
    [
        (ORDER, [torch.tensor([0, 3])]),
        (Resume(1 << 40), [torch.randn(3, 5).to(torch.bfloat16)]),
        (Resume(2), [torch.zeros(0, 4)]),
        (OpenMemory(4242, 9, 1 << 40, 3, 17, torch.float32), []),
        (MoveKv(True, 3), []),
        (ForgetMemory(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_command_and_its_tensors_come_back(command: Command, tensors: list[torch.Tensor]) -> None:
    values, data = encode(command, tensors)
    decoded, places = decode(values, data)
    assert decoded == command
    assert [type(getattr(decoded, name)) for name in command.__slots__] == [
        type(getattr(command, name)) for name in command.__slots__
    ]
    assert all(torch.equal(*pair) for pair in zip(places, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_a_micro_batch_is_known_elsewhere_as_it_is_here_but_for_how_it_samples(dtype: torch.dtype) -> None:
    batch = batch_of(torch.arange(21).view(7, 3).to(dtype), 30, [5, 6])
    values, data = encode(BeginBatch(3, 2), batch.tensors())
    assert len(values) + 4 <= MESSAGE_VALUES
    command, tensors = decode(values, data)
    assert command == BeginBatch(3, 2)
    there = MicroBatch.of_tensors(tensors, sampling=None)
    for name in ("hidden", "positions", "row_sequence", "block_tables", "slots", "sampling_rows"):
        assert torch.equal(getattr(there, name), getattr(batch, name)), name


def test_each_rank_loads_its_own_shard() -> None:
    assert ORDER.shard(1) == TpShard(1, 2, "ordered", 4)
    assert (ORDER.role.is_first, ORDER.role.is_last, ORDER.role.layers) == (False, True, (3, 5))
