"""Nodes whose pulse is gone though their connections stand, and connections that nobody listens for any more."""

from __future__ import annotations

import pytest

from common.ids import NodeId
from common.messages import Failed, StageHeartbeat
from common.wire.transport import LinkEvent
from services.router.control.membership import NodeState
from tests.support.router.fake_mesh import FakeMesh, build_request, kinds, reference_tokens, said_to
from tests.support.router.mesh_shapes import node


def mirrored_mesh() -> FakeMesh:
    """Slots of `a` and `b` with complete mirrors, and links that have answered for a while."""
    mesh = FakeMesh(spares=2)
    mesh.mirrors_fill = True
    mesh.start("abcd")
    run(mesh, 3.0)
    assert mesh.loop.status.redundancy.complete_mirrors == 2
    return mesh


def run(mesh: FakeMesh, seconds: float) -> None:
    """Turns of 10 ms. Who is mute answers no steps, and nor does the pipeline that it is part of."""
    for _ in range(int(seconds / 0.01)):
        if not any(mesh.client.mute & set(filter(None, p.holders)) for p in mesh.stages.pipelines.values()):
            mesh.answer()
        mesh.turn(0.01)


def run_without_pulses(mesh: FakeMesh, seconds: float) -> None:
    """Turns of 10 ms in which those who are mute on the pulse socket answer steps all the same."""
    for _ in range(int(seconds / 0.01)):
        mesh.answer()
        mesh.turn(0.01)


def is_alive(mesh: FakeMesh, name: str) -> bool:
    return mesh.membership.state_of(NodeId(name)) is not NodeState.DEAD


def test_the_mirror_of_a_holder_without_a_pulse_goes_on_within_two_fifths_of_a_second() -> None:
    mesh = mirrored_mesh()
    request = build_request("r", max_tokens=200)
    mesh.loop.submit(request)
    run(mesh, 0.5)
    holder = mesh.client.pipelines[next(iter(mesh.client.pipelines))].first_stage
    mesh.client.mute.add(holder)
    run(mesh, 0.1)
    assert is_alive(mesh, holder)
    run(mesh, 0.3)
    assert not is_alive(mesh, holder)
    run(mesh, 3.0)
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_holder_that_answers_steps_lives_whatever_becomes_of_its_pulse() -> None:
    mesh = mirrored_mesh()
    mesh.loop.submit(build_request("r", max_tokens=500))
    run(mesh, 0.5)
    mesh.client.mute.add("a")
    run_without_pulses(mesh, 2.0)
    assert is_alive(mesh, "a")
    run(mesh, 0.2)
    assert is_alive(mesh, "a")
    run(mesh, 0.15)
    assert not is_alive(mesh, "a"), "a quarter of a second after the last step that it had a part in"


def test_a_holder_that_was_taken_for_dead_by_its_pulse_is_told_so_when_it_speaks() -> None:
    mesh = mirrored_mesh()
    mesh.client.mute.add("a")
    run(mesh, 0.5)
    mesh.say("a", StageHeartbeat())
    assert Failed in kinds(said_to("a", mesh.turn()))


def test_without_a_complete_mirror_a_node_is_given_longer() -> None:
    mesh = FakeMesh(spares=1)
    mesh.start("abc", experts="xy")
    run(mesh, 3.0)
    mesh.client.mute |= {"a", "x"}
    run(mesh, 0.6)
    assert all(is_alive(mesh, name) for name in "abcxy")
    run(mesh, 0.4)
    assert {name for name in "abcxy" if not is_alive(mesh, name)} == {"a", "x"}


def test_a_holder_is_given_longer_while_its_mirror_is_silent_too() -> None:
    mesh = mirrored_mesh()
    mesh.client.mute |= {"a", "b", "c", "d"}
    run(mesh, 0.6)
    assert all(is_alive(mesh, name) for name in "abcd"), "it may be their host, and there is nobody to take over"


def test_a_router_that_hears_nobody_takes_nobody_for_dead_and_goes_on_with_them_when_it_does_again() -> None:
    mesh = mirrored_mesh()
    mesh.loop.submit(build_request("r", max_tokens=900))
    run(mesh, 0.5)
    mesh.beat()
    mesh.client.mute |= set("abcdx")
    run(mesh, 3.5)
    mesh.client.events += [(NodeId(name), LinkEvent.CLOSED) for name in "abcdx"]  # ZeroMQ has lost patience, too
    run(mesh, 4.0)
    mesh.beat()
    mesh.client.mute -= set("abx")
    mesh.client.events += [(NodeId(name), LinkEvent.CONNECTED) for name in "abx"]
    run(mesh, 1.2)  # the others are back only now
    mesh.client.mute.clear()
    mesh.client.events += [(NodeId(name), LinkEvent.CONNECTED) for name in "cd"]
    run(mesh, 4.0)
    assert all(is_alive(mesh, name) for name in "abcdx")
    (pipeline,) = mesh.stages.pipelines.values()
    assert pipeline.holders == (NodeId("a"), NodeId("b")), "nobody's cache was given up"


@pytest.mark.parametrize("stopped_s", [4.0, 90.0])
def test_a_router_that_was_stopped_takes_nobody_for_dead_when_it_goes_on(stopped_s: float) -> None:
    mesh = mirrored_mesh()
    mesh.loop.submit(build_request("r", max_tokens=900))
    run(mesh, 0.5)
    mesh.beat()
    mesh.turn(0.01)
    mesh.client.events += [(NodeId(name), LinkEvent.CLOSED) for name in "abcdx"]  # for the router was silent
    mesh.client.mute |= set("abcdx")
    mesh.turn(stopped_s)
    run(mesh, 0.4)  # on a busy machine, or over a slow network, connections take so long
    mesh.client.mute.clear()
    mesh.client.events += [(NodeId(name), LinkEvent.CONNECTED) for name in "abcdx"]
    run(mesh, 0.5)
    mesh.beat()
    run(mesh, 3.0)
    assert all(is_alive(mesh, name) for name in "abcdx")
    mesh.client.mute.add("a")
    run(mesh, 0.4)
    assert not is_alive(mesh, "a"), "and it judges as before"


def test_who_ends_while_the_router_is_stopped_is_lost_soon_after_it_goes_on() -> None:
    mesh = mirrored_mesh()
    mesh.client.events += [(NodeId("a"), LinkEvent.CLOSED)]
    mesh.client.mute.add("a")
    mesh.turn(5.0)
    run(mesh, 3.5)
    assert [name for name in "abcdx" if not is_alive(mesh, name)] == ["a"]


def test_the_mirrors_of_two_silent_holders_take_over_together() -> None:
    mesh = mirrored_mesh()
    mesh.client.mute |= {"a", "b"}
    run(mesh, 0.4)
    (pipeline,) = mesh.stages.pipelines.values()
    assert (set(pipeline.holders), pipeline.is_open) == ({"c", "d"}, True)


def test_a_node_that_refuses_connections_is_lost_in_the_same_turn() -> None:
    mesh = mirrored_mesh()
    mesh.client.events.append((NodeId("a"), LinkEvent.REFUSED))
    mesh.turn()
    assert not is_alive(mesh, "a")


def test_a_lifeline_that_opens_again_in_time_changes_nothing() -> None:
    mesh = mirrored_mesh()
    for event in (LinkEvent.CLOSED, LinkEvent.CONNECTED):
        mesh.client.events.append((node("a").node_id, event))
        mesh.turn(0.01)
    mesh.beat()
    mesh.turn(1.0)
    assert is_alive(mesh, "a")
