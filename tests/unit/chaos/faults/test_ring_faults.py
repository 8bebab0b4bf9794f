"""Faults of calls within a host, on plain processes that have a ring: what they say they do, and healed."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.faults.deny_rings import DenyRings
from chaos.faults.kill_in_call import KillInCall
from chaos.faults.lose_bells import LoseBells, silence_bells
from chaos.faults.rings import Ring, SlotState, bells_of, rings_folder, rings_of, stopped_process
from chaos.target import Node, TargetError
from common.wire.call_ring import SLOTS, RingMemory, make_ring, new_bell, ring_path, ring_shape
from tests.support.chaos.rings import needs_rings
from tests.support.chaos.target import ListedTarget
from tests.support.processes.waiting import wait_until

pytestmark = needs_rings
SHAPE = ring_shape(48, 4, 2)
HOLDER = """
import ctypes, os, sys
from common.wire.call_ring import RingMemory, make_ring, ring_shape
shape = ring_shape(48, 4, 2)
ring = RingMemory(int(sys.argv[1]), shape)
print("has it", flush=True)
for line in sys.stdin:
    try:
        memory, descriptor = make_ring(shape)
        os.close(descriptor)
        del memory
        print("made", flush=True)
    except OSError as error:
        print(type(error).__name__, error.errno, flush=True)
"""
"""Has a ring whose descriptor it is given, and makes another whenever it is told to."""


class SignalledTarget(ListedTarget):
    """Signals reach the processes."""

    def signal(self, node: Node, number: int) -> None:
        super().signal(node, number)
        os.kill(node.pid, number)


@pytest.fixture
def target() -> SignalledTarget:
    return SignalledTarget()


@pytest.fixture
def ring() -> tuple[RingMemory, int]:
    return make_ring(SHAPE)


@pytest.fixture
def bells() -> Iterator[tuple[int, int]]:
    """One that is handed over, and one that is not."""
    shared, own = new_bell(), new_bell()
    yield shared, own
    os.close(shared)
    os.close(own)


@pytest.fixture
def holders(
    ring: tuple[RingMemory, int], bells: tuple[int, int], tmp_path: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Three that have the ring and the bell."""
    with ExitStack() as started:
        processes = []
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(ring[1])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(ring[1], bells[0]),
                env={**os.environ, "RINGS_FOLDER": str(tmp_path)},
            )
            processes.append(started.enter_context(process))
            started.callback(process.kill)
        os.close(ring[1])
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "has it\n"
        yield processes


