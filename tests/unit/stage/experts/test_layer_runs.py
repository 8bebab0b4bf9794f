"""Runs from layer to layer through rings: the same bits as layer by layer, and they end where something is amiss."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.messages import Dispatch, ExpertRows
from common.wire.call_ring import SLOTS
from common.wire.tensor import tensor_to_frame
from services.expert.calls import check_call
from services.stage.experts.client import CallDone
from services.stage.model.decoder import DecoderLayer, ExpertCall, StageModel
from services.stage.model.layer_half.inputs import LayerInputs
from services.stage.model.layer_half.native import NativeHalf, layer_half
from services.stage.model.layer_half.run import LayerRun, RunLayers
from services.stage.model.paged_attention import LayerKvCache
from tests.support.nodes.answered_calls import answer_calls
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, CHOICES, EXPERTS, WIDTH, IdleThread, RingMesh, kernels
from tests.unit.stage.model.test_layer_half import Shape, batch_of, filled_cache, parts_of, table_of

__all__ = ["kernels", "one_torch_thread"]
SHAPE = Shape("as the rings' nodes", width=WIDTH, num_experts=EXPERTS)
INDICES = (0, 1, 0, 1, 1)
"""Of the layers: their experts are those of the nodes' two."""
ENOUGH_S = 60.0
SPLIT = 3
HALVES = {"a": tuple(range(SPLIT)), "b": tuple(range(SPLIT, EXPERTS))}


@dataclass
class Pass:
    """One forward pass through the layers, and what it took."""

    output: Tensor
    caches: list[LayerKvCache]
    calls: list[int] = field(default_factory=list)
    """The layer of each call that the interpreter made."""
    seconds: float = 0.0
    """How long it took."""
    moved: int = 0
    """How many layers the first call was taken further."""
    experts: list[list[int]] = field(default_factory=list)
    """Those of the first token, of each of these calls."""


