"""What an expert node answers, waited for at once."""

from __future__ import annotations

from torch import Tensor

from common.compute.device import HOST, Device
from services.expert.calls import WaitingCall, begin_answer
from services.expert.shard_store import ShardStore


def answer_calls(calls: list[WaitingCall], store: ShardStore, device: Device = HOST) -> list[Tensor]:
    """Each call's answer, see LayerAnswer."""
    return begin_answer(calls, store, device, began_s=0.0).collect()
