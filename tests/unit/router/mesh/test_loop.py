"""The mesh thread's decisions: who is taken in, when pipelines open and close, and what becomes of requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.ids import NodeId, PipelineId, RequestId
from common.messages import (
    AssignShards,
    AssignStage,
    ExpertHeartbeat,
    Failed,
    Header,
    Leave,
    LeaveAcknowledged,
    PublishPlacement,
    StageHeartbeat,
    StageReady,
    Step,
    TensorFrame,
    Unassign,
    Welcome,
)
from common.topology import NodeKind
from common.wire.array import array_to_frame
from services.router.control.experts.expert_roles import DRAIN_QUIET_S
from services.router.control.retelling import RETRY_S
from services.router.engine import FinishReason, Token
from tests.support.router.expert_shards import all_loaded
from tests.support.router.fake_mesh import (
    WELCOME,
    FakeMesh,
    build_request,
    hello_of,
    kinds,
    ready_mesh,
    reference_tokens,
    said_to,
)
from tests.support.router.mesh_shapes import EXPERTS, LAYERS, node
from tests.support.router.scheduling import is_idle

IDLE = StageHeartbeat()
FIRST = PipelineId(0)


@pytest.fixture
def mesh() -> FakeMesh:
    return ready_mesh()


def test_a_node_is_welcomed_before_it_is_told_anything_else() -> None:
    mesh = FakeMesh()
    mesh.hello("x", NodeKind.EXPERT)
    assert kinds(said_to("x", mesh.turn())) == [Welcome, AssignShards]
    mesh.hello("a")
    mesh.turn()
    mesh.hello("b")
    sent = said_to("b", mesh.turn())
    assert sent[0] == WELCOME
    assert mesh.client.lifelines == {"x", "a", "b"}


def test_however_many_requests_one_client_brings_nodes_are_heard_and_steps_go_out_between_them(mesh: FakeMesh) -> None:
    """Each look at the clock takes half a millisecond here."""

    def clock() -> float:
        mesh.now_s += 0.0005
        return mesh.now_s

    mesh.loop._clock = clock
    for number in range(20):
        mesh.loop.submit(build_request(f"r{number}"))
    for turn in range(1, 4):
        mesh.beat()
        mesh.turn()
        num_taken = 20 - len(mesh.loop._commands)
        assert 3 * turn <= num_taken <= 5 * turn
        assert len(mesh.client.inbox) < 3, "of three heartbeats one at least is taken each time"
        mesh.client.inbox.clear()
        assert mesh.client.waited_ms == 0, "there is more to do"
    restored = [build_request(f"old{number}").restored([]) for number in range(20)]
    mesh.loop._commands.extendleft(restored)
    mesh.turn()
    assert len(mesh.loop._commands) < 20, "who is not in line gets no cache of stages that are back"


def test_a_stage_knows_the_placement_before_it_has_a_role() -> None:
    mesh = FakeMesh()
    mesh.hello("x", NodeKind.EXPERT)
    mesh.turn()
    mesh.hello("a")
    mesh.hello("b")
    sent = mesh.turn()
    for name in "ab":
        told = kinds(said_to(name, sent))
        assert told.index(PublishPlacement) < told.index(AssignStage)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"fingerprint": "other"}, "checkpoint_error"),
        ({"node_kind": "router"}, "protocol_error"),
        ({"node_id": "z"}, "protocol_error"),
    ],
    ids=str,
)
def test_a_node_that_does_not_belong_here_is_refused_by_what_is_wrong(changes: dict[str, str], code: str) -> None:
    mesh = FakeMesh()
    mesh.say("a", replace(hello_of(node("a")), **changes))  # type: ignore[arg-type]
    (refusal,) = said_to("a", mesh.turn())
    assert isinstance(refusal, Failed)
    assert refusal.code == code
    mesh.turn(1.0)
    assert mesh.loop.status.nodes == ()


@pytest.mark.parametrize("kind", list(NodeKind))
def test_a_node_that_cannot_be_reached_is_refused_and_the_router_goes_on(mesh: FakeMesh, kind: NodeKind) -> None:
    mesh.client.unreachable = {"far"}
    for _ in range(3):  # it is started again and again
        mesh.hello("far", kind)
        (refusal,) = said_to("far", mesh.turn(0.2))
        assert isinstance(refusal, Failed)
        assert refusal.code == "configuration_error"
        mesh.beat()
        mesh.turn(0.2)
    assert mesh.loop.status.readiness.ready
    assert {status.description.node_id for status in mesh.loop.status.nodes} == {"a", "b", "x"}
    assert mesh.client.lifelines == {"a", "b", "x"}
    mesh.client.unreachable.clear()
    mesh.hello("far", kind)
    assert kinds(said_to("far", mesh.turn(0.2)))[0] is Welcome, "nothing is held against it"


def test_readiness_tells_step_by_step_what_is_missing() -> None:
    mesh = FakeMesh()
    assert mesh.loop.status.readiness.detail == "no node has registered yet"
    mesh.turn(1.0)
    assert mesh.loop.status.readiness.detail == "0 of 1 expert nodes; no pipeline is open (0 of 2 stage nodes)"
    mesh.hello("x", NodeKind.EXPERT)
    mesh.turn(1.0)
    missing = ("0 of 12 expert shards loaded", "no pipeline is open (0 of 2 stage nodes)")
    assert mesh.loop.status.readiness.missing == missing
    mesh.turn(1.0)
    assert mesh.loop.status.readiness.detail == "no pipeline is open (0 of 2 stage nodes)"
    mesh.hello("a")
    mesh.hello("b")
    mesh.beat()
    mesh.turn(1.0)
    mesh.beat()
    mesh.turn(1.0)
    assert mesh.loop.status.readiness.detail == "pipeline 0: nothing has come through its links yet"
    mesh.answer()
    mesh.turn(1.0)
    assert mesh.loop.status.readiness.ready
    assert mesh.loop.status.readiness.detail == "1 pipelines; 12 of 12 expert shards loaded"
    assert mesh.loop.status.served_s == mesh.now_s


def test_a_request_gets_its_tokens_and_its_end(mesh: FakeMesh) -> None:
    request = build_request("r", prompt_length=300, max_tokens=5)
    mesh.loop.submit(request)
    mesh.settle()
    assert mesh.tokens("r") == reference_tokens(request)
    last = mesh.outcomes["r"][-1]
    assert isinstance(last, Token)
    assert last.finish_reason is FinishReason.LENGTH
    assert is_idle(mesh.scheduler)


def test_a_request_that_cannot_be_taken_is_refused_at_once(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r", prompt_length=1, max_tokens=10**9))
    mesh.loop.submit(replace(build_request("empty"), prompt_token_ids=()))
    mesh.turn()
    for name in ("r", "empty"):
        assert len(mesh.errors(name)) == 1
        assert mesh.errors(name)[0].http_status in (400, 429), mesh.errors(name)


def test_a_restored_choice_with_nothing_left_to_make_is_refused_and_the_router_goes_on(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r", max_tokens=4).restored([1, 2, 3, 4]))
    mesh.turn()
    (error,) = mesh.errors("r")
    assert "was finished" in error.message


def test_a_cancelled_request_gets_nothing_more(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r", max_tokens=50))
    mesh.settle(4)
    mesh.loop.cancel(RequestId("r"))
    mesh.turn()
    count = len(mesh.tokens("r"))
    assert 0 < count < 50
    mesh.settle()
    assert len(mesh.tokens("r")) == count
    assert mesh.errors("r") == []
    assert is_idle(mesh.scheduler)


def test_a_spare_takes_a_lost_stages_slot_and_no_token_is_lost_or_doubled() -> None:
    mesh = FakeMesh(spares=1)
    mesh.start("abc")
    request = build_request("r", max_tokens=30)
    mesh.loop.submit(request)
    mesh.settle(3)
    assert 0 < len(mesh.tokens("r")) < 30
    mesh.lose("a")
    mesh.turn(0.01)
    assert mesh.client.pipelines, "a lifeline may open again for a moment"
    mesh.turn(0.1)
    assert not mesh.client.pipelines
    mesh.settle(40)
    assert mesh.tokens("r") == reference_tokens(request)
    assert mesh.loop.status.readiness.ready


def test_without_a_spare_requests_wait_for_a_new_node(mesh: FakeMesh) -> None:
    request = build_request("r", max_tokens=20)
    mesh.loop.submit(request)
    mesh.settle(3)
    mesh.lose("b")
    mesh.settle(5)
    assert not mesh.loop.status.readiness.ready
    count = len(mesh.tokens("r"))
    mesh.hello("c")
    mesh.settle(30)
    assert mesh.tokens("r") == reference_tokens(request)
    assert count < 20


def test_a_silent_node_is_taken_for_dead_after_its_time_and_told_so_when_it_speaks(mesh: FakeMesh) -> None:
    for _ in range(11):
        mesh.say("a", IDLE)
        mesh.say("x", ExpertHeartbeat())
        mesh.turn(1.0)
    assert {status.description.node_id for status in mesh.loop.status.nodes} == {"a", "x"}
    mesh.say("b", IDLE)
    (refusal,) = said_to("b", mesh.turn())
    assert isinstance(refusal, Failed)
    assert "another incarnation" in refusal.message
    mesh.say("b", hello_of(node("b")))
    assert kinds(said_to("b", mesh.turn())) == [Failed], "a dead incarnation stays dead"
    assert "b" not in mesh.client.lifelines


@pytest.mark.parametrize(("name", "kind"), [("b", NodeKind.STAGE), ("x", NodeKind.EXPERT)])
def test_a_node_that_is_found_dead_by_its_own_hello_is_lost_to_all_roles(
    mesh: FakeMesh, name: str, kind: NodeKind
) -> None:
    description = mesh.alive[name]
    mesh.lose(name)
    mesh.turn()
    mesh.say(name, hello_of(description))
    (refusal,) = said_to(name, mesh.turn(0.06))
    assert isinstance(refusal, Failed)
    assert "lifeline_closed" in refusal.message
    mesh.turn(1.0)
    assert name not in [one.description.node_id for one in mesh.loop.status.nodes]
    assert NodeId(name) not in mesh.experts.ready
    assert all(NodeId(name) not in pipeline.holders for pipeline in mesh.stages.pipelines.values())


def test_what_a_stranger_says_is_not_answered(mesh: FakeMesh) -> None:
    mesh.say("nobody", IDLE)
    mesh.say("nobody", StageReady(0, 0, 1))
    assert said_to("nobody", mesh.turn()) == []


def test_a_node_that_leaves_is_let_go_after_the_stages_know() -> None:
    mesh = FakeMesh()
    mesh.start(experts="xy")
    mesh.say("x", Leave("stopped"))
    order = [(to, type(message)) for seconds in (0.0, DRAIN_QUIET_S) for to, message, _ in mesh.turn(seconds)]
    assert order.index(("a", PublishPlacement)) < order.index(("x", LeaveAcknowledged))
    assert order.index(("b", PublishPlacement)) < order.index(("x", LeaveAcknowledged))
    mesh.say("x", ExpertHeartbeat())
    assert kinds(said_to("x", mesh.turn())) == [LeaveAcknowledged], "it was not heard, or this was under way: no life"
    assert mesh.loop.status.readiness.ready


def test_socket_files_of_nodes_that_are_gone_are_removed_however_they_went(mesh: FakeMesh) -> None:
    mesh.hello("y", NodeKind.EXPERT)
    mesh.settle()
    assert mesh.client.cleaned_up == []
    mesh.say("x", Leave("stopped"))
    mesh.settle()
    assert mesh.client.cleaned_up == ["x"]
    mesh.lose("b")
    mesh.turn(0.0)
    mesh.turn(1.0)
    assert mesh.client.cleaned_up == ["x", "b"]


def test_a_node_that_cannot_take_its_role_is_asked_again_later() -> None:
    mesh = FakeMesh()
    mesh.unready = {"b"}
    mesh.start()
    mesh.say(
        "b",
        Failed("checkpoint_error", "tensor x is missing"),
        Header(generation=mesh.stages.pipelines[FIRST].generation),
    )
    mesh.turn(0.2)
    assert "b: tensor x is missing" in mesh.loop.status.readiness.detail
    mesh.unready.clear()
    mesh.beat()
    mesh.turn(0.9 * RETRY_S)
    assert not mesh.loop.status.readiness.ready
    mesh.beat()
    mesh.turn(0.2 * RETRY_S)
    mesh.settle(3)
    assert mesh.loop.status.readiness.ready


def test_a_refusal_that_was_overtaken_by_a_new_holder_disturbs_nobody() -> None:
    mesh = FakeMesh(spares=1)
    mesh.unready = {"b"}
    mesh.start("abc")
    mesh.say("b", Failed("checkpoint_error", "?"), Header(generation=mesh.stages.pipelines[FIRST].generation))
    mesh.turn(0.1)
    mesh.lose("b")
    mesh.settle(4)
    assert mesh.loop.status.readiness.ready
    generation = mesh.stages.pipelines[FIRST].generation
    for _ in range(8):
        mesh.beat()
        mesh.answer()
        mesh.turn(1.0)
    assert mesh.stages.pipelines[FIRST].generation == generation


@pytest.mark.parametrize(
    "frame",
    [
        TensorFrame("uint8", (0,), b""),
        TensorFrame("uint8", (LAYERS, EXPERTS, 2), bytes(LAYERS * EXPERTS * 2)),
        array_to_frame(np.ones((LAYERS, EXPERTS, 1), dtype=np.int32)),
    ],
)
def test_a_report_of_another_shape_is_refused_and_changes_nothing(mesh: FakeMesh, frame: TensorFrame) -> None:
    good = all_loaded(AssignShards(1, array_to_frame(np.ones((LAYERS, EXPERTS, 1), dtype=np.uint8))))
    mesh.say("x", replace(good, shards=frame))
    (refusal,) = said_to("x", mesh.turn(0.2))
    assert isinstance(refusal, Failed)
    assert refusal.code == "protocol_error"
    assert mesh.loop.status.readiness.ready


@pytest.mark.parametrize(("name", "heartbeat"), [("x", StageHeartbeat(placement_version=9)), ("a", ExpertHeartbeat())])
def test_a_heartbeat_of_another_kind_of_node_is_refused_and_believed_by_nobody(
    mesh: FakeMesh, name: str, heartbeat: StageHeartbeat | ExpertHeartbeat
) -> None:
    for _ in range(3):
        mesh.say(name, heartbeat)
        (refusal,) = said_to(name, mesh.turn(0.5))
        assert isinstance(refusal, Failed)
        assert refusal.code == "protocol_error"
    assert mesh.loop.status.readiness.ready


def test_a_message_that_no_node_sends_is_refused(mesh: FakeMesh) -> None:
    empty = TensorFrame("int32", (0,), b"")
    for message in (Unassign(1), Step(empty, empty, empty, empty, empty, empty)):
        mesh.say("a", message)
        (refusal,) = said_to("a", mesh.turn())
        assert isinstance(refusal, Failed)


def test_losing_an_expert_tells_the_stages_and_its_copies_serve_on() -> None:
    mesh = FakeMesh()
    mesh.start(experts="xy")
    mesh.lose("x")
    mesh.turn(0.01)
    sent = mesh.turn(0.1)
    (placement,) = [m for m in said_to("a", sent) if isinstance(m, PublishPlacement)]
    assert placement.node_ids == ("y",)
    assert mesh.loop.status.readiness.ready
    assert mesh.loop.status.redundancy.missing_copies == LAYERS * EXPERTS


def test_status_counts_what_dead_nodes_had_counted(mesh: FakeMesh) -> None:
    mesh.say("a", StageHeartbeat(1.0, 3, 5, dropped=7, calls=4, call_seconds=0.25, call_bytes=50, resent=2))
    mesh.turn(0.2)
    before = mesh.loop.status.hops
    assert (before.calls, before.call_bytes, before.resent, before.dropped) == (4, 50, 2, 7)
    mesh.lose("a")
    mesh.turn(0.2)
    mesh.turn(0.2)
    assert mesh.loop.status.hops == before


def test_experts_whose_lifelines_closed_leave_nothing_served() -> None:
    mesh = FakeMesh(copies=2)
    mesh.start(experts="xy")
    mesh.lose("x")
    mesh.beat()
    mesh.turn(0.11)
    assert mesh.loop.status.readiness.ready, "a copy lives"
    mesh.lose("y")
    mesh.turn(0.11)
    assert not mesh.loop.status.readiness.ready
