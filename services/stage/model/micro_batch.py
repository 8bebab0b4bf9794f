"""A step as flat tensors, and what every stage remembers of each sequence between steps: its block table.

A sequence that decodes may bring *drafts*, tokens that are guessed to follow its last one. All of its rows sample then;
what a row samples counts if all drafts before it are what the rows before it have sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import ProtocolError
from common.messages import Step
from common.wire.array import Float64Array, Int32Array, Int64Array, frame_to_array
from common.wire.records import SAMPLING, SEED, STEP_SEQUENCE, Records, columns_of, frame_to_records
from services.stage.model.logit_adjustments import KeptAdjustments, LogitAdjustments
from services.stage.model.paged_attention import AttendingRows

MAX_TOP_LOGPROBS = 1024


@dataclass(slots=True)
class MicroBatch:
    """One step on one stage. T tokens of Q sequences; S rows that sample a token; B blocks in the longest table."""

    hidden: Tensor
    """int64 [T] token ids on the first stage, model dtype [T, D] elsewhere."""
    positions: Tensor
    """int32 [T]."""
    row_sequence: Tensor
    """int32 [T]: row of `block_tables` of each token."""
    block_tables: Tensor
    """int32 [Q, B]."""
    slots: Tensor
    """int64 [T]: where each token's K and V go."""
    sampling_rows: Tensor
    """int64 [S]: rows whose hidden state is projected to the vocabulary."""
    sampling: SamplingColumns | None
    """None in a self-test, and on ranks other than the first, which draw no tokens."""
    host_positions: Tensor | None = None
    """`positions` on the host, where those are on a device: how far attention goes must not wait for it."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what a forward pass needs, as it goes to a device and to the stage's other ranks."""
        return (self.hidden, self.positions, self.row_sequence, self.block_tables, self.slots, self.sampling_rows)

    @classmethod
    def of_tensors(
        cls, tensors: Sequence[Tensor], sampling: SamplingColumns | None, host_positions: Tensor | None = None
    ) -> MicroBatch:
        """Returns the micro-batch of `tensors()`."""
        hidden, positions, row_sequence, block_tables, slots, sampling_rows = tensors
        return cls(hidden, positions, row_sequence, block_tables, slots, sampling_rows, sampling, host_positions)

    @property
    def attending_rows(self) -> AttendingRows:
        """Returns where its tokens stand."""
        return AttendingRows(self.block_tables, self.row_sequence, self.positions, self.host_positions)


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """What the sampler needs of each of the S rows. Those of one sequence follow each other."""

    sequence_ids: Int64Array
    positions: Int64Array
    """Positions of the tokens to be sampled."""
    temperatures: Float64Array
    top_ps: Float64Array
    top_ks: Int64Array
    num_top_logprobs: Int64Array
    """-1: no logprobs."""
    seeds: Int64Array
    choices: Int64Array
    adjustments: LogitAdjustments | None = None
    """Penalties and biases; None where no row has any."""
    drafts: Int32Array | None = None
    """The draft that the next row of the same sequence goes on with; -1: it is the last one. None: no row has one."""

    def rows(self, start: int, stop: int) -> SamplingColumns:
        """Returns the columns of rows [start, stop)."""
        columns = {name: getattr(self, name) for name in type(self).__slots__}
        by_row = {name: column[start:stop] for name, column in columns.items() if isinstance(column, np.ndarray)}
        adjustments = None if self.adjustments is None else self.adjustments.rows(start, stop)
        return replace(self, **by_row, adjustments=adjustments)

    def accepted_rows(self, token_ids: Int32Array) -> Int64Array:
        """Returns the rows, ascending, whose sampled tokens count, of `token_ids` [S]: each row before them in their
        sequence has sampled the draft that the next one goes on with."""
        if self.drafts is None:
            return np.arange(len(token_ids))
        misses = token_ids != self.drafts  # the last row of a sequence is one
        num_before = np.cumsum(misses) - misses
        is_first = np.append(True, self.drafts[:-1] < 0)
        firsts = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        return np.flatnonzero(num_before == num_before[firsts])


