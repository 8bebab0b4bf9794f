"""Steps on their way: what comes back late or wrong, what fails, and canaries in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from common.errors import MoemeshError
from common.ids import PipelineId
from common.messages import (
    AssignStage,
    Failed,
    Leave,
    StageHeartbeat,
)
from common.wire.transport import LinkEvent
from services.router.engine import Token
from services.router.scheduling.admission import Admission
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request
from tests.support.router.erring_drafter import ErringDrafter
from tests.support.router.fake_mesh import (
    CHUNK_TOKENS,
    STEP_DEADLINE_S,
    TERM,
    FakeMesh,
    build_request,
    kinds,
    ready_mesh,
    reference_tokens,
    result_of,
    said_to,
)
from tests.support.router.mesh_shapes import node

FIRST = PipelineId(0)


@pytest.fixture
def mesh() -> FakeMesh:
    return ready_mesh()


def test_results_of_another_term_generation_or_step_are_dropped_and_counted(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r"))
    mesh.turn()
    stages = mesh.client.pipelines[FIRST]
    result, header = stages.answers.popleft()
    before = mesh.loop.status.hops.dropped
    for changed in (
        replace(header, router_term=TERM - 1),
        replace(header, generation=header.generation + 1),
        replace(header, step=header.step + 100),
    ):
        mesh.client.answers.append((result, changed))
    mesh.client.answers.append((Leave("?"), header))
    mesh.turn(0.2)
    assert mesh.loop.status.hops.dropped == before + 4
    assert mesh.tokens("r") == []
    mesh.client.answers.append((result, header))
    mesh.turn()
    assert len(mesh.tokens("r")) == 1


def test_a_result_that_does_not_fit_its_step_fails_it_and_the_request_is_computed_again(mesh: FakeMesh) -> None:
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.turn()
    _, header = mesh.client.pipelines[FIRST].answers.popleft()
    mesh.client.answers.append((result_of([(999, 1)]), header))
    sent = mesh.turn()
    assert AssignStage in kinds(said_to("a", sent)), "a new generation makes the stages forget"
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)


def test_an_answer_that_has_overtaken_the_one_before_it_counts_for_nothing(mesh: FakeMesh) -> None:
    request = build_request("r", prompt_length=3 * CHUNK_TOKENS)
    mesh.loop.submit(request)
    mesh.turn()
    stages = mesh.client.pipelines[FIRST]
    assert len(stages.answers) == 3, "all chunks of the prompt are under way"
    before = mesh.stages.pipelines[FIRST].generation
    stages.answers.popleft()  # the stage that has failed it says so on another link
    mesh.answer()
    mesh.turn()
    assert mesh.stages.pipelines[FIRST].generation > before
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_step_that_a_stage_cannot_do_is_computed_again_in_a_new_generation(mesh: FakeMesh) -> None:
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.turn()
    _, header = mesh.client.pipelines[FIRST].answers.popleft()
    before = mesh.stages.pipelines[FIRST].generation
    mesh.say("b", Failed("execution_error", "no memory"), replace(header, generation=header.generation - 1))
    mesh.turn()
    assert mesh.stages.pipelines[FIRST].generation == before, "of an older generation: no news"
    mesh.say("b", Failed("execution_error", "no memory"), header)
    mesh.turn()
    assert mesh.stages.pipelines[FIRST].generation > before
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_step_that_fails_again_and_again_fails_its_request_with_the_reason(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r"))
    for _ in range(40):
        mesh.turn(0.1)
        for stages in mesh.client.pipelines.values():
            while stages.answers:
                _, header = stages.answers.popleft()
                mesh.say("b", Failed("execution_error", "no memory"), header)
    (error,) = mesh.errors("r")
    assert "no memory" in str(error)
    assert mesh.tokens("r") == []


def test_a_step_that_is_not_answered_in_time_is_computed_again(mesh: FakeMesh) -> None:
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.turn()
    mesh.client.pipelines[FIRST].answers.clear()
    for _ in range(int(STEP_DEADLINE_S)):
        mesh.beat()
        mesh.turn(1.0)
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_result_that_was_lost_on_its_way_is_made_again_long_before_the_steps_deadline(mesh: FakeMesh) -> None:
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.turn()
    mesh.client.pipelines[FIRST].answers.clear()  # the link broke with it, and nothing else is on its way
    lost_s = mesh.now_s
    while not mesh.tokens("r"):
        mesh.beat()
        mesh.turn(0.25)
        mesh.answer()
        assert mesh.now_s - lost_s < 3 < STEP_DEADLINE_S
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)
    assert mesh.errors("r") == []


def test_a_step_that_waits_for_tokens_which_never_came_is_lost_and_done_again_without_blame() -> None:
    """Nothing but these tokens goes from the last stage to the first, and a step that waits there is not at work."""
    mesh = FakeMesh(plans_ahead=True)
    mesh.start()
    request = build_request("r", max_tokens=20)
    mesh.loop.submit(request)
    mesh.turn()
    mesh.answer()
    mesh.turn()
    stages = mesh.client.pipelines[FIRST]
    (_, now), (_, ahead) = stages.answers
    assert ahead.step == now.step + 1
    stages.answers.pop()
    lost_s = mesh.now_s
    mesh.answer()
    mesh.turn()
    assert len(mesh.tokens("r")) == 2
    while len(mesh.tokens("r")) < 3:
        mesh.beat()
        mesh.turn(0.25)
        mesh.answer()
        assert mesh.now_s - lost_s < 4 < STEP_DEADLINE_S
    mesh.settle(40)
    assert mesh.tokens("r") == reference_tokens(request)
    assert mesh.errors("r") == []


def test_a_step_that_a_stage_says_it_has_is_waited_for(mesh: FakeMesh) -> None:
    generation = mesh.stages.pipelines[FIRST].generation
    mesh.loop.submit(build_request("r"))
    mesh.turn()
    for _ in range(24):
        mesh.beat(queued=1)
        mesh.turn(0.25)
    assert mesh.stages.pipelines[FIRST].generation == generation


def test_a_first_stage_that_takes_no_step_yet_gets_it_later_in_order(mesh: FakeMesh) -> None:
    mesh.client.pipelines[FIRST].takes_steps = False
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.turn()
    mesh.turn(0.5)
    assert not mesh.client.pipelines[FIRST].answers
    mesh.client.pipelines[FIRST].takes_steps = True
    mesh.settle(20)
    assert mesh.tokens("r") == reference_tokens(request)


def test_the_next_step_is_sent_before_the_tokens_of_the_last_one_are_handed_on(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def note_and_call(*arguments: Any) -> Any:
            done.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, method, note_and_call)

    mesh.loop.submit(build_request("r"))
    mesh.turn()
    mesh.answer()
    noted(mesh.client, "send_step", "step")
    noted(mesh.loop._flow, "_sink", "tokens")
    noted(mesh.loop, "_receive_control", "control")
    noted(mesh.loop, "_apply_commands", "commands")
    mesh.turn()
    assert done == ["step", "tokens", "commands", "control"]


def test_tokens_are_handed_on_in_the_turn_in_which_they_come_and_before_an_error_that_follows(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r"))
    mesh.turn()
    mesh.answer()
    mesh.turn()
    assert len(mesh.tokens("r")) == 1
    mesh.answer()
    mesh.turn(10_000)
    *tokens, error = mesh.outcomes["r"]
    assert [type(token) for token in tokens] == [Token] * 2
    assert isinstance(error, MoemeshError)


def test_a_step_carries_the_counters_that_fence_it_and_the_time_left(mesh: FakeMesh) -> None:
    mesh.client.pipelines[FIRST].takes_steps = False
    mesh.loop.submit(build_request("r"))
    mesh.turn()
    mesh.client.pipelines[FIRST].takes_steps = True
    mesh.turn(2.5)
    (_, header) = mesh.client.pipelines[FIRST].answers[0]
    assert header.router_term == TERM
    assert header.generation == mesh.stages.pipelines[FIRST].generation
    assert header.time_left_ms == (STEP_DEADLINE_S - 2.5) * 1000


def test_in_silence_a_canary_goes_through_each_pipeline_and_is_no_work(mesh: FakeMesh) -> None:
    steps, planned = mesh.loop.status.hops.pipeline_steps, mesh.loop.status.scheduler.counters.steps_planned
    mesh.client.pipelines[FIRST].answers.clear()
    for _ in range(6):
        mesh.beat()
        mesh.turn(0.25)
    (result, header) = mesh.client.pipelines[FIRST].answers[0]
    assert result.sequence_ids.shape == (0,)
    assert header.generation == mesh.stages.pipelines[FIRST].generation
    mesh.settle()
    assert mesh.loop.status.readiness.ready
    assert (mesh.loop.status.hops.pipeline_steps, mesh.loop.status.scheduler.counters.steps_planned) == (steps, planned)


def test_an_unanswered_canary_shows_a_hang_until_it_is_answered(mesh: FakeMesh) -> None:
    for _ in range(12):
        mesh.beat(queued=1)
        mesh.turn(0.25)
    assert not mesh.loop.status.readiness.ready
    assert "a canary has been unanswered" in mesh.loop.status.readiness.detail
    mesh.answer()
    mesh.beat()
    mesh.turn(0.1)
    mesh.turn(0.1)
    assert mesh.loop.status.readiness.ready


def test_after_a_lost_canary_nothing_is_ready_until_the_new_links_have_carried_something(mesh: FakeMesh) -> None:
    generation = mesh.stages.pipelines[FIRST].generation
    for _ in range(16):
        for stages in mesh.client.pipelines.values():
            stages.answers.clear()
        mesh.beat()
        mesh.turn(0.25)
    assert mesh.stages.pipelines[FIRST].generation > generation
    assert "nothing has come through its links yet" in mesh.loop.status.readiness.detail
    mesh.settle()
    assert mesh.loop.status.readiness.ready


def test_a_request_goes_on_beside_a_canary(mesh: FakeMesh) -> None:
    request = build_request("r", max_tokens=6)
    mesh.beat()
    mesh.turn(1.5)
    assert mesh.client.pipelines[FIRST].answers, "a canary is in flight"
    mesh.loop.submit(request)
    mesh.settle()
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_suspect_stage_is_not_ready_at_once(mesh: FakeMesh) -> None:
    mesh.turn(0.2)
    mesh.client.events.append((node("b").node_id, LinkEvent.CLOSED))
    mesh.turn(0.11)
    assert mesh.loop.status.readiness.missing == ("pipeline 0: not answering: b",)


def test_ready_is_false_within_two_seconds_of_the_last_token_after_any_number_of_failed_steps(mesh: FakeMesh) -> None:
    mesh.loop.submit(build_request("r", max_tokens=200))
    mesh.settle(40)
    for _ in range(3):  # three steps fail by their deadline, each with new tokens in between
        mesh.turn(0.2)
        for _ in range(int(STEP_DEADLINE_S / 0.2) + 1):
            mesh.beat(queued=1)
            mesh.turn(0.2)
        before = len(mesh.tokens("r"))
        mesh.settle(8)
        assert len(mesh.tokens("r")) > before, "the pipeline has recovered"
    assert mesh.loop.status.readiness.ready
    polls: list[bool] = []
    for number in range(60):
        mesh.beat()
        # The first stage does its part of every step, and says so.
        mesh.say("a", StageHeartbeat(steps=number, rows=number, calls=number))
        mesh.turn(0.2)
        polls.append(mesh.loop.status.readiness.ready)
    assert not any(polls[10:]), "no token came, neither before the deadline nor after it"


def test_a_request_that_fits_no_message_fails_and_those_in_its_step_go_on(mesh: FakeMesh) -> None:
    good, bad = build_request("good"), build_request("bad")
    mesh.loop.submit(good)
    mesh.loop.submit(replace(bad, sampling=replace(bad.sampling, seed=1 << 70)))
    mesh.settle(20)
    assert mesh.tokens("good") == reference_tokens(good)
    (error,) = mesh.errors("bad")
    assert (error.http_status, "request bad" in error.message) == (500, True)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Request, "token_ids"), (Request, "accept_token"), (PipelineSchedule, "_give_back"), (PipelineSchedule, "admit")],
)
def test_an_error_while_a_request_is_handled_ends_it_and_not_the_mesh(
    mesh: FakeMesh, owner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(owner, method)

    def broken(*arguments: Any, **named: Any) -> Any:
        if any(isinstance(each, Request) and each.request_id == "bad" for each in arguments):
            raise KeyError("simulated")
        return original(*arguments, **named)

    monkeypatch.setattr(owner, method, broken)
    good, bad = build_request("good", max_tokens=8), build_request("bad")
    mesh.loop.submit(good)
    mesh.loop.submit(bad)
    mesh.settle(30)
    assert mesh.tokens("good") == reference_tokens(good)
    (error,) = mesh.errors("bad")
    assert (error.http_status, "request bad" in error.message) == (500, True)
    later = build_request("later")
    mesh.loop.submit(later)
    mesh.settle(20)
    assert mesh.tokens("later") == reference_tokens(later)
    mesh.scheduler.check_invariants()


def test_a_request_that_cannot_even_be_taken_in_is_told_so(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "admit", mock.Mock(side_effect=TypeError("simulated")))
    mesh.loop.submit(build_request("bad"))
    mesh.settle(2)
    (error,) = mesh.errors("bad")
    assert (error.http_status, "request bad" in error.message) == (500, True)


def test_tokens_that_have_been_made_reach_their_client_also_where_planning_ends_the_mesh_thread(mesh: FakeMesh) -> None:
    request = build_request("a", max_tokens=8)
    mesh.loop.submit(request)
    mesh.settle(3)
    made = len(mesh.tokens("a"))
    with (
        mock.patch.object(mesh.scheduler, "plan_canaries", side_effect=KeyError("simulated")),
        pytest.raises(KeyError),
    ):
        mesh.settle(2)
    assert len(mesh.tokens("a")) == made + 1


def test_nobodys_time_is_up_before_what_nodes_have_said_was_heard(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh.loop.submit(build_request("a", max_tokens=8))
    mesh.settle(3)
    order: list[str] = []
    for owner, name in ((mesh.scheduler, "_expire"), (mesh.loop, "_receive_control")):
        original = getattr(owner, name)

        def noted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, noted)
    mesh.settle(3)
    assert order[:2] == ["_receive_control", "_expire"]
    assert order.count("_expire") == order.count("_receive_control")


def test_what_a_drafter_raises_is_logged_and_costs_no_request() -> None:
    request = build_request("r", max_tokens=20)
    drafter = ErringDrafter({request.request_id: reference_tokens(request)}, 3)
    mesh = FakeMesh(drafter=drafter)
    mesh.start()
    with mock.patch.object(drafter, "draft", side_effect=ValueError("no draft")) as draft:
        mesh.loop.submit(request)
        mesh.settle(50)
    assert draft.call_count == 1
    assert mesh.tokens("r") == reference_tokens(request)
    (ended,) = [call.kwargs for call in mesh.logged.calls if call.kwargs.get("event") == "drafts_ended"]
    assert ended["pipeline"] == FIRST
    assert str(ended["exc_info"]) == "no draft"
