"""Calls that wait on an expert node: checked, taken a layer at a time, answered as each would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.errors import NotReadyError, ProtocolError
from common.messages import Dispatch, Header, TensorFrame
from common.topology import ShardId
from common.wire.array import array_to_frame
from common.wire.tensor import tensor_to_frame
from services.expert.calls import CallQueue, WaitingCall, check_call
from services.expert.shard_store import ShardStore
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.answered_calls import answer_calls
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for, one_torch_thread
from tests.support.nodes.simulated_gpu import PLACE, hidden_waits, simulated_gpu

__all__ = ["one_torch_thread"]
WIDTH, NUM_SLICES, EXPERTS = QWEN3.width, 2, QWEN3.experts


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


@pytest.fixture(scope="module", params=KERNEL_CHOICES)
def store(directory: Path, request: pytest.FixtureRequest) -> ShardStore:
    """Layers 0 and 1, but for the last expert."""
    return filled(read_model_config(directory), directory, kernels_for(request.param))


def filled(
    config: ModelConfig,
    directory: Path,
    kernels: Any,
    place: torch.device = torch.device("cpu"),  # noqa: B008
) -> ShardStore:
    made = ShardStore(config, NUM_SLICES, torch.float32, kernels)
    weights = CheckpointWeights(directory, torch.float32, place)
    for layer in range(2):
        for expert in range(EXPERTS - 1):
            for piece in range(NUM_SLICES):
                made.load(weights, ShardId(layer, expert, piece))
    return made


def hidden_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, WIDTH), generator=torch.Generator().manual_seed(seed))


def dispatch(
    hidden: Tensor, routing: list[tuple[int, int, int]], weights: list[float] | None = None, number: int = 1
) -> Dispatch:
    return Dispatch(
        number,
        tensor_to_frame(hidden),
        array_to_frame(np.array(routing, dtype=np.int32).reshape(-1, 3).T.copy()),
        array_to_frame(np.array(weights or [], dtype=np.float32)),
    )


def check(message: Dispatch, store: ShardStore, layer: int = 0, arrived_s: float = 0.0, **header: Any) -> WaitingCall:
    return check_call(b"stage", message, Header(layer=layer, **header), arrived_s, store)


ROUTING = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, EXPERTS - 2), st.integers(0, NUM_SLICES - 1)), min_size=1, max_size=9
)


@settings(max_examples=40, deadline=None)
@given(routings=st.lists(ROUTING, min_size=1, max_size=4), weighed=st.lists(st.booleans(), min_size=4, max_size=4))
def test_calls_that_are_answered_together_are_answered_as_alone(
    store: ShardStore, routings: list[list[tuple[int, int, int]]], weighed: list[bool]
) -> None:
    calls = [
        check(dispatch(hidden_of(4, seed), routing, [0.25] * len(routing) if weighed[seed] else None), store)
        for seed, routing in enumerate(routings)
    ]
    together = answer_calls(calls, store)
    for call, answer in zip(calls, together, strict=True):
        assert torch.equal(answer, answer_calls([call], store)[0])


def test_rows_come_back_in_the_order_in_which_they_were_asked(store: ShardStore) -> None:
    hidden = hidden_of(3)
    routing = [(2, 4, 1), (0, 0, 0), (2, 0, 0), (1, 4, 1)]
    (answer,) = answer_calls([check(dispatch(hidden, routing), store)], store)
    for row, entry in enumerate(routing):
        (alone,) = answer_calls([check(dispatch(hidden, [entry]), store)], store)
        assert torch.equal(answer[row], alone[0])


def test_weighed_rows_come_back_as_one_sum_a_token(store: ShardStore) -> None:
    hidden, routing, weights = hidden_of(3), [(0, 1, 0), (0, 2, 0), (2, 1, 0)], [0.5, 0.25, 2.0]
    (rows,) = answer_calls([check(dispatch(hidden, routing), store)], store)
    (sums,) = answer_calls([check(dispatch(hidden, routing, weights), store)], store)
    assert sums.dtype == torch.float32
    assert torch.allclose(sums[0], 0.5 * rows[0] + 0.25 * rows[1], atol=1e-6)
    assert torch.equal(sums[1], torch.zeros(WIDTH))
    assert torch.allclose(sums[2], 2.0 * rows[2], atol=1e-6)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (dispatch(hidden_of(2), []), "has no rows"),
        (dispatch(hidden_of(2), [(2, 0, 0)]), r"a row outside \[0, 2\)"),
        (dispatch(hidden_of(2), [(-1, 0, 0)]), "a row outside"),
        (dispatch(hidden_of(2), [(0, 0, 2)]), r"a slice outside \[0, 2\)"),
        (dispatch(hidden_of(2), [(0, 0, -1)]), "a slice outside"),
        (dispatch(hidden_of(2), [(0, -1, 0)]), "outside"),
        (dispatch(hidden_of(2)[:, :-1].contiguous(), [(0, 0, 0)]), r"Dispatch\.hidden must be float32"),
        (dispatch(hidden_of(2).to(torch.bfloat16), [(0, 0, 0)]), r"Dispatch\.hidden must be float32"),
        (dispatch(hidden_of(2), [(0, 0, 0)], [0.5, 0.5]), r"Dispatch\.weights must be float32 \[1\]"),
        (dispatch(hidden_of(0), [(0, 0, 0)]), "a row outside"),
        (
            Dispatch(
                1,
                tensor_to_frame(hidden_of(2)),
                TensorFrame("int64", (3, 1), bytes(24)),
                TensorFrame("float32", (0,), b""),
            ),
            r"Dispatch\.routing must be int32",
        ),
        (
            Dispatch(
                1,
                tensor_to_frame(hidden_of(2)),
                TensorFrame("int32", (2, 1), bytes(8)),
                TensorFrame("float32", (0,), b""),
            ),
            r"Dispatch\.routing must be int32",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_refused_by_what_is_wrong(store: ShardStore, message: Dispatch, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        check(message, store)


@pytest.mark.parametrize(("layer", "expert"), [(0, EXPERTS - 1), (2, 0), (0, 10_000), (2**62, 0)])
def test_a_shard_that_is_not_here_is_refused_by_name(store: ShardStore, layer: int, expert: int) -> None:
    with pytest.raises(NotReadyError, match=f"expert {expert}, slice 1 of layer {layer} is not held here"):
        check(dispatch(hidden_of(1), [(0, expert, 1)]), store, layer)


def test_a_shard_that_goes_while_a_call_waits_is_an_error_and_no_crash(directory: Path) -> None:
    store = filled(read_model_config(directory), directory, None)
    call = check(dispatch(hidden_of(1), [(0, 2, 0)]), store)
    store.drop(ShardId(0, 2, 0))
    with pytest.raises(NotReadyError, match="expert 2 of layer 0 was let go"):
        answer_calls([call], store)


def test_the_layer_of_the_oldest_call_goes_next_with_all_that_wait_for_it(store: ShardStore) -> None:
    queue = CallQueue()
    for number, layer in enumerate((1, 0, 1, 0)):
        queue.add(check(dispatch(hidden_of(1), [(0, 0, 0)], number=number), store, layer))
    assert len(queue) == 4
    taken = [[call.number for call in queue.pop_layer(0.0)[0]] for _ in range(3)]
    assert taken == [[0, 2], [1, 3], []]


def test_a_call_for_which_nobody_waits_any_more_is_dropped_and_counted(store: ShardStore) -> None:
    queue = CallQueue()
    message = dispatch(hidden_of(1), [(0, 0, 0)])
    queue.add(check(message, store, 0, 1.0, time_left_ms=500))
    queue.add(check(message, store, 1, 1.0, time_left_ms=501))
    queue.add(check(message, store, 1, 0.0))
    calls, expired = queue.pop_layer(1.5)
    assert (len(calls), expired) == (2, 1), "0 ms left means no limit"
    queue.add(check(message, store, 0, 1.0, time_left_ms=1))
    assert queue.pop_layer(2.0) == ([], 1)
    assert len(queue) == 0


def test_a_call_that_is_taken_back_is_dropped_while_it_waits(store: ShardStore) -> None:
    queue = CallQueue()
    for identity, number in ((b"s", 1), (b"s", 2), (b"t", 1)):
        message = dispatch(hidden_of(1), [(0, 0, 0)], number=number)
        queue.add(check_call(identity, message, Header(layer=0), 0.0, store))
    assert queue.cancel(b"s", (1, 7)) == 1, "of that stage only; one that is not here is no error"
    calls, _ = queue.pop_layer(0.0)
    assert [(call.identity, call.number) for call in calls] == [(b"s", 2), (b"t", 1)]
    assert queue.cancel(b"s", (2,)) == 0, "it is being computed"


def test_shards_on_a_gpu_answer_as_those_of_the_host_and_calls_together_as_alone(directory: Path) -> None:
    hidden, routing = hidden_of(4), [(0, 1, 0), (1, 0, 1), (3, 1, 1), (3, 0, 0)]
    host = filled(read_model_config(directory), directory, None)
    plain, weighed = dispatch(hidden, routing), dispatch(hidden, routing, [0.5, 0.25, 1.0, 2.0])
    with simulated_gpu() as device:
        store = filled(read_model_config(directory), directory, None, PLACE)
        hidden_waits().clear()
        calls = [check(message, store) for message in (plain, weighed)]
        together = answer_calls(calls, store, device)
        alone = [answer_calls([call], store, device)[0] for call in calls]
        assert hidden_waits() == []
    for answer, single, call in zip(together, alone, calls, strict=True):
        assert torch.equal(answer, single)
        torch.testing.assert_close(answer, answer_calls([call], host)[0], atol=1e-5, rtol=1e-5)
