"""A stage that calls a node over a link which leads through the proxy: what the harness does to it costs no call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from chaos.faults.cut_in_call import CutInCall
from chaos.faults.frames import Frames
from chaos.faults.half_close import HalfClose
from chaos.proxy.link_proxy import LinkProxy
from chaos.proxy.zmtp_frames import Damage
from chaos.target import Node
from common.compute.native_library import NativeKernels
from services.stage.experts.client import CallDone
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, RingMesh, kernels

__all__ = ["kernels", "one_torch_thread"]
EXPERT = Node("expert", "expert", 1)


@pytest.fixture
def hurt(tmp_path: Path, kernels: NativeKernels) -> Iterator[tuple[RingMesh, Any]]:
    """A mesh of one node, and the target that it is to the harness."""
    ports: set[int] = set()
    with LinkProxy(lambda host, port: EXPERT.name if port in ports else "stage") as proxy:
        mesh = RingMesh(tmp_path, kernels, {"a": ALL}, linked=("a",), socks_proxy=proxy.address)
        try:
            ports.add(int(mesh.links["a"].endpoints[0].rpartition(":")[2]))
            mesh.open_rings()
            yield mesh, SimpleNamespace(proxy=proxy, features={"proxy"})
        finally:
            mesh.close()


def went_over_the_link(mesh: RingMesh, seed: int) -> bool:
    """Whether one call was answered over the link, with the right bits; else it has become one of messages."""
    call = mesh.call(8, seed=seed)
    mesh.start(call)
    until_s = time.monotonic() + 5
    while not mesh.ended:
        mesh.poll()
        if mesh.socket_messages()["a"]:
            mesh.client.abandon()
            mesh.ended.clear()
            return False
        assert time.monotonic() < until_s, "the call is neither answered nor asked in a message"
    done = mesh.ended.pop(0)
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, mesh.wanted(call))
    return True


def await_link(mesh: RingMesh) -> None:
    """Returns once a call goes over the link again: a node is in doubt for a while after one that was lost."""
    until_s = time.monotonic() + 8
    while not went_over_the_link(mesh, 99):
        assert time.monotonic() < until_s


@pytest.mark.parametrize("frame", ["question", "answer"])
def test_a_link_that_is_cut_in_a_call_costs_that_call_its_link_and_comes_back(
    hurt: tuple[RingMesh, Any], frame: str
) -> None:
    mesh, target = hurt
    fault = CutInCall.from_suite({"frame": frame, "every_s": 10.0})
    fault.apply(target, [EXPERT])
    assert fault.doubt == "no call went over a link meanwhile"
    assert not went_over_the_link(mesh, 1)
    await_link(mesh)
    fault.heal(target)
    fault.heal(target)
    assert (fault.remark, fault.doubt) == ("links cut in a call: 1", "")


def test_links_of_others_are_not_cut_and_healed_none_is(hurt: tuple[RingMesh, Any]) -> None:
    mesh, target = hurt
    others, healed = CutInCall.from_suite({"every_s": 0.0}), CutInCall.from_suite({"every_s": 0.0})
    others.apply(target, [Node("expert-7", "expert", 2)])
    healed.apply(target, [EXPERT])
    healed.heal(target)
    assert all(went_over_the_link(mesh, seed) for seed in range(10))
    others.heal(target)
    assert others.doubt == healed.doubt == "no call went over a link meanwhile"


@pytest.mark.parametrize("kind", get_args(Damage))
def test_frames_of_a_link_are_damaged_and_no_call_is_answered_wrongly(hurt: tuple[RingMesh, Any], kind: Damage) -> None:
    mesh, target = hurt
    fault = Frames(kind, percent=30, seed=3)
    fault.apply(target, [EXPERT])
    over_link = [went_over_the_link(mesh, seed) for seed in range(10)]
    fault.heal(target)
    assert any(over_link) or kind == "lose"
    assert all(over_link) == (kind == "replay")
    await_link(mesh)


def test_a_half_closed_link_is_given_up_at_once_and_comes_back(hurt: tuple[RingMesh, Any]) -> None:
    mesh, target = hurt
    HalfClose().apply(target, [EXPERT])
    await_link(mesh)
