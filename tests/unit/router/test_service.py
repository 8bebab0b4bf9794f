"""What the router process is before anything runs: its address, and numbers that no router before it has given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from common.config import Settings
from common.errors import ConfigurationError
from common.ids import PipelineId
from common.messages import AssignStage, StageReady
from common.node import NodeAddresses
from compose.shard_checkpoint import shard_checkpoint
from compose.tiny_checkpoint import write_tiny_checkpoint
from services.router.control.actions import Action, OpenPipeline, Tell
from services.router.control.stage_roles import StageRoles
from services.router.journal_sink import Housekeeping
from services.router.service import Model, _mesh_loop, http_url, read_model
from tests.support.mesh_shapes import node, small_model


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "fe80::1"])
def test_the_address_is_one_that_clients_can_take_apart(host: str) -> None:
    url = httpx.URL(http_url(host, 8000))
    assert (url.host, url.port) == (host, 8000)


def test_a_router_with_its_part_serves_what_one_with_the_whole_does(tmp_path: Path) -> None:
    whole = write_tiny_checkpoint(tmp_path / "tiny")
    shard_checkpoint(str(whole), tmp_path / "parts", 2, 1, 1)
    of_whole, of_part = (read_model(Settings(model=str(path))) for path in (whole, tmp_path / "parts" / "router"))
    assert replace(of_part, directory=whole) == of_whole
    assert of_part.served_name == "tiny"
    with pytest.raises(ConfigurationError, match=r"layers \[0, 2\): .* needs the whole checkpoint or the part router"):
        read_model(Settings(model=str(tmp_path / "parts" / "stage-0")))


class NoSockets:
    """In place of MeshClient: only what the roles are told of it."""

    class results:
        endpoints = ("tcp://router:9",)


def roles_in(term: int, tmp_path: Path) -> StageRoles:
    """Of the router that has this term."""
    anything: Any = None
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    client: Any = NoSockets()
    mesh = _mesh_loop(
        Settings(model="m", kv_cache_tokens=1024),
        Model(tmp_path, small_model(), "print", "float32", 512, "m"),
        client,
        NodeAddresses("tcp://router:1", "", ""),
        term,
        anything,
        Housekeeping(lambda: None, None),
        None,
        log,
    )
    return mesh._stages


def assign(roles: StageRoles) -> list[Tell]:
    """Two stages join; what they are told."""
    actions: list[Action] = [*roles.join(node("a"), 0.0), *roles.join(node("b"), 0.0), *roles.tick(10.0)]
    return [action for action in actions if isinstance(action, Tell) and isinstance(action.message, AssignStage)]


def report(roles: StageRoles, told: list[Tell]) -> list[Action]:
    """Both say that they are ready for what they were told."""
    answers: list[Action] = []
    for action in told:
        assert isinstance(action.message, AssignStage)
        ready = StageReady(action.message.pipeline, action.message.slot, action.message.lease_term, 1, 1)
        answers += roles.take_ready(action.node_id, ready, action.header.generation)
    return answers


@pytest.mark.parametrize("term", [1, 7])
def test_what_stages_say_of_a_slot_that_another_router_gave_them_opens_nothing(term: int, tmp_path: Path) -> None:
    before, after = roles_in(term, tmp_path), roles_in(term + 1, tmp_path)
    told_before, told_after = assign(before), assign(after)
    assert len(told_before) == len(told_after) == 2
    assert report(after, told_before) == []
    assert after.num_open == 0
    (opened,) = report(after, told_after)
    assert isinstance(opened, OpenPipeline)
    assert opened.pipeline == PipelineId(0)
    assert all(old.header.generation < opened.generation for old in told_before), "they ascend from router to router"
