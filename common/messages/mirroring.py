"""Stage -> its mirror, in order; acknowledgements come back."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages.frames import TensorFrame


@dataclass(frozen=True, slots=True)
class MirrorRows:
    """Stage -> mirror: what a step wrote. T positions, L layers, H KV heads, W head width, D model width."""

    lease_term: int
    mark: int
    """All steps up to this one have been sent whole."""
    positions: TensorFrame
    """int64 [T]: block * block size + offset."""
    keys: TensorFrame
    """model dtype [L, T, H, W]."""
    values: TensorFrame
    """model dtype [L, T, H, W]."""
    hidden: TensorFrame
    """model dtype [T, D], for the activation log; [0, D] on the last stage, which has none."""


@dataclass(frozen=True, slots=True)
class MirrorBlocks:
    """Stage -> mirror: whole blocks as they are now, for a mirror that joined late."""

    lease_term: int
    mark: int
    is_last: bool
    """The copy is complete with these."""
    blocks: TensorFrame
    """int32 [B]."""
    keys: TensorFrame
    """model dtype [L, B, *]: a block's keys as they lie in memory."""
    values: TensorFrame
    """model dtype [L, B, *]."""
    hidden: TensorFrame
    """model dtype [B, *]; [0, *] on the last stage."""


@dataclass(frozen=True, slots=True)
class MirrorAck:
    """Mirror -> stage: everything up to the message of this sequence number is applied."""

    lease_term: int
    applied: int
