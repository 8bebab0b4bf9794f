"""Which collectives the ranks of a stage use, by what they compute on. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

from common.compute.device import Device
from services.stage.ranks.collectives import BoardCollectives, Collectives, Meeting
from services.stage.ranks.shared_channel import RankBoard
from services.stage.ranks.staged_collectives import StagedCollectives

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

CollectivesKind = Literal["board", "gloo", "nccl"]


def choose_collectives(setting: str, *, is_on_host: bool, have_own_gpus: bool) -> CollectivesKind:
    """What `auto` stands for. Whoever names one has it; what cannot be is refused where the device is opened."""
    if setting != "auto":
        return cast(CollectivesKind, setting)
    return "nccl" if have_own_gpus and not is_on_host else "board"


def open_collectives(
    kind: CollectivesKind,
    rank: int,
    degree: int,
    board: RankBoard,
    meeting: Meeting,
    device: Device,
    store: Store | None,
    is_lost: Callable[[], bool],
) -> Collectives:
    """All ranks come here together. Raises RankLostError, DeviceError.

    `store`: the rendezvous, None for the board. `is_lost`: whether one of them is, from any thread.
    """
    if degree == 1 or kind == "board":
        inner: Collectives = BoardCollectives(board, rank, degree, meeting)
    else:
        # It takes a second to import, and most meshes do without.
        from services.stage.ranks.torch_collectives import TorchCollectives

        assert store is not None, "rank 0 has opened it"
        if kind == "nccl":
            return TorchCollectives(store, rank, degree, device.place, is_lost)
        inner = TorchCollectives(store, rank, degree)
    return inner if device.is_host else StagedCollectives(inner, device)