class BlockTables:
    """Block tables of the sequences that a stage knows, kept by the deltas that steps bring."""

    def __init__(self, block_tokens: int, num_blocks: int, *, keeps_released: bool = False) -> None:
        """`keeps_released`: the router may give blocks of sequences that were released to others as they are."""
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.keeps_released = keeps_released
        self._tables: dict[int, Int32Array] = {}
        self._computed: dict[int, int] = {}
        self._inherited: set[int] = set()
        """Blocks whose content may be needed, and that are in no table: those that came from another holder's memory,
        or back from the session tier, and of whose sequences no step has told yet; and cached ones, perhaps."""

    def __len__(self) -> int:
        return len(self._tables)

    def computed(self, step: Step) -> None:
        """Notes that this stage has K and V for the chunks of a step. One that begins behind what is there counts for
        nothing: the step before it has failed, or was lost."""
        sequences = frame_to_records(step.sequences, STEP_SEQUENCE, None, "Step.sequences")
        for sequence_id, start, num_tokens, *_ in sequences.tolist():
            computed = self._computed.get(sequence_id, 0)
            if sequence_id in self._tables and start <= computed:
                self._computed[sequence_id] = max(computed, start + num_tokens)

    def inherit(self, blocks: Iterable[int]) -> None:
        """Notes that these blocks were copied here, from another holder's memory or from the session tier: sequences
        have them whose tables come with their next steps, which may be long after a mirror of this memory was filled.
        """
        self._inherited.update(blocks)

    def used_blocks(self) -> list[int]:
        """Blocks of all sequences, known or not."""
        return [*self._inherited, *(block for table in self._tables.values() for block in table.tolist())]

    def held(self) -> tuple[list[tuple[int, int, int]], Int32Array]:
        """Returns what a router that has forgotten is told: the records of HELD_SEQUENCE, and the blocks."""
        rows = [(number, self._computed.get(number, 0), table.size) for number, table in self._tables.items()]
        tables = [*self._tables.values(), np.zeros(0, dtype=np.int32)]
        return rows, np.concatenate(tables).astype(np.int32)

    def apply(self, step: Step) -> tuple[Records, list[Int32Array]]:
        """Applies a step's releases and new blocks. Returns its sequences [Q], STEP_SEQUENCE, and their tables.

        Raises ProtocolError when the deltas do not continue what is known here: the router then sends it anew.
        """
        for sequence_id in frame_to_array(step.released, "int64", (None,), "Step.released").tolist():
            released = self._tables.pop(sequence_id, None)
            self._computed.pop(sequence_id, None)
            if released is not None and self.keeps_released:
                self._inherited.update(released.tolist())
        sequences = frame_to_records(step.sequences, STEP_SEQUENCE, None, "Step.sequences")
        new_blocks: Int32Array = frame_to_array(step.new_blocks, "int32", (None,), "Step.new_blocks")
        if len(sequences) and columns_of(sequences)[:, 1:].min() < 0:
            raise ProtocolError("Step.sequences holds a negative number")
        num_announced = int(sequences["num_new_blocks"].sum())
        if num_announced != new_blocks.size:
            raise ProtocolError(f"Step.new_blocks has {new_blocks.size} ids, its sequences announce {num_announced}")
        if new_blocks.size and not (0 <= new_blocks.min() and new_blocks.max() < self.num_blocks):
            raise ProtocolError(f"Step.new_blocks names a block outside [0, {self.num_blocks})")
        tables, taken = [], 0
        for sequence_id, start, num_tokens, num_known, num_new, _ in sequences.tolist():
            table = self._tables.get(sequence_id)
            if num_known == 0:
                table = new_blocks[taken : taken + num_new]
            elif table is None or table.size != num_known:
                known = 0 if table is None else table.size
                raise ProtocolError(
                    f"sequence {sequence_id} has {known} blocks here, the step continues from {num_known}"
                )
            elif num_new:
                table = np.concatenate((table, new_blocks[taken : taken + num_new]))
            taken += num_new
            if num_tokens < 1 or start + num_tokens > table.size * self.block_tokens:
                raise ProtocolError(
                    f"sequence {sequence_id}: {num_tokens} tokens from {start} do not fit {table.size} blocks"
                )
            self._tables[sequence_id] = table
            if num_known == 0:
                # Told anew: the router counts on what is before it, which another holder may have computed.
                self._computed[sequence_id] = max(self._computed.get(sequence_id, 0), start)
            tables.append(table)
        # Each has an owner that is known now: with it the block is released too.
        self._inherited.difference_update(new_blocks.tolist())
        return sequences, tables


def read_micro_batch(
    step: Step, hidden: Tensor, tables: BlockTables, adjustments: KeptAdjustments | None = None
) -> MicroBatch:
    """Checks a step and lays it out flat. `hidden` is its tensor as this stage receives it. Raises ProtocolError.

    `adjustments`: what the last stage keeps of sequences' penalties and biases; others do not look at them.
    """
    sequences, block_tables = tables.apply(step)
    num_tokens = int(sequences["num_tokens"].sum())
    if num_tokens != hidden.shape[0]:
        raise ProtocolError(f"Step.hidden has {hidden.shape[0]} rows, its sequences announce {num_tokens}")
    return _lay_out(step, hidden, sequences, block_tables, tables.block_tokens, adjustments)


def read_positions(step: Step, tables: BlockTables) -> Tensor:
    """Returns int64 [T]: where in paged memory a step's tokens stand, for a stage that does not compute it. Raises
    ProtocolError."""
    sequences, block_tables = tables.apply(step)
    nothing = torch.zeros((int(sequences["num_tokens"].sum()), 0))
    return _lay_out(step, nothing, sequences, block_tables, tables.block_tokens).slots


