"""What the router process is before anything runs: its address, and numbers that no router before it has given."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.checkpoint.weights import CheckpointWeights
from common.config import Settings
from common.errors import ConfigurationError, ForbiddenError
from common.ids import PipelineId
from common.messages import AssignStage, StageReady
from common.node.control_link import NodeAddresses
from compose.shard_checkpoint import shard_checkpoint
from compose.tiny_checkpoint import write_tiny_checkpoint
from services.router.control.actions import Action, OpenPipeline, Tell
from services.router.control.stage_roles import StageRoles
from services.router.served_model import Model, read_model
from services.router.service import (
    CLIENT_AWAY_MS,
    _context_tokens,
    _listen,
    _origins,
    _Router,
    _stage_roles,
    http_url,
)
from tests.support.processes.tcp_resends import needs_the_options, resend_times
from tests.support.router.mesh_shapes import node, small_model


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


def test_what_lies_in_a_checkpoint_and_is_not_read_is_remarked(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    assert read_model(Settings(model=str(directory))).remarks == ()
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors["score.weight"] = torch.ones(1)
    save_file(tensors, directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")})
    )
    save_file({"stray": torch.ones(1)}, directory / "consolidated.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert read_model(Settings(model=str(directory))).remarks == (
        "beside the weights lie files that are not read: consolidated.safetensors",
        "tensors that the model does not have are not read: score.weight",
        "config.json: tie_word_embeddings is true, and lm_head.weight is stored: that tensor is used",
    )


def test_of_a_tensor_in_two_files_the_last_is_read_and_remarked_as_with_transformers(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    norm = "model.norm.weight"
    files = ("b.safetensors", "a.safetensors", "c.safetensors")
    for number, file in enumerate(files):
        some = {name: tensor for at, (name, tensor) in enumerate(sorted(tensors.items())) if at % 3 == number}
        save_file(
            some | {norm: torch.full_like(tensors[norm], number + 2)}, directory / file, metadata={"format": "pt"}
        )
    weight_map = {name: files[at % 3] for at, name in enumerate(sorted(tensors))} | {norm: "a.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.norm.weight
    assert CheckpointWeights(directory, torch.float32).tensor(norm, tuple(theirs.shape)).equal(theirs)
    assert theirs[0] == 4
    assert read_model(Settings(model=str(directory))).remarks == (
        f"tensors are stored in several files, and are read from the last: {norm}",
    )
    shard_checkpoint(str(directory), tmp_path / "parts", 2, 1, 1)
    assert (
        CheckpointWeights(tmp_path / "parts" / "stage-1", torch.float32).tensor(norm, tuple(theirs.shape)).equal(theirs)
    )


@pytest.mark.parametrize(
    ("max_context_tokens", "kv_cache_tokens", "rope", "context", "because"),
    [
        (0, 65536, None, 256, None),
        (128, 65536, None, 128, None),
        (512, 65536, None, 256, "MAX_CONTEXT_TOKENS=512 cannot be had, since the model is made for 256 tokens"),
        (512, 65536, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 512, None),
        (0, 65536, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, None),
        (250, 100, None, 96, "MAX_CONTEXT_TOKENS=250 cannot be had, since KV_CACHE_TOKENS=100 holds 96"),
        (0, 100, None, 96, "the model's context of 256 tokens cannot be had, since KV_CACHE_TOKENS=100 holds 96"),
    ],
)
def test_a_context_that_cannot_be_had_is_said(
    max_context_tokens: int,
    kv_cache_tokens: int,
    rope: dict[str, Any] | None,
    context: int,
    because: str | None,
    tmp_path: Path,
) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    config |= {"max_position_embeddings": 256, "rope_scaling": rope}
    (directory / "config.json").write_text(json.dumps(config))
    settings = Settings(model=str(directory), max_context_tokens=max_context_tokens, kv_cache_tokens=kv_cache_tokens)
    model = read_model(settings)
    with structlog.testing.capture_logs() as logs:
        assert _context_tokens(settings, model) == context
    assert [entry["context_tokens"] for entry in logs] == ([] if because is None else [context])
    assert because is None or logs[0]["detail"].startswith(because)


def roles_in(term: int, tmp_path: Path) -> StageRoles:
    """Of the router that has this term."""
    return _stage_roles(
        Settings(model="m", kv_cache_tokens=1024),
        Model(tmp_path, small_model(), "print", "float32", 512, "m"),
        NodeAddresses("tcp://router:1", "", ""),
        ("tcp://router:9",),
        term,
    )


def assign(roles: StageRoles) -> list[Tell]:
    """Two stages join; what they are told."""
    actions: list[Action] = [*roles.join(node("a"), 0.0), *roles.join(node("b"), 0.0), *roles.tick(10.0)]
    return [action for action in actions if isinstance(action, Tell) and isinstance(action.message, AssignStage)]


def report(roles: StageRoles, told: list[Tell]) -> list[Action]:
    """Both say that they are ready for what they were told."""
    answers: list[Action] = []
    for action in told:
        assert isinstance(action.message, AssignStage)
        ready = StageReady(action.message.pipeline, action.message.slot, action.message.lease_term)
        answers += roles.apply_ready(action.node_id, ready, action.header.generation)
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


@pytest.mark.parametrize(
    ("listens_at", "published_host", "is_loopback"),
    [
        ("127.0.0.1", "", True),
        ("0.0.0.0", "", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "[::1]", True),
        ("0.0.0.0", "0.0.0.0", False),
        ("0.0.0.0", "192.168.1.5", False),
    ],
)
def test_a_port_that_is_published_on_loopback_is_asked_by_its_names_wherever_the_router_listens(
    listens_at: str, published_host: str, is_loopback: bool
) -> None:
    settings = Settings(model="m", published_host=published_host)
    with socket.create_server((listens_at, 0)) as listener:
        origins = _origins(settings, listener)
    assert origins.is_loopback == is_loopback
    if is_loopback:
        # A web page whose own name was made to point to 127.0.0.1.
        with pytest.raises(ForbiddenError, match="ALLOWED_HOSTS"):
            origins.check({"host": "evil.example:8000", "origin": "http://evil.example:8000"})


def test_no_answer_waits_for_the_acknowledgement_of_what_went_before_it() -> None:
    async def main() -> None:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        listener = _listen(Settings(model="m", port=0))
        async with await asyncio.get_running_loop().create_server(Accepted, sock=listener):
            with socket.create_connection(listener.getsockname()[:2]):
                assert await accepted

    asyncio.run(asyncio.wait_for(main(), 10))


@needs_the_options
def test_a_token_that_is_lost_on_its_way_to_the_client_is_sent_again_soon_and_for_as_long_as_before() -> None:
    with (
        _listen(Settings(model="m", port=0)) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        accept_one(listener) as accepted,
    ):
        times = resend_times(accepted)
        assert times.are_soon, times
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == CLIENT_AWAY_MS


def accept_one(listener: socket.socket) -> socket.socket:
    listener.settimeout(5)
    return listener.accept()[0]


class _Restored:
    """Stands for a request that a router before this one has left."""


def test_what_was_restored_is_kept_by_nobody_but_who_goes_on_with_it() -> None:
    left: list[weakref.ref[_Restored]] = []

    async def nothing() -> None:
        return None

    requests = SimpleNamespace(
        restore=lambda journalled: left.extend(map(weakref.ref, journalled)), go_on=nothing, close=nothing
    )
    storage = SimpleNamespace(journalled=[_Restored(), _Restored()])
    router = _Router(storage, Mock(), Mock(), Mock(), requests, Mock(), Mock())  # type: ignore[arg-type]
    asyncio.run(router.run(Mock(return_value=True)))
    gc.collect()
    assert [request() for request in left] == [None, None]
