"""An expert node's loop: layers are begun while others come back from the device, and answered in order."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from common.checkpoint.model_config import read_model_config
from common.compute.device import HOST, Device
from common.errors import DeviceError
from common.messages import ExpertRows, Failed, Header, Message
from common.node.process import NodeProcess
from services.expert.service import MAX_UNDER_WAY, ExpertService
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.answered_calls import answer_calls
from tests.support.nodes.kernels import one_torch_thread  # noqa: F401
from tests.support.nodes.simulated_gpu import PLACE, simulated_gpu
from tests.unit.expert.test_calls import check, dispatch, filled, hidden_of


class Answers:
    """In place of the socket."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.bytes_sent = 0

    def send(self, identity: bytes, message: Message, header: Header) -> None:
        self.sent.append(message)


def service_of(directory: Path, device: Device) -> tuple[Any, Answers]:
    config = read_model_config(directory)
    place = torch.device("cpu") if device.is_host else PLACE
    held = SimpleNamespace(store=filled(config, directory, None, place), device=device)
    shards: Any = SimpleNamespace(held=held, add_held=None, version=1, num_reports=1)
    control: Any = SimpleNamespace(add_held=None)
    answers: Any = Answers()
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    nobody: Any = None
    return ExpertService(NodeProcess(nobody, control, nobody, answers, "", log), shards), answers


def ask(service: Any, number: int, layer: int) -> None:
    service._queue.add(
        check(dispatch(hidden_of(3, number), [(0, 1, 0), (2, 0, 1)], number=number), store(service), layer)
    )


def store(service: Any) -> Any:
    return service._shards.held.store


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


def test_on_the_host_a_layer_is_answered_at_once(directory: Path) -> None:
    service, answers = service_of(directory, HOST)
    ask(service, 1, layer=0)
    service._begin_layer(0.0)
    service._answer_done()
    (answer,) = answers.sent
    assert isinstance(answer, ExpertRows)
    assert not service._has_to_finish


def test_a_device_gets_the_next_layer_while_the_one_before_comes_back(directory: Path) -> None:
    with simulated_gpu() as device:
        service, answers = service_of(directory, device)
        for number, layer in ((1, 0), (2, 1), (3, 0), (4, 1)):
            ask(service, number, layer)
        expected = [
            answer_calls([call], store(service), device)[0] for call in sorted(service._queue._calls, key=order_of)
        ]
        for _ in range(3):
            service._begin_layer(0.0)
        assert len(service._under_way) == MAX_UNDER_WAY
        assert service._load().queued == 4
        for _ in range(5):
            service._answer_done()
        assert not service._has_to_finish
    rows = [answer for answer in answers.sent if isinstance(answer, ExpertRows)]
    assert [answer.call for answer in rows] == [1, 3, 2, 4]
    for answer, wanted in zip(rows, expected, strict=True):
        assert bytes(answer.rows.data) == wanted.numpy().tobytes()


def order_of(call: Any) -> tuple[int, int]:
    return call.header.layer, call.number


def test_calls_that_fail_on_the_way_back_are_answered_so_and_the_next_go_on(directory: Path) -> None:
    service, answers = service_of(directory, HOST)

    class Broken:
        def is_ready(self) -> bool:
            raise RuntimeError("an impossible shape")

    ask(service, 1, layer=0)
    ask(service, 2, layer=1)
    service._begin_layer(0.0)
    under_way = service._under_way.popleft()
    service._under_way = deque([SimpleNamespace(calls=under_way.calls, download=Broken())])
    service._begin_layer(0.0)
    service._answer_done()
    failed, answered = answers.sent
    assert isinstance(failed, Failed)
    assert (failed.call, failed.message) == (1, "an impossible shape")
    assert isinstance(answered, ExpertRows)


def test_a_device_that_hangs_ends_the_node(directory: Path) -> None:
    service, _ = service_of(directory, HOST)

    class Hanging:
        def is_ready(self) -> bool:
            raise DeviceError("the GPU hangs")

    service._under_way = deque([SimpleNamespace(calls=[], download=Hanging())])
    with pytest.raises(DeviceError):
        service._answer_done()
