"""A stage and an expert process live on as another incarnation, with all that is slow to get, and nothing else."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from common.checkpoint.model_config import read_model_config
from common.checkpoint.part import SeenCheckpoint
from common.config import Settings
from common.errors import NodeLostError
from common.node.process import open_node
from common.topology import CheckpointPart, LayerRange, NodeKind
from common.wire.transport import MessageSocket, Transport
from services.expert.process import ExpertProcess
from services.expert.shard_store import ShardStore
from services.stage.process import StageProcess
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


@pytest.fixture
def _stop_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes' own handlers stay out of the test's process."""
    monkeypatch.setattr("common.node.process.StopFlag", lambda: lambda: False)


class Weights:
    """In place of a model: something that can be seen to be let go."""


def given(checkpoint: Path, folder: Path) -> tuple[Settings, Any]:
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    return Settings(model=str(checkpoint), state_dir=folder), log


@pytest.mark.usefixtures("_stop_signals")
def test_a_stage_lives_again_with_its_layers_and_lets_them_go_when_it_gets_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, log = given(checkpoint, tmp_path)
    stage = StageProcess(settings, None, log)
    lives: list[tuple[str, int, Any]] = []
    layers: list[Any] = [Weights()]
    seen = weakref.ref(layers[0])

    def run(service: Any, should_stop: Any) -> None:
        own, control = service._worker.layers, service._control
        lives.append((control.hello.node_id, control.router_term, own.loaded))
        if len(lives) == 1:
            own.loaded, control.router_term = layers.pop(), 7
            raise NodeLostError("declared dead")
        assert lives[1][2] is not None
        lives[1] = (*lives[1][:2], None)
        own.loaded = None  # other layers are loaded
        gc.collect()
        assert seen() is None, "nobody else holds on to the former ones"

    monkeypatch.setattr("services.stage.process.StageService.run", run)
    with pytest.raises(NodeLostError):
        stage.live()
    stage.live()
    (first, _, _), (second, router_term, _) = lives
    assert first != second
    assert router_term == 7, "a router that was fenced stays so"


@pytest.mark.usefixtures("_stop_signals")
def test_an_expert_node_lives_again_with_its_shards_and_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = ExpertProcess(*given(checkpoint, tmp_path))
    store = ShardStore(read_model_config(checkpoint), 1, torch.bfloat16, None)
    lives: list[tuple[str, ShardStore | None]] = []

    def run(service: Any, should_stop: Any) -> None:
        lives.append((service._control.hello.node_id, service._shards.held.store))
        if len(lives) == 1:
            service._shards.held.store = store
            raise NodeLostError("declared dead")

    monkeypatch.setattr("services.expert.process.ExpertService.run", run)
    with pytest.raises(NodeLostError):
        expert.live()
    expert.live()
    assert lives[0][0] != lives[1][0]
    assert lives[1][1] is store


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        (NodeKind.STAGE, None, ((), ())),
        (NodeKind.STAGE, CheckpointPart(layers=LayerRange(2, 5)), ((2, 5), ())),
        (NodeKind.EXPERT, CheckpointPart(experts=frozenset({4, 1})), ((), (1, 4))),
    ],
)
def test_a_node_says_what_of_the_checkpoint_it_sees(
    kind: NodeKind, part: CheckpointPart | None, said: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    def open_data(transport: Transport, endpoint: str) -> MessageSocket:
        return transport.pull("data", [endpoint])

    settings, log = given(tmp_path, tmp_path)
    own: Any = SimpleNamespace(settings=settings, log=log, seen=SeenCheckpoint("print", part), router_term=0)
    with open_node(kind, own, "cpu", open_data) as node:
        hello = node.control.hello
    assert (hello.fingerprint, hello.part_layers, hello.part_experts) == ("print", *said)


@pytest.mark.parametrize(
    ("control", "call_rings", "has_links", "says_so"),
    [
        ("tcp://127.0.0.1:1", "auto", True, True),
        ("tcp://127.0.0.1:1", "off", True, False),
        ("tcp://127.0.0.1:1", "auto", False, False),
        ("", "auto", True, False),
    ],
)
def test_a_node_says_where_links_come_in_if_it_speaks_over_tcp_and_its_native_code_can_answer(
    control: str, call_rings: str, has_links: bool, says_so: bool, tmp_path: Path
) -> None:
    settings, log = given(tmp_path, tmp_path)
    settings = settings.model_copy(update={"control": control, "call_rings": call_rings})
    own: Any = SimpleNamespace(settings=settings, log=log, seen=SeenCheckpoint("print", None), router_term=0)
    with open_node(
        NodeKind.EXPERT, own, "cpu", lambda transport, at: transport.router("calls", [at]), has_links=has_links
    ) as node:
        links = node.control.hello.links
        assert bool(links) == (node.links is not None) == says_so
        assert all(link.startswith("tcp://127.0.0.1:") and link not in node.data.endpoints for link in links)
