"""Layers of a stage with ranks, as rank 0's forward pass sees them: each is one command, and its own part of the work.

The forward pass itself, norms, gates and the residual stream exist on rank 0 only: the formula in
`services/stage/model/decoder.py` does not know of ranks. T tokens, D model width, S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import cast

from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from services.stage.model.decoder import DecoderLayer, ForwardPass, StageModel
from services.stage.model.gate import Gate
from services.stage.model.joined_parts import AttentionPart, DenseColumns
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache
from services.stage.model.tp_shard import RankCut
from services.stage.ranks.commands import Op
from services.stage.ranks.leader import Conductor
from services.stage.ranks.part_compute import attend, feed


@dataclass(frozen=True, slots=True)
class ParallelAttention:
    """All ranks' heads of one layer."""

    part: AttentionPart
    layer: int
    widest: int
    """Values of a row of what the ranks exchange."""
    conductor: Conductor

    def __call__(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """x [T, D] -> [T, D]. Raises RankLostError."""
        conductor = self.conductor

        def compute(start: int, stop: int) -> Tensor:
            own_rotary = rotary[0][start:stop], rotary[1][start:stop]
            rows = x[start:stop]
            with conductor.command((Op.ATTEND, batch.number, self.layer, start, stop), rows) as collectives:
                whole = attend(self.part, conductor.cut, collectives, rows, batch.rows(start, stop), own_rotary, cache)
            assert whole is not None
            return whole

        return conductor.in_pieces(x, x.shape[1], self.widest, compute)


@dataclass(frozen=True, slots=True)
class ParallelFeed:
    """All ranks' parts of a dense feed-forward network."""

    part: DenseColumns
    layer: int
    widest: int
    """Values of a row of what the ranks exchange."""
    conductor: Conductor

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]. Raises RankLostError."""
        conductor = self.conductor

        def compute(start: int, stop: int) -> Tensor:
            rows = x[start:stop]
            with conductor.command((Op.FEED, self.layer, stop - start), rows) as collectives:
                whole = feed(self.part, conductor.cut, collectives, rows)
            assert whole is not None
            return whole

        return conductor.in_pieces(x, x.shape[1], self.widest, compute)


@dataclass(frozen=True, slots=True)
class ParallelColumns:
    """The embedding or the lm_head: each rank has some output columns of it."""

    part: Callable[[Tensor], Tensor]
    op: Op
    num_columns: int
    """Of the whole; what ranks have beyond that is filler."""
    widest: int
    conductor: Conductor

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, ...] -> [T, columns]. Raises RankLostError."""
        conductor = self.conductor

        def compute(start: int, stop: int) -> Tensor:
            rows = x[start:stop]
            with conductor.command((self.op, stop - start), rows) as collectives:
                whole = collectives.gather(self.part(rows))
            assert whole is not None
            return whole[:, : self.num_columns]

        # A copy: what is embedded is the residual stream, and outlives the next command.
        return conductor.in_pieces(x, self.num_columns, self.widest, compute).clone()


@dataclass(frozen=True, slots=True)
class ParallelStageModel(StageModel):
    """A stage's model whose layers are cut over ranks. Ranks are told of a micro-batch when its forward pass begins."""

    inner: StageModel
    """The same layers, in the host's memory or on this process's device."""
    conductor: Conductor
    kv_heads: slice
    """Rank 0's, of the caches that it is given."""

    def forward(self, batch: MicroBatch, caches: list[LayerKvCache]) -> ForwardPass:
        """Hidden states of a micro-batch after this stage's layers. Raises RankLostError."""
        own = [cache.of_heads(self.kv_heads.start, self.kv_heads.stop) for cache in caches]
        self.conductor.begin_batch(batch)
        try:
            return (yield from self.inner.forward(batch, own))
        finally:
            self.conductor.end_batch(batch)

    def sampled_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """As `inner` does it."""
        return self.inner.sampled_logits(hidden, rows)


def put_on_ranks(
    model: StageModel, conductor: Conductor, cut: RankCut, config: ModelConfig, kv_heads: slice
) -> ParallelStageModel:
    """A model of rank 0's parts, with the other ranks' parts behind it. `kv_heads`: rank 0's, of its caches."""
    # A sum has one row a rank; columns that do not divide are filled up.
    sums = config.hidden_size * cut.degree
    heads = max(sums, config.num_heads * config.head_dim)
    middle = max(sums, config.dense_intermediate_size)

    def parallel(layer: DecoderLayer, number: int) -> DecoderLayer:
        attention = ParallelAttention(cast(AttentionPart, layer.attention), number, heads, conductor)
        if isinstance(layer.feed_forward, Gate):
            return replace(layer, attention=attention)
        feed_forward = ParallelFeed(cast(DenseColumns, layer.feed_forward), number, middle, conductor)
        return replace(layer, attention=attention, feed_forward=feed_forward)

    layers = tuple(parallel(layer, number) for number, layer in enumerate(model.layers))
    embedding, lm_head = model.embedding, model.lm_head
    if embedding is not None:
        width = config.hidden_size
        embedding = ParallelColumns(embedding, Op.EMBED, width, width + cut.degree, conductor)
    if lm_head is not None:
        widest = max(config.hidden_size, config.vocab_size + max(cut.degree, cut.num_parts))
        lm_head = ParallelColumns(lm_head, Op.PROJECT, config.vocab_size, widest, conductor)
    inner = replace(model, layers=layers, embedding=embedding, lm_head=lm_head)
    common = {field.name: getattr(inner, field.name) for field in fields(StageModel)}
    return ParallelStageModel(**common, inner=inner, conductor=conductor, kv_heads=kv_heads)
