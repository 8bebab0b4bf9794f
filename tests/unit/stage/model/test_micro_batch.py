"""A step as flat tensors, and block tables kept by deltas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.messages import NO_ARRAY, Step, TensorFrame
from common.wire.array import array_to_frame
from services.stage.model.micro_batch import BlockTables, MicroBatch, read_micro_batch, read_positions

BLOCK_TOKENS = 4
NUM_BLOCKS = 20


def frame(values: Any, dtype: str, columns: int | None = None) -> TensorFrame:
    array = np.array(values, dtype=dtype)
    return array_to_frame(array.reshape(-1, columns) if columns is not None else array)


def step(
    sequences: list[tuple[int, ...]],
    new_blocks: list[int],
    released: list[int] | None = None,
    sampling: list[tuple[float, ...]] | None = None,
    seeds: list[tuple[int, int]] | None = None,
    drafts: list[int] | None = None,
) -> Step:
    num_samples = sum(sequence[5] != 0 for sequence in sequences)
    return Step(
        hidden=frame([0] * max(0, min(99, sum(sequence[2] for sequence in sequences))), "int32"),
        sequences=frame(sequences, "int64", 6),
        new_blocks=frame(new_blocks, "int32"),
        released=frame(released or [], "int64"),
        sampling=frame([(0.0, 1.0, 0.0, -1.0)] * num_samples if sampling is None else sampling, "float64", 4),
        seeds=frame([(1, 0)] * num_samples if seeds is None else seeds, "int64", 2),
        drafts=frame(drafts or [], "int32"),
    )


def tables() -> BlockTables:
    return BlockTables(BLOCK_TOKENS, NUM_BLOCKS)


def read(message: Step, known: BlockTables) -> MicroBatch:
    return read_micro_batch(message, torch.zeros(message.hidden.shape, dtype=torch.int64), known)


def test_positions_tables_and_slots_of_a_mixed_step() -> None:
    known = tables()
    read(step([(7, 0, 5, 0, 2, 0)], [3, 9]), known)
    batch = read(step([(7, 5, 1, 2, 0, 1), (8, 0, 6, 0, 2, 0)], [4, 1]), known)
    assert batch.positions.tolist() == [5, 0, 1, 2, 3, 4, 5]
    assert batch.row_sequence.tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert batch.block_tables.tolist() == [[3, 9], [4, 1]]
    assert batch.slots.tolist() == [9 * 4 + 1, 16, 17, 18, 19, 4, 5]
    assert batch.sampling_rows.tolist() == [0]
    assert batch.sampling is not None
    assert batch.sampling.sequence_ids.tolist() == [7]
    assert batch.sampling.positions.tolist() == [6], "of the token to be sampled"


def test_all_rows_of_a_sequence_with_drafts_sample_each_at_its_position() -> None:
    known = tables()
    read(step([(7, 0, 5, 0, 2, 0), (8, 0, 1, 0, 1, 0)], [3, 9, 4]), known)
    batch = read(
        step(
            [(7, 5, 3, 2, 0, 3), (6, 0, 2, 0, 1, 0), (8, 1, 1, 1, 0, 1), (9, 0, 4, 0, 1, 2)],
            [1, 2],
            seeds=[(1, 0), (2, 0), (3, 1)],
            drafts=[11, 12, 13],
        ),
        known,
    )
    assert batch.positions.tolist() == [5, 6, 7, 0, 1, 1, 0, 1, 2, 3]
    assert batch.sampling_rows.tolist() == [0, 1, 2, 5, 8, 9]
    columns = batch.sampling
    assert columns is not None
    assert columns.sequence_ids.tolist() == [7, 7, 7, 8, 9, 9]
    assert columns.positions.tolist() == [6, 7, 8, 2, 3, 4], "of the tokens to be sampled"
    assert list(zip(columns.seeds.tolist(), columns.choices.tolist(), strict=True)) == [
        *[(1, 0)] * 3, (2, 0), (3, 1), (3, 1),
    ]  # fmt: skip
    assert columns.drafts is not None
    assert columns.drafts.tolist() == [11, 12, -1, -1, 13, -1]


@pytest.mark.parametrize(
    ("sequence", "drafts"),
    [
        pytest.param((7, 0, 2, 0, 1, 3), [1, 2], id="more rows than there are"),
        pytest.param((7, 0, 3, 0, 1, 3), [1], id="too few drafts"),
        pytest.param((7, 0, 3, 0, 1, 1), [1], id="drafts of nobody"),
        pytest.param((7, 0, 3, 0, 1, 0), [1], id="drafts where nobody samples"),
        pytest.param((7, 0, 3, 0, 1, 3), [1, -1], id="a draft that is no token"),
    ],
)
def test_drafts_that_do_not_go_with_the_rows_that_sample_are_refused(
    sequence: tuple[int, ...], drafts: list[int]
) -> None:
    with pytest.raises(ProtocolError, match=r"Step\.(drafts|sequences)"):
        read(step([sequence], [3], drafts=drafts), tables())


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5), max_size=5))
def test_a_row_counts_while_all_rows_of_its_sequence_before_it_have_sampled_their_drafts(
    sequences: list[list[tuple[int, int]]],
) -> None:
    """Sampled token and draft of each row; the last draft is of no row."""
    rows: list[tuple[int, ...]] = [(7 + place, 0, len(own), 0, 2, len(own)) for place, own in enumerate(sequences)]
    drafts = [draft for own in sequences for _, draft in own[:-1]]
    columns = read(step(rows, [0, 1] * len(rows), drafts=drafts), tables()).sampling
    assert columns is not None
    expected, place = [], 0
    for own in sequences:
        is_right = True
        for number, (token, draft) in enumerate(own):
            expected += [place + number] * is_right
            is_right = is_right and token == draft
        place += len(own)
    token_ids = np.array([token for own in sequences for token, _ in own], dtype=np.int32)
    assert columns.accepted_rows(token_ids).tolist() == expected


@pytest.mark.parametrize("keeps_released", [False, True])
def test_released_blocks_are_of_use_only_where_the_router_may_count_on_them(keeps_released: bool) -> None:
    known = BlockTables(4, 10, keeps_released=keeps_released)
    known.apply(step([(7, 0, 5, 0, 2, 0), (8, 4, 1, 0, 2, 0)], [3, 4, 3, 5]))
    known.apply(step([], [], released=[7]))
    assert sorted(set(known.used_blocks())) == ([3, 4, 5] if keeps_released else [3, 5])
    known.apply(step([(9, 4, 1, 0, 2, 0)], [3, 4], released=[8]))
    assert sorted(set(known.used_blocks())) == ([3, 4, 5] if keeps_released else [3, 4])


def test_inherited_blocks_are_used_until_their_owner_is_known_and_then_go_with_it() -> None:
    known = tables()
    known.inherit([3, 4, 9])
    read(step([(7, 0, 5, 0, 2, 0)], [3, 9]), known)
    assert sorted(known.used_blocks()) == [3, 4, 9]
    read(step([(8, 0, 3, 0, 1, 0)], [5], released=[7]), known)
    assert sorted(known.used_blocks()) == [4, 5]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_each_sequences_own_table(data: st.DataObject) -> None:
    """Steps as a scheduler would plan them, against tables kept whole."""
    known, free = BlockTables(BLOCK_TOKENS, 1000), list(range(1000))
    lengths: dict[int, int] = {}
    blocks: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        released = [s for s in list(lengths) if data.draw(st.booleans())] if data.draw(st.booleans()) else []
        for sequence in released:
            del lengths[sequence], blocks[sequence]
        chosen = data.draw(st.lists(st.integers(0, 5), unique=True, max_size=4))
        rows: list[tuple[int, ...]] = []
        new_blocks: list[int] = []
        wanted: list[int] = []
        for sequence in chosen:
            start, count = lengths.get(sequence, 0), data.draw(st.integers(1, 11))
            table = blocks.setdefault(sequence, [])
            before = len(table)
            while len(table) * BLOCK_TOKENS < start + count:
                table.append(free.pop())
            lengths[sequence] = start + count
            rows.append((sequence, start, count, before, len(table) - before, data.draw(st.integers(0, 1))))
            new_blocks += table[before:]
            wanted += [table[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(start, start + count)]
        batch = read(step(rows, new_blocks, released), known)
        assert batch.slots.tolist() == wanted
        assert len(known) == len(lengths)
        for row, (sequence, *_) in enumerate(rows):
            assert batch.block_tables[row].tolist()[: len(blocks[sequence])] == blocks[sequence]


def test_a_released_sequence_begins_anew() -> None:
    known = tables()
    read(step([(7, 0, 3, 0, 1, 0)], [3]), known)
    assert len(known) == 1
    read(step([(7, 0, 2, 0, 1, 0)], [5], released=[7]), known)
    with pytest.raises(ProtocolError, match="sequence 7 has 0 blocks here"):
        read(step([(7, 2, 1, 1, 0, 0)], [], released=[7]), known)


def test_a_router_that_has_forgotten_is_told_tables_and_what_is_computed() -> None:
    known = tables()
    first = step([(7, 0, 3, 0, 1, 0)], [3])
    read(first, known)
    sequences, blocks = known.held()
    assert (sequences, blocks.tolist()) == ([(7, 0, 1)], [3])
    known.computed(first)
    read(step([(7, 3, 5, 1, 1, 0), (8, 0, 2, 0, 1, 0)], [1, 2]), known)
    sequences, blocks = known.held()
    assert (sequences, blocks.tolist()) == ([(7, 3, 2), (8, 0, 1)], [3, 1, 2])
    assert known.used_blocks() == [3, 1, 2]
    read(step([], [], released=[7]), known)
    assert known.held()[0] == [(8, 0, 1)]


def test_what_comes_behind_a_step_that_failed_is_not_there() -> None:
    known = tables()
    first, failed, next_one = (
        step([(7, 3 * n, 3, 0 if n == 0 else 3, 0 if n else 3, 0)], [] if n else [3, 1, 2]) for n in range(3)
    )
    for message in (first, failed, next_one):
        read(message, known)
    known.computed(first)
    known.computed(next_one)
    assert known.held()[0] == [(7, 3, 3)]
    known.computed(failed)
    known.computed(next_one)
    assert known.held()[0] == [(7, 9, 3)], "in their order they count"


def test_what_is_before_a_sequence_that_is_told_anew_is_there() -> None:
    known = tables()
    anew = step([(7, 6, 2, 0, 2, 0)], [4, 5])
    read(anew, known)
    known.computed(anew)
    assert known.held()[0] == [(7, 8, 2)]


def test_a_table_that_is_told_from_its_first_block_on_replaces_what_was_known() -> None:
    known = tables()
    read(step([(7, 0, 3, 0, 1, 0)], [3]), known)
    read(step([(7, 3, 5, 0, 2, 0)], [4, 5]), known)
    assert known.used_blocks() == [4, 5]


def test_a_stage_that_does_not_compute_a_step_knows_where_its_tokens_stand() -> None:
    known = tables()
    message = replace(step([(7, 0, 6, 0, 2, 0)], [3, 1]), hidden=NO_ARRAY)
    assert read_positions(message, known).tolist() == [12, 13, 14, 15, 4, 5]


def test_a_step_that_only_releases_has_no_rows() -> None:
    batch = read(step([], [], released=[1, 2]), tables())
    assert batch.positions.shape == batch.slots.shape == batch.sampling_rows.shape == (0,)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (step([(7, 3, 1, 1, 0, 0)], []), "sequence 7 has 0 blocks here, the step continues from 1"),
        (step([(7, 0, 5, 0, 1, 0)], [3]), "sequence 7: 5 tokens from 0 do not fit 1 blocks"),
        (step([(7, 4, 1, 0, 1, 0)], [3]), "1 tokens from 4 do not fit"),
        (step([(7, 0, 0, 0, 1, 0)], [3]), "0 tokens"),
        (step([(7, 0, 1, 0, 2, 0)], [3]), "new_blocks has 1 ids, its sequences announce 2"),
        (step([(7, 0, 1, 0, 1, 0)], [3, 4]), "new_blocks has 2 ids"),
        (step([(7, 0, 1, 0, 1, 0)], [NUM_BLOCKS]), r"outside \[0, 20\)"),
        (step([(7, 0, 1, 0, 1, 0)], [-1]), r"outside \[0, 20\)"),
        (step([(7, -1, 1, 0, 1, 0)], [3]), "negative"),
        (step([(7, 0, 1, -1, 1, 0)], [3]), "negative"),
        (step([(7, 2**62, 2**62, 0, 1, 0)], [3]), "do not fit"),
        (step([(7, 0, 1, 0, 1, 1)], [3], sampling=[]), r"Step\.sampling"),
        (step([(7, 0, 1, 0, 1, 0)], [3], sampling=[(0.0, 1.0, 0.0, 0.0)]), r"Step\.sampling"),
        (step([(7, 0, 1, 0, 1, 1)], [3], seeds=[(1, 0), (2, 0)]), r"Step\.seeds"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_by_what_is_wrong(message: Step, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        read_micro_batch(message, torch.zeros(1, dtype=torch.int64), tables())


def test_hidden_states_must_be_as_many_as_the_tokens() -> None:
    with pytest.raises(ProtocolError, match=r"Step\.hidden has 3 rows, its sequences announce 2"):
        read_micro_batch(step([(7, 0, 2, 0, 1, 0)], [3]), torch.zeros((3, 8)), tables())


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(*[st.integers(-2, 12) | st.sampled_from([2**62, -(2**63), 2**63 - 1])] * 6), max_size=3
    ),
    new_blocks=st.lists(st.integers(-1, NUM_BLOCKS + 1), max_size=4),
    released=st.lists(st.integers(-5, 5), max_size=3),
)
def test_any_numbers_are_a_micro_batch_or_a_protocol_error(
    sequences: list[tuple[int, ...]], new_blocks: list[int], released: list[int]
) -> None:
    known = tables()
    tokens = sum(sequence[2] for sequence in sequences)
    hidden = torch.zeros(tokens if 0 <= tokens < 50 else 1, dtype=torch.int64)
    num_samples = sum(sequence[5] != 0 for sequence in sequences)
    message = Step(
        frame([], "int32"),
        frame(sequences, "int64", 6),
        frame(new_blocks, "int32"),
        frame(released, "int64"),
        frame([(0.0, 1.0, 0.0, -1.0)] * num_samples, "float64", 4),
        frame([(1, 0)] * num_samples, "int64", 2),
    )
    try:
        batch = read_micro_batch(message, hidden, known)
    except ProtocolError:
        return
    assert ((batch.slots >= 0) & (batch.slots < NUM_BLOCKS * BLOCK_TOKENS)).all()


def test_sampling_columns_are_those_of_the_sequences_that_sample() -> None:
    message = step(
        [(7, 0, 2, 0, 1, 0), (8, 0, 3, 0, 1, 1), (9, 0, 1, 0, 1, 1)],
        [1, 2, 3],
        sampling=[(0.5, 0.9, 40.0, 2.0), (0.0, 1.0, 0.0, -1.0)],
        seeds=[(11, 1), (2**63 - 1, 0)],
    )
    sampling = read(message, tables()).sampling
    assert sampling is not None
    assert sampling.sequence_ids.tolist() == [8, 9]
    assert sampling.temperatures.tolist() == [0.5, 0.0]
    assert sampling.top_ps.tolist() == [0.9, 1.0]
    assert sampling.top_ks.tolist() == [40, 0]
    assert sampling.num_top_logprobs.tolist() == [2, -1]
    assert sampling.seeds.tolist() == [11, 2**63 - 1]
    assert sampling.choices.tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
@pytest.mark.parametrize("column", range(4))
def test_sampling_numbers_that_make_no_sense_harm_no_stage(column: int, value: float) -> None:
    """The codec lets any float64 through in a tensor; whatever comes must be a micro-batch or a ProtocolError."""
    numbers = [0.5, 0.9, 4.0, 0.0]
    numbers[column] = value
    message = step([(7, 0, 2, 0, 1, 1)], [1], sampling=[tuple(numbers)])
    try:
        read(message, tables())
    except ProtocolError as error:
        refused = str(error)
    else:
        return
    assert "Step.sampling" in refused


def test_a_share_of_probability_below_nothing_is_refused() -> None:
    message = step([(7, 0, 2, 0, 1, 1)], [1], sampling=[(0.5, -1e6, 0.0, -1.0)])
    with pytest.raises(ProtocolError, match="a top_p below 0"):
        read(message, tables())
