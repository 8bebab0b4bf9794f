"""The mesh thread under any order of events: no request is lost, doubled or changed."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.ids import NodeId, RequestId
from common.messages import Failed, Leave
from common.topology import NodeKind
from common.wire.transport import LinkEvent
from tests.support.router.erring_drafter import ErringDrafter
from tests.support.router.fake_mesh import FakeMesh, build_request, hello_of, reference_tokens
from tests.support.router.scheduling import is_idle


class Mesh(RuleBasedStateMachine):
    """Nodes come and go, steps fail and dawdle; every request gets its very tokens, or one error."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[RequestId, list[int]] = {}
        self.mesh = FakeMesh(spares=1, plans_ahead=True, drafter=ErringDrafter(self.expected, 3))
        self.requests: dict[str, Any] = {}
        self.cancelled: set[str] = set()
        self.starts = 0
        for name in ("stage0", "stage1"):
            self.mesh.hello(name)
        self.mesh.hello("expert0", NodeKind.EXPERT)
        self.mesh.turn(0.1)

    def names(self, kind: NodeKind) -> list[str]:
        return sorted(name for name, description in self.mesh.alive.items() if description.kind is kind)

    @rule(kind=st.sampled_from(NodeKind))
    def join(self, kind: NodeKind) -> None:
        if len(self.names(kind)) < 5:
            self.starts += 1
            self.mesh.hello(f"{kind.value[0]}{self.starts}", kind)

    @rule(data=st.data(), kind=st.sampled_from(NodeKind))
    def lose(self, data: st.DataObject, kind: NodeKind) -> None:
        if self.names(kind):
            self.mesh.lose(data.draw(st.sampled_from(self.names(kind))))

    @rule(data=st.data(), kind=st.sampled_from(NodeKind))
    def reconnect(self, data: st.DataObject, kind: NodeKind) -> None:
        if self.names(kind):
            self.mesh.hello(data.draw(st.sampled_from(self.names(kind))), kind)

    @rule(data=st.data())
    def cut_off_for_a_moment(self, data: st.DataObject) -> None:
        """The process goes on; its control link stands again before its lifeline does."""
        if self.mesh.alive:
            name = data.draw(st.sampled_from(sorted(self.mesh.alive)))
            self.mesh.client.events.append((NodeId(name), LinkEvent.CLOSED))
            self.mesh.turn()
            self.mesh.say(name, hello_of(self.mesh.alive[name]))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.mesh.alive:
            name = data.draw(st.sampled_from(sorted(self.mesh.alive)))
            del self.mesh.alive[name]
            self.mesh.say(name, Leave("stopped"))

    @rule(data=st.data())
    def fall_silent_or_wake(self, data: st.DataObject) -> None:
        if self.mesh.alive:
            self.mesh.unready ^= {data.draw(st.sampled_from(sorted(self.mesh.alive)))}

    @rule(prompt_length=st.integers(1, 80), max_tokens=st.integers(1, 6))
    def submit(self, prompt_length: int, max_tokens: int) -> None:
        name = f"r{len(self.requests)}"
        self.requests[name] = build_request(name, prompt_length, max_tokens)
        self.expected[RequestId(name)] = reference_tokens(self.requests[name])
        self.mesh.loop.submit(self.requests[name])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.cancelled.add(name)
        self.mesh.loop.cancel(RequestId(name))

    @rule(count=st.integers(1, 3))
    def answer(self, count: int) -> None:
        self.mesh.answer(count)

    @rule()
    def break_a_step(self) -> None:
        for stages in self.mesh.client.pipelines.values():
            if stages.answers:
                _, header = stages.answers.popleft()
                self.mesh.say(stages.first_stage, Failed("execution_error", "broken"), header)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 1.0, 6.0]))
    def turn(self, seconds: float) -> None:
        self.mesh.beat()
        self.mesh.turn(seconds)

    @invariant()
    def the_scheduler_adds_up(self) -> None:
        self.mesh.scheduler.check_invariants()

    @invariant()
    def what_was_sent_is_a_beginning_of_what_is_right(self) -> None:
        for name, request in self.requests.items():
            tokens = self.mesh.tokens(name)
            assert tokens == reference_tokens(request)[: len(tokens)]
            assert len(self.mesh.errors(name)) <= 1

    @invariant()
    def steps_go_only_to_pipelines_whose_first_stage_is_known(self) -> None:
        open_now = {number for number, pipeline in self.mesh.stages.pipelines.items() if pipeline.is_open}
        assert self.mesh.client.pipelines.keys() == open_now
        for number, stages in self.mesh.client.pipelines.items():
            assert stages.first_stage == self.mesh.stages.pipelines[number].holders[0]

    @invariant()
    def nobody_counts_on_a_node_that_is_dead(self) -> None:
        living = set(self.mesh.membership.living())
        assert set(self.mesh.experts.ready) <= living
        holders = {node for pipeline in self.mesh.stages.pipelines.values() for node in pipeline.holders}
        assert holders - {None} <= living

    def teardown(self) -> None:
        """A mesh that is well again finishes everything."""
        self.mesh.unready.clear()
        for name, kind in (
            ("sx", NodeKind.STAGE),
            ("sy", NodeKind.STAGE),
            ("sz", NodeKind.STAGE),
            ("ex", NodeKind.EXPERT),
        ):
            self.mesh.hello(name, kind)
        for name in list(self.mesh.alive):
            self.mesh.hello(name, self.mesh.alive[name].kind)
        self.mesh.settle(90)
        assert self.mesh.loop.status.readiness.ready, self.mesh.loop.status.readiness.detail
        self.what_was_sent_is_a_beginning_of_what_is_right()
        for name, request in self.requests.items():
            if name not in self.cancelled and not self.mesh.errors(name):
                assert self.mesh.tokens(name) == reference_tokens(request)
        assert is_idle(self.mesh.scheduler)


TestMesh = Mesh.TestCase
TestMesh.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
