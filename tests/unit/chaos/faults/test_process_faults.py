"""What each process fault does to a target, and that healing undoes it, twice as well as once."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.faults import rolling_restart
from chaos.faults.catalog import FAULTS
from chaos.faults.processes import children
from chaos.faults.rings import rings_of
from chaos.faults.spoil_rings import spoil_calls
from chaos.target import Node, TargetError
from common.wire.call_ring import HEAD_BYTES, SLOTS, RingMemory, make_ring, ring_shape
from tests.support.chaos.rings import needs_rings
from tests.support.chaos.target import ListedTarget
from tests.support.processes.waiting import wait_until

ANSWERED = 3
"""The state of a slot whose answer waits to be read."""


@pytest.fixture
def ring() -> RingMemory:
    """A ring that this process has mapped, with one call that is answered."""
    memory, descriptor = make_ring(ring_shape(48, 4, 2))
    os.close(descriptor)
    ctypes.memset(memory.address, 0, HEAD_BYTES)
    ctypes.c_uint32.from_address(memory.address).value = ANSWERED
    return memory


@pytest.fixture
def target() -> ListedTarget:
    return ListedTarget()


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_healing_what_was_never_applied_does_nothing(name: str, target: ListedTarget) -> None:
    fault = FAULTS[name].from_suite({})
    fault.heal(target)
    fault.heal(target)
    assert target.done == []
    assert fault.name == name


def test_a_kill_is_sigkill_to_each_victim_and_needs_no_healing(target: ListedTarget) -> None:
    fault = FAULTS["kill"].from_suite({})
    fault.apply(target, target.named("expert-0", "stage-1"))
    fault.heal(target)
    assert target.done == [("signal", "expert-0", signal.SIGKILL), ("signal", "stage-1", signal.SIGKILL)]


def test_a_paused_process_is_woken_once(target: ListedTarget) -> None:
    fault = FAULTS["pause"].from_suite({})
    fault.apply(target, target.named("expert-0"))
    fault.heal(target)
    fault.heal(target)
    assert target.done == [("signal", "expert-0", signal.SIGSTOP), ("signal", "expert-0", signal.SIGCONT)]


def test_what_is_stopped_stays_away_until_it_is_healed(target: ListedTarget) -> None:
    fault = FAULTS["stop"].from_suite({"timeout_s": 3})
    fault.apply(target, target.named("stage-0"))
    wait_until(lambda: not target.named("stage-0"), 5, "the stop")
    fault.heal(target)
    fault.heal(target)
    assert target.done == [("stop", "stage-0", 3.0), ("start", "stage-0", 0)]


def test_a_restart_comes_back_by_itself(target: ListedTarget) -> None:
    (before,) = target.named("expert-1")
    fault = FAULTS["restart"].from_suite({})
    fault.apply(target, [before])
    wait_until(lambda: [n.pid for n in target.named("expert-1")] not in ([], [before.pid]), 5, "the restart")
    fault.heal(target)
    assert [what for what, *_ in target.done] == ["stop", "start"]


def test_a_rolling_restart_waits_for_each_before_the_next(
    target: ListedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = rolling_restart.is_back

    def is_back(mesh: ListedTarget, node: Node) -> bool:
        asked.append(node.name)
        return asked.count(node.name) > 1

    monkeypatch.setattr(rolling_restart, "is_back", is_back)
    fault = FAULTS["rolling_restart"].from_suite({"pause_s": 0, "within_s": 30})
    fault.apply(target, target.named("expert-0", "expert-1"))
    fault.heal(target)
    assert [(what, name) for what, name, _ in target.done] == [
        ("stop", "expert-0"),
        ("start", "expert-0"),
        ("stop", "expert-1"),
        ("start", "expert-1"),
    ]
    assert asked == ["expert-0", "expert-0", "expert-1", "expert-1"]
    assert not real(target, target.nodes()[0]), "the same pid is not back"


def test_scaling_is_undone_to_what_there_was(target: ListedTarget) -> None:
    fault = FAULTS["scale"].from_suite({"kind": "expert", "change": 2})
    fault.apply(target, [])
    fault.heal(target)
    fault.heal(target)
    assert target.done == [("scale", "expert", 4), ("scale", "expert", 2)]


def test_scaling_to_nothing_is_refused(target: ListedTarget) -> None:
    with pytest.raises(TargetError, match="2 processes of kind stage cannot become 0"):
        FAULTS["scale"].from_suite({"kind": "stage", "change": -2}).apply(target, [])
    with pytest.raises(ValueError, match="change=0"):
        FAULTS["scale"].from_suite({"change": 0})


def test_flapping_ends_awake(target: ListedTarget) -> None:
    fault = FAULTS["flap"].from_suite({"times": 2, "off_s": 0.01, "on_s": 0.01})
    fault.apply(target, target.named("expert-0"))
    fault.heal(target)
    numbers = [number for _, _, number in target.done]
    assert numbers == [signal.SIGSTOP, signal.SIGCONT] * 2 + [signal.SIGCONT]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_hogs_are_as_many_as_asked_and_gone_when_healed(target: ListedTarget) -> None:
    fault = FAULTS["cpu_hog"].from_suite({"per_cpu": 0.5})
    before = set(children(os.getpid()))
    fault.apply(target, [])
    assert len(set(children(os.getpid())) - before) == max(1, round(0.5 * (os.cpu_count() or 1)))
    fault.heal(target)
    assert set(children(os.getpid())) == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_the_newest_child_of_a_process_is_killed_and_a_childless_one_is_refused(target: ListedTarget) -> None:
    fault = FAULTS["kill_child"].from_suite({})
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert children(os.getpid())[-1] == sleeper.pid
        assert fault.can_hurt(Node("stage-0", "stage", os.getpid()))
        fault.apply(target, [Node("stage-0", "stage", os.getpid())])
        assert sleeper.wait(10) == -signal.SIGKILL
        with pytest.raises(TargetError, match="stage-0 has no child"):
            fault.apply(target, [Node("stage-0", "stage", os.getpid())])
        assert not fault.can_hurt(Node("stage-0", "stage", os.getpid()))
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_the_newest_child_of_a_process_is_stopped_and_goes_on_when_healed_if_it_is_still_there(
    target: ListedTarget,
) -> None:
    fault = FAULTS["pause_child"].from_suite({})
    for ends in (False, True):
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            fault.apply(target, [Node("stage-0", "stage", os.getpid())])
            stat = Path(f"/proc/{sleeper.pid}/stat")
            wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", 5, "a stopped process")  # noqa: B023
            if ends:
                sleeper.kill()
                sleeper.wait()
            fault.heal(target)
            if not ends:
                wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] != "T", 5, "that it goes on")  # noqa: B023
        finally:
            sleeper.kill()
            sleeper.wait()


def test_what_breaks_in_a_faults_thread_comes_out_when_it_is_healed(target: ListedTarget) -> None:
    fault = FAULTS["scale"].from_suite({"kind": "expert", "change": 1})

    def refuse(kind: str, count: int) -> None:
        raise TargetError("no room")

    target.scale = refuse  # type: ignore[method-assign]
    fault.apply(target, [])
    with pytest.raises(TargetError, match="no room"):
        fault.heal(target)


@needs_rings
def test_only_calls_that_lie_in_a_ring_are_spoilt_and_their_heads_where_it_is_asked_for(ring: RingMemory) -> None:
    shape, own = ring_shape(48, 4, 2), Node("stage-0", "stage", os.getpid())
    (mapped,) = [found for found in rings_of(own) if found.start == ring.address]
    before = ctypes.string_at(ring.address, shape.num_bytes)
    assert spoil_calls(mapped, 0.0, random.Random(1)) == 1
    after = ctypes.string_at(ring.address, shape.num_bytes)
    slot_bytes = shape.num_bytes // SLOTS
    changed = [place for place in range(shape.num_bytes) if before[place] != after[place]]
    assert HEAD_BYTES <= changed[0]
    assert changed[-1] < slot_bytes
    assert len(changed) == (slot_bytes - HEAD_BYTES) // 64 - 1
    spoil_calls(mapped, 1.0, random.Random(1))
    assert ctypes.string_at(ring.address, HEAD_BYTES) != before[:HEAD_BYTES]


def test_a_process_without_a_ring_cannot_be_hurt_in_it(target: ListedTarget) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        node, fault = Node("stage-0", "stage", sleeper.pid), FAULTS["spoil_rings"].from_suite({})
        assert not fault.can_hurt(node)
        with pytest.raises(TargetError, match="stage-0: no ring is mapped there"):
            fault.apply(target, [node])
    finally:
        sleeper.kill()
        sleeper.wait()