@pytest.fixture
def holder(holders: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    return holders[0]


def makes_a_ring(holder: subprocess.Popen[str]) -> str:
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    return holder.stdout.readline().strip()


def set_state(memory: RingMemory, slot: int, state: SlotState) -> None:
    ctypes.c_uint32.from_address(memory.address + slot * (SHAPE.num_bytes // SLOTS)).value = state


def test_the_slots_of_a_ring_are_seen_from_outside(ring: tuple[RingMemory, int], holder: subprocess.Popen[str]) -> None:
    (seen,) = rings_of(Node("stage-0", "stage", holder.pid))
    assert seen.num_bytes == SHAPE.num_bytes
    for slot, state in enumerate((SlotState.ASKED, SlotState.TAKEN, SlotState.UNWANTED)):
        set_state(ring[0], slot, state)
    assert seen.states() == [SlotState.ASKED, SlotState.TAKEN, SlotState.UNWANTED, SlotState.FREE]
    holder.kill()
    holder.wait()
    with pytest.raises(OSError):  # noqa: PT011
        seen.states()


@pytest.mark.parametrize("state", ["taken", "asked", "answered"])
def test_a_node_is_killed_once_a_call_is_in_the_state_that_is_named(
    ring: tuple[RingMemory, int], holder: subprocess.Popen[str], target: SignalledTarget, state: str
) -> None:
    others = [found for found in SlotState if found.name != state.upper()]
    set_state(ring[0], 0, others[1])
    fault = KillInCall.from_suite({"state": state, "within_s": 30})
    fault.apply(target, [Node("expert-0", "expert", holder.pid)])
    time.sleep(0.2)
    assert holder.poll() is None
    set_state(ring[0], 3, SlotState[state.upper()])
    assert holder.wait(10) == -signal.SIGKILL
    fault.heal(target)
    assert target.done == [("signal", "expert-0", signal.SIGKILL)]
    assert (fault.remark, fault.doubt) == ("expert-0 was killed in a call", "")


@pytest.mark.parametrize(
    ("state", "kind", "looks_once"),
    [
        ("taken", "expert", True),
        ("answered", "expert", True),
        ("asked", "expert", False),
        ("asked", "stage", True),
        ("answered", "stage", False),
    ],
)
def test_a_victim_stands_still_for_longer_only_where_others_make_the_state(
    holder: subprocess.Popen[str],
    target: SignalledTarget,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    kind: str,
    looks_once: bool,
) -> None:
    """An expert node that stands still is late, and is asked in messages for a while: then no call is in its rings."""
    looks: list[int] = []

    def look(ring: Ring) -> list[int]:
        looks.append(ring.pid)
        return []

    monkeypatch.setattr(Ring, "states", look)
    fault = KillInCall.from_suite({"state": state})
    assert not fault._kill_if_in_call(target, Node("victim", kind, holder.pid))
    assert (len(looks) == 1) == looks_once


def test_a_node_without_such_a_call_is_killed_when_the_time_is_up_and_the_report_says_so(
    holder: subprocess.Popen[str], target: SignalledTarget
) -> None:
    fault = KillInCall.from_suite({"within_s": 0.2})
    fault.apply(target, [Node("expert-0", "expert", holder.pid)])
    assert holder.wait(10) == -signal.SIGKILL
    fault.heal(target)
    assert (fault.remark, fault.doubt) == ("expert-0 was killed without a call that was taken in 0.2 s", "")


def test_a_node_whose_rings_may_not_be_looked_into_is_not_killed(
    holder: subprocess.Popen[str], target: SignalledTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ring: Ring) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Ring, "num_bytes", property(refuse))
    fault = KillInCall.from_suite({"within_s": 0})
    with pytest.raises(TargetError, match="the rings of expert-0 cannot be read: Operation not permitted"):
        fault.apply(target, [Node("expert-0", "expert", holder.pid)])
    fault.heal(target)
    assert target.done == []


def test_healing_before_the_kill_lets_the_node_live(holder: subprocess.Popen[str], target: SignalledTarget) -> None:
    fault = KillInCall.from_suite({"within_s": 0.5})
    fault.apply(target, [Node("expert-0", "expert", holder.pid)])
    fault._stopped.set()
    fault.heal(target)
    assert target.done == []
    assert fault.doubt == "expert-0 was not killed before all was healed"
    assert makes_a_ring(holder) == "made"


def test_bells_that_two_processes_with_rings_share_are_read_empty_and_no_others(
    ring: tuple[RingMemory, int], holder: subprocess.Popen[str], bells: tuple[int, int], target: SignalledTarget
) -> None:
    nodes = [Node("stage-0", "stage", os.getpid()), Node("expert-0", "expert", holder.pid)]
    fault = LoseBells()
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    assert bells[0] in bells_of(os.getpid(), nodes)
    assert bells[1] not in bells_of(os.getpid(), nodes)
    for bell in bells:
        os.eventfd_write(bell, 2)
    assert silence_bells(holder.pid, nodes) == 1
    assert silence_bells(holder.pid, nodes) == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bells[0])
    assert os.eventfd_read(bells[1]) == 2


def test_bells_are_lost_again_and_again_until_that_is_healed(
    holders: list[subprocess.Popen[str]], bells: tuple[int, int], target: SignalledTarget
) -> None:
    stage, victim = Node("stage-0", "stage", holders[0].pid), Node("expert-0", "expert", holders[1].pid)
    target.running = {node.name: node for node in (stage, victim)}
    fault = LoseBells.from_suite({"every_s": 0.01})
    if reason := fault.unavailable(target):
        pytest.skip(reason)

    def is_silent() -> bool:
        try:
            os.eventfd_read(bells[0])
        except BlockingIOError:
            return True
        os.eventfd_write(bells[0], 1)
        return False

    fault.apply(target, [victim])
    for _ in range(2):
        os.eventfd_write(bells[0], 1)
        wait_until(is_silent, 10, "a bell that is lost")
    fault.heal(target)
    os.eventfd_write(bells[0], 1)
    time.sleep(0.1)
    assert not is_silent()
    assert [makes_a_ring(process) for process in holders] == ["made"] * 3
    assert fault.remark.startswith("bells lost: ")
    assert int(fault.remark.removeprefix("bells lost: ")) >= 2
    assert not fault.doubt


def test_bells_of_a_node_that_has_come_since_are_lost_as_well(
    holders: list[subprocess.Popen[str]], bells: tuple[int, int], target: SignalledTarget
) -> None:
    stage, first = (Node(f"{kind}-0", kind, holders[place].pid) for place, kind in enumerate(("stage", "expert")))
    target.running = {node.name: node for node in (stage, first)}
    fault = LoseBells.from_suite({"every_s": 0.01})
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    fault.apply(target, [stage])
    target.running = {"stage-0": stage, "expert-0": Node("expert-0", "expert", holders[2].pid)}
    holders[1].kill()
    holders[1].wait()
    os.eventfd_write(bells[0], 1)
    wait_until(lambda: fault.remark == "bells lost: 1", 10, "a bell that is lost")
    fault.heal(target)


def test_bells_that_nobody_has_rung_are_a_doubt(holders: list[subprocess.Popen[str]], target: SignalledTarget) -> None:
    stage, victim = Node("stage-0", "stage", holders[0].pid), Node("expert-0", "expert", holders[1].pid)
    target.running = {node.name: node for node in (stage, victim)}
    fault = LoseBells.from_suite({"every_s": 0.01})
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    fault.apply(target, [victim])
    time.sleep(0.2)
    fault.heal(target)
    assert (fault.remark, fault.doubt) == ("", "no bell was rung while its victims stood still")


def test_a_node_that_shares_no_bell_can_lose_none(holder: subprocess.Popen[str], target: SignalledTarget) -> None:
    victim = Node("expert-0", "expert", holder.pid)
    target.running = {"expert-0": victim}
    fault = LoseBells()
    with pytest.raises(TargetError, match="expert-0: it shares no bell with another node"):
        fault.apply(target, [victim])
    fault.heal(target)


def test_bells_that_may_not_be_had_are_told_before_anything_is_done(
    holders: list[subprocess.Popen[str]], target: SignalledTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, victim = Node("stage-0", "stage", holders[0].pid), Node("expert-0", "expert", holders[1].pid)
    target.running = {node.name: node for node in (stage, victim)}

    def refuse(pid: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    fault = LoseBells()
    with pytest.raises(TargetError, match="the bells of expert-0 cannot be had: Operation not permitted"):
        fault.apply(target, [victim])
    fault.heal(target)


def test_there_is_no_room_for_a_ring_until_that_is_healed(
    holder: subprocess.Popen[str], target: SignalledTarget
) -> None:
    fault = DenyRings()
    assert makes_a_ring(holder) == "made"
    fault.apply(target, [Node("stage-0", "stage", holder.pid)])
    assert makes_a_ring(holder).startswith("OSError")
    fault.heal(target)
    fault.heal(target)
    assert makes_a_ring(holder) == "made"
    assert target.done == []


def test_two_that_leave_no_room_for_rings_leave_it_again_when_they_are_healed_in_order(
    holder: subprocess.Popen[str], target: SignalledTarget
) -> None:
    victim = Node("stage-0", "stage", holder.pid)
    limits = resource.prlimit(holder.pid, resource.RLIMIT_FSIZE)
    first, second = DenyRings(), DenyRings()
    first.apply(target, [victim])
    second.apply(target, [victim])
    assert makes_a_ring(holder).startswith("OSError")
    first.heal(target)
    second.heal(target)
    assert makes_a_ring(holder) == "made"
    assert resource.prlimit(holder.pid, resource.RLIMIT_FSIZE) == limits


def test_folders_lie_where_rings_are_waited_for_also_where_sockets_come_back_until_that_is_healed(
    holder: subprocess.Popen[str], target: SignalledTarget, tmp_path: Path
) -> None:
    victim = Node("expert-0", "expert", holder.pid)
    assert rings_folder(victim).samefile(tmp_path)
    path = ring_path(tmp_path, "expert-0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        first.bind(str(path))
    fault = DenyRings.from_suite({"what": "names"})
    fault.apply(target, [victim])
    assert path.is_dir()
    assert holder.wait(10) == -signal.SIGKILL, "what comes after it needs rings"
    later = ring_path(tmp_path, "expert-1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as second:
        second.bind(str(later))
        wait_until(later.is_dir, 10, "the later one")
    fault.heal(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [KillInCall(), LoseBells(), DenyRings(), DenyRings("names")])
def test_a_process_without_a_ring_cannot_be_hurt_in_it(
    fault: KillInCall | LoseBells | DenyRings, target: SignalledTarget
) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeper:
        node = Node("expert-0", "expert", sleeper.pid)
        assert not fault.can_hurt(node)
        with pytest.raises(TargetError, match="expert-0: no ring is mapped there"):
            fault.apply(target, [node])
        fault.heal(target)
        sleeper.kill()


def test_a_process_stands_still_while_it_is_stopped_and_one_that_is_gone_is_none(
    holder: subprocess.Popen[str],
) -> None:
    stat = Path(f"/proc/{holder.pid}/stat")
    with stopped_process(holder.pid):
        assert stat.read_text().rpartition(")")[2].split()[0] == "T"
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] != "T", 5, "that it goes on")
    holder.kill()
    holder.wait()
    with pytest.raises(ProcessLookupError), stopped_process(holder.pid):
        pass