class Layers:
    """A stage's layers in front of expert nodes."""

    def __init__(self, mesh: RingMesh, kernels: NativeKernels, *, dense_at: int | None = None) -> None:
        self.mesh = mesh
        self.model = StageModel(
            tuple(
                DecoderLayer(
                    index,
                    layer_half(self._parts(place, kernels), kernels),
                    (lambda x: x * 2) if place == dense_at else None,
                )
                for place, index in enumerate(INDICES)
            ),
            table_of(SHAPE, mesh.dtype),
            embedding=None,
            final_norm=None,
            lm_head=None,
        )
        assert all(isinstance(layer.half, NativeHalf) for layer in self.model.layers)

    def _parts(self, place: int, kernels: NativeKernels):  # type: ignore[no-untyped-def]
        parts = parts_of(replace(SHAPE, name=f"layer {place}"), self.mesh.dtype, kernels)
        assert parts.gate is not None
        choice = replace(parts.gate.choice, num_experts_per_token=CHOICES)
        return replace(parts, gate=replace(parts.gate, choice=choice))

    def through(
        self,
        num_tokens: int,
        *,
        runs: bool,
        seconds: float = ENOUGH_S,
        seed: int = 11,
        when_waiting: Callable[[], None] = lambda: None,
    ) -> Pass:
        """`seconds`: how long a run may begin layers. `when_waiting` is called as long as an answer does not come."""
        batch = batch_of(((40, num_tokens),) if num_tokens > 1 else ((200, 1),))
        generator = torch.Generator().manual_seed(seed)
        batch.hidden = torch.randn((num_tokens, WIDTH), generator=generator).to(self.mesh.dtype)
        caches = [filled_cache(SHAPE, 1, self.mesh.dtype) for _ in INDICES]
        forward = self.model.forward(batch, caches, self.model.run_layers(caches) if runs else None)
        result = Pass(torch.empty(0), caches)
        answer, began_s = None, time.monotonic()
        with torch.inference_mode():
            while True:
                try:
                    call = forward.send(answer)
                except StopIteration as stop:
                    result.output, result.seconds = stop.value, time.monotonic() - began_s
                    return result
                assert isinstance(call, ExpertCall)
                result.calls.append(call.layer)
                result.experts.append(call.experts[0].tolist())
                number = self.mesh.start(call)
                done = self.mesh.client.await_answer(number, time.monotonic, time.monotonic() + seconds)
                if len(result.calls) == 1 and call.run is not None:
                    result.moved = call.run.place
                answer = self._finish(when_waiting) if done is None else done.answer

    def _finish(self, when_waiting: Callable[[], None]) -> Tensor:
        until_s = time.monotonic() + 10
        while not self.mesh.ended and time.monotonic() < until_s:
            when_waiting()
            self.mesh.poll()
        done = self.mesh.ended.pop(0)
        assert isinstance(done, CallDone), done
        return done.answer

    def alone(self, seed: int) -> list[list[int]]:
        """The experts of a token by layer, with answers of all experts in this process."""
        batch = batch_of(((200, 1),))
        generator = torch.Generator().manual_seed(seed)
        batch.hidden = torch.randn((1, WIDTH), generator=generator).to(self.mesh.dtype)
        caches = [filled_cache(SHAPE, 1, self.mesh.dtype) for _ in INDICES]
        forward = self.model.forward(batch, caches)
        asked: list[list[int]] = []
        answer = None
        with torch.inference_mode():
            while True:
                try:
                    call = forward.send(answer)
                except StopIteration:
                    return asked
                assert isinstance(call, ExpertCall)
                asked.append(call.experts[0].tolist())
                answer = self.mesh.wanted(call)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer that is on its way does not come within 2 ms."""
    monkeypatch.setattr("services.stage.experts.client.SOON_S", 0.2)


Meshes = Callable[..., RingMesh]


@pytest.fixture
def meshes(tmp_path: Path, kernels: NativeKernels) -> Iterator[Meshes]:
    made: list[RingMesh] = []

    def make(
        holdings: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        num_slices: int = 1,
        idle: str = "",
        linked: str = "",
    ) -> RingMesh:
        mesh = RingMesh(tmp_path, kernels, holdings, dtype, num_slices, idle.split(), linked.split())
        made.append(mesh)
        mesh.open_rings()
        return mesh

    yield make
    for mesh in made:
        mesh.close()


def same(first: Pass, second: Pass) -> bool:
    caches = zip(first.caches, second.caches, strict=True)
    return torch.equal(first.output, second.output) and all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in caches
    )


def messages_of(mesh: RingMesh) -> list[Dispatch]:
    return [message for sent in mesh.socket_messages().values() for message in sent if isinstance(message, Dispatch)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("linked", ["", "a", "a b"])
def test_a_run_through_all_layers_has_the_bits_of_one_layer_at_a_time(
    meshes: Meshes, kernels: NativeKernels, dtype: torch.dtype, num_slices: int, num_tokens: int, linked: str
) -> None:
    mesh = meshes({"a": (0, 1, 2, 3), "b": (2, 3, 4, 5)}, dtype, num_slices, linked=linked)
    layers = Layers(mesh, kernels)
    one_by_one, run = layers.through(num_tokens, runs=False), layers.through(num_tokens, runs=True)
    assert one_by_one.calls == list(INDICES)
    assert len(run.calls) < len(INDICES), "the interpreter is not asked at each layer"
    assert same(one_by_one, run)
    assert not messages_of(mesh)
    assert mesh.client.counters.calls == 2 * len(INDICES)
    assert 0 < mesh.client.busy_seconds < run.seconds
    assert not mesh.client._in_rings
    assert all(peer.owed_rows == 0 for peer in mesh.rings._peers_now().table)  # type: ignore[union-attr]


@pytest.mark.parametrize("linked", ["", "a b"])
@pytest.mark.parametrize("idle", ["", "b"])
def test_calls_in_pieces_run_from_layer_to_layer_too(
    meshes: Meshes, kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch, idle: str, linked: str
) -> None:
    monkeypatch.setattr("common.wire.call_ring.MAX_ROWS", 4)
    mesh = meshes(HALVES, idle=idle, linked=linked)
    layers = Layers(mesh, kernels)
    number = mesh.rings._last_number
    run = layers.through(17, runs=True, when_waiting=lambda: mesh.wake("b") if idle else None)
    assert mesh.rings._last_number - number >= len(INDICES) * 5 * len(HALVES), "each piece has a number of its own"
    assert len(run.calls) < len(INDICES)
    assert same(layers.through(17, runs=False), run)


def test_rings_keep_nothing_of_a_run_that_is_over(meshes: Meshes, kernels: NativeKernels) -> None:
    run = Layers(meshes({"a": ALL}), kernels).through(3, runs=True)
    keys = [weakref.ref(cache.keys) for cache in run.caches]
    del run
    gc.collect()
    assert not any(reference() is not None for reference in keys)


def test_a_call_that_was_asked_of_other_nodes_than_there_are_now_is_not_run_on(
    meshes: Meshes, kernels: NativeKernels
) -> None:
    mesh = meshes({"a": ALL, "b": ALL})
    call = mesh.call(1)
    number = mesh.start(call)
    asked = mesh.client._in_rings[number]
    asked.call = replace(
        call, run=LayerRun(RunLayers([], []), LayerInputs(batch_of(((0, 1),)), table_of(SHAPE, mesh.dtype)))
    )
    assert mesh.rings.can_run(asked)
    mesh.client.nodes.num_changes += 1
    assert not mesh.rings.can_run(asked)


def test_a_run_whose_time_is_up_hands_the_answer_back(meshes: Meshes, kernels: NativeKernels) -> None:
    layers = Layers(meshes({"a": ALL}), kernels)
    one_by_one, run = layers.through(3, runs=False), layers.through(3, runs=True, seconds=0.0)
    assert run.calls == list(INDICES)
    assert same(one_by_one, run)


def test_a_run_ends_before_a_layer_of_another_kind(meshes: Meshes, kernels: NativeKernels) -> None:
    layers = Layers(meshes({"a": ALL}), kernels, dense_at=2)
    one_by_one, run = layers.through(3, runs=False), layers.through(3, runs=True)
    assert run.calls[0] == INDICES[0]
    assert INDICES[3] in run.calls[1:], "the layer after the dense one is the interpreter's"
    assert same(one_by_one, run)


@pytest.mark.parametrize("linked", ["", "b"])
def test_an_answer_that_does_not_come_soon_ends_a_run_and_is_used_when_it_comes(
    meshes: Meshes, kernels: NativeKernels, linked: str
) -> None:
    mesh = meshes(HALVES, idle="b", linked=linked)
    layers = Layers(mesh, kernels)
    number, tokens = stops_later(layers)

    run = layers.through(1, runs=True, seed=tokens, when_waiting=lambda: mesh.wake("b"))
    assert run.calls[0] == INDICES[0]
    assert run.moved == number, "it came as far as the first layer that asks b"
    assert same(layers.through(1, runs=False, seed=tokens), run)
    assert not messages_of(mesh)


def test_a_call_for_which_there_is_no_slot_in_the_middle_of_a_run_goes_as_messages(
    meshes: Meshes, kernels: NativeKernels
) -> None:
    mesh = meshes(HALVES, idle="b")
    layers = Layers(mesh, kernels)
    number, tokens = stops_later(layers)
    for index in range(SLOTS):
        mesh.slot("b", index).take()
    run = layers.through(1, runs=True, seed=tokens, when_waiting=lambda: answer_messages(mesh))
    assert run.moved == number
    assert mesh.client.counters.resent == 0, "it was not asked before"
    assert same(layers.through(1, runs=False, seed=tokens, when_waiting=lambda: answer_messages(mesh)), run)


def test_an_answer_that_is_damaged_in_the_middle_of_a_run_is_asked_for_again(
    meshes: Meshes, kernels: NativeKernels
) -> None:
    mesh = meshes(HALVES, idle="b")
    layers = Layers(mesh, kernels)
    number, tokens = stops_later(layers)

    def spoil() -> None:
        thread = mesh.thread("b")
        if isinstance(thread, IdleThread) and thread.awake is None:
            mesh.slot("b").spoil_rows()
            mesh.wake("b")
        answer_messages(mesh)

    run = layers.through(1, runs=True, seed=tokens, when_waiting=spoil)
    assert run.moved == number
    assert mesh.client.counters.resent == 1
    assert same(layers.through(1, runs=False, seed=tokens), run)


def stops_later(layers: Layers) -> tuple[int, int]:
    """The place of the first layer that asks node b, which is not the first one, and the seed of tokens that do so."""
    for seed in range(1000):
        asked = layers.alone(seed)
        place = next((place for place, experts in enumerate(asked) if max(experts) >= SPLIT), 0)
        if place > 0:
            return place, seed
    raise AssertionError("no such token")


def answer_messages(mesh: RingMesh) -> None:
    """Lets nodes answer what they were sent as messages."""
    for name, store in mesh.stores.items():
        socket = mesh.socket(name)
        for message, header in socket.take_sent():
            if isinstance(message, Dispatch):
                waiting = check_call(b"s", message, header, 0.0, store)
                (rows,) = answer_calls([waiting], store)
                socket.say(ExpertRows(message.call, tensor_to_frame(rows)))