def _lay_out(
    step: Step,
    hidden: Tensor,
    sequences: Records,
    block_tables: list[Int32Array],
    block_tokens: int,
    adjustments: KeptAdjustments | None = None,
) -> MicroBatch:
    padded = np.zeros((len(block_tables), max((t.size for t in block_tables), default=0)), dtype=np.int32)
    for row, table in enumerate(block_tables):
        padded[row, : table.size] = table
    row_sequence, positions, last_rows = _spread(sequences["start"], sequences["num_tokens"], hidden.shape[0])
    slots = padded[row_sequence, positions // block_tokens] * np.int64(block_tokens) + positions % block_tokens
    samples = sequences["samples"] != 0
    sampling = sequences[samples]
    sampling_rows, owners = _rows_that_sample(sampling, last_rows[samples])
    return MicroBatch(
        hidden=hidden,
        positions=torch.from_numpy(positions.astype(np.int32)),
        row_sequence=torch.from_numpy(row_sequence),
        block_tables=torch.from_numpy(padded),
        slots=torch.from_numpy(slots),
        sampling_rows=torch.from_numpy(sampling_rows),
        sampling=_sampling_columns(step, sampling, owners, positions[sampling_rows] + 1, adjustments),
    )


def _spread(starts: Int64Array, counts: Int64Array, num_tokens: int) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Returns the sequence [T] and the position [T] of each token, and the row of the last one of each sequence [Q]."""
    if num_tokens == len(counts):  # one each, as in most steps
        rows = np.arange(num_tokens)
        return rows.astype(np.int32), starts, rows
    ends = np.cumsum(counts)
    positions = np.arange(num_tokens) - np.repeat(ends - counts, counts) + np.repeat(starts, counts)
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts), positions, ends - 1


def _rows_that_sample(sequences: Records, last_rows: Int64Array) -> tuple[Int64Array, Int64Array | slice]:
    """Returns the rows [S] that sample, and of each the place of its sequence among these; all, where each has one.
    `last_rows`: of these sequences."""
    counts = sequences["samples"]
    if (counts == 1).all():
        return last_rows, slice(None)
    if (counts > sequences["num_tokens"]).any():
        raise ProtocolError("Step.sequences lets more rows of a sequence sample than it has")
    owners = np.repeat(np.arange(len(counts)), counts)
    num_behind = np.cumsum(counts)[owners] - 1 - np.arange(len(owners))
    return last_rows[owners] - num_behind, owners


def _sampling_columns(
    step: Step, sequences: Records, owners: Int64Array | slice, positions: Int64Array, kept: KeptAdjustments | None
) -> SamplingColumns:
    """`sequences`: those that sample. `owners`: as `_rows_that_sample` has it. `positions` [S]: of the tokens."""
    sampling = frame_to_records(step.sampling, SAMPLING, len(sequences), "Step.sampling")
    seeds = frame_to_records(step.seeds, SEED, len(sequences), "Step.seeds")
    if len(sampling) and not (
        np.isfinite(columns_of(sampling)).all()
        and sampling["top_k"].max() < 1 << 31
        and sampling["top_p"].min() >= 0
        and sampling["num_top_logprobs"].max() <= MAX_TOP_LOGPROBS
    ):
        raise ProtocolError(
            "Step.sampling holds a number that is not finite, a top_p below 0, or asks for over "
            f"{MAX_TOP_LOGPROBS} logprobs"
        )
    drafts: Int32Array = frame_to_array(step.drafts, "int32", (len(positions) - len(sequences),), "Step.drafts")
    if drafts.size and drafts.min() < 0:
        raise ProtocolError("Step.drafts holds a negative token id")
    by_sequence = np.split(drafts, np.cumsum(sequences["samples"] - 1)[:-1]) if drafts.size else ()
    adjustments = None if kept is None else kept.apply(step, sequences["sequence_id"], by_sequence)
    sampling, seeds = sampling[owners], seeds[owners]
    return SamplingColumns(
        sequence_ids=sequences["sequence_id"][owners],
        positions=positions,
        temperatures=sampling["temperature"],
        top_ps=sampling["top_p"],
        top_ks=sampling["top_k"].astype(np.int64),
        num_top_logprobs=sampling["num_top_logprobs"].astype(np.int64),
        seeds=seeds["seed"],
        choices=seeds["choice"],
        adjustments=adjustments,
        drafts=_drafts_by_row(drafts, sequences["samples"]) if drafts.size else None,
    )


def _drafts_by_row(drafts: Int32Array, counts: Int64Array) -> Int32Array:
    """Returns [S]: the draft behind each row in its sequence, -1 behind the last one. `counts`: rows by sequence."""
    by_row = np.zeros(len(drafts) + len(counts), dtype=np.int32)
    by_row[np.cumsum(counts) - 1] = -1
    by_row[by_row == 0] = drafts
    return by_row
