"""The stage's loop, as far as it needs no socket: what an assignment does to what was under way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from common.messages import AssignStage, Header, Message, MirrorBlocks, MirrorTo, StageReady
from common.model_config import read_model_config
from common.transport import LinkEvent
from services.stage.expert_client import ExpertClient
from services.stage.expert_nodes import ExpertNodes
from services.stage.mirror_link import MirrorLink
from services.stage.mirror_sender import BACKFILL_BLOCKS
from services.stage.service import StageService
from services.stage.slot_keeper import SlotKeeper
from tests.support.checkpoints import QWEN3, write_checkpoint
from tests.support.kernels import one_torch_thread
from tests.support.listening_router import ListeningRouter
from tests.support.memory_transport import MemorySocket, MemoryTransport

__all__ = ["one_torch_thread"]
ASSIGN = AssignStage(0, 0, 2, 0, 2, 1, 40, ("tcp://next:1",), "")


class Stage(StageService):
    """A stage whose turns the test takes."""

    def __init__(self, directory: Path) -> None:
        self.transport, self.control = MemoryTransport(), ListeningRouter()
        transport: Any = self.transport
        control: Any = self.control
        steps: Any = MemorySocket("steps", "tcp://own:1")
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        config = read_model_config(directory)
        self.keeper = SlotKeeper(config, directory, 64, None, transport, "", log)
        experts = ExpertClient(ExpertNodes(transport, "", config.num_experts, log), log)
        super().__init__(
            config, self.keeper, experts, control, steps, MirrorLink(transport, "", log), log, lambda: 100.0
        )

    def hear(self, message: Message, generation: int = 0) -> None:
        self.control.asked.append((message, Header(generation=generation)))
        self._take_control(100.0)
        if self.keeper._loading is not None:
            self.keeper._loading.future.exception(timeout=60)
        self._answer_assignment(self.keeper.poll())

    def take_slot(self, message: AssignStage, generation: int) -> None:
        self.control.sent.clear()
        self.hear(message, generation)
        (ready,) = self.control.sent
        assert isinstance(ready, StageReady)

    def follow(self, num_used_blocks: int) -> MemorySocket:
        """Have a mirror that has got the first few of these blocks; the socket to it."""
        assert self.keeper.slot is not None
        self.keeper.slot.held.tables._tables[1] = torch.arange(num_used_blocks, dtype=torch.int32).numpy()
        self.hear(MirrorTo(1, "stage-9", ("tcp://mirror:1",), ""))
        socket = self.transport.sockets["mirror stage-9"]
        socket.events.append(LinkEvent.CONNECTED)
        self._feed_mirror(100.0)
        ((message, _),) = socket.take_sent()
        assert isinstance(message, MirrorBlocks)
        assert not message.is_last
        return socket


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


@pytest.fixture
def stage(directory: Path) -> Iterator[Stage]:
    made = Stage(directory)
    yield made
    made.keeper.close()


def test_a_mirror_is_not_filled_from_memory_that_is_no_more(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    socket = stage.follow(40)
    stage.take_slot(replace(ASSIGN, num_blocks=BACKFILL_BLOCKS), 2)
    stage._feed_mirror(101.0)
    assert socket.is_closed
    assert not socket.sent


def test_a_back_fill_goes_on_in_a_new_generation_of_the_same_memory(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    socket = stage.follow(40)
    stage.take_slot(ASSIGN, 2)
    for turn in range(4):
        stage._feed_mirror(101.0 + turn)
    assert [message.is_last for message, _ in socket.take_sent()] == [False, False, False, True]
