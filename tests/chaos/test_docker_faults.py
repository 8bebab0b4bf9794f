"""Each fault of containers and their networks on a real mesh: what it says it does, and healed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import docker
import pytest

from chaos.faults.bandwidth import Bandwidth
from chaos.faults.base import Fault, UndoList
from chaos.faults.cgroups import ControlGroup, group_of
from chaos.faults.cpu_quota import CpuQuota
from chaos.faults.cut import Cut
from chaos.faults.disk_full import DiskFull
from chaos.faults.freeze import Freeze
from chaos.faults.link_down import LinkDown
from chaos.faults.loss import Loss
from chaos.faults.memory_limit import MemoryLimit
from chaos.faults.network import NetworkNamespace
from chaos.target import Node
from chaos.targets.docker_target import DockerTarget
from tests.chaos.probes import packets_arrived, reaches, seconds_to_send
from tests.compose.compose_mesh import ComposeMesh, compose_mesh

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

WITHIN_S = 30.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[ComposeMesh]:
    with compose_mesh() as running:
        yield running


@pytest.fixture
def target(mesh: ComposeMesh) -> Iterator[DockerTarget]:
    with DockerTarget(mesh.project) as found:
        yield found
    mesh.wait_until_ready()


def node_of(target: DockerTarget, kind: str, place: int = 0) -> Node:
    wait_for("all run", lambda: len(target.nodes()) == 5)
    return [node for node in target.nodes() if node.kind == kind][place]


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def usable(fault: Fault, target: DockerTarget) -> Fault:
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    return fault


def test_nodes_are_the_services_own_processes(target: DockerTarget) -> None:
    nodes = target.nodes()
    assert sorted(node.kind for node in nodes) == ["expert", "expert", "router", "stage", "stage"]
    for node in nodes:
        with open(f"/proc/{node.pid}/cmdline", "rb") as file:
            assert f"services.{node.kind}".encode() in file.read()


def test_the_url_answers(mesh: ComposeMesh, target: DockerTarget) -> None:
    assert target.url == mesh.url


def test_a_killed_process_is_started_again_under_its_name_and_address(target: DockerTarget) -> None:
    before = node_of(target, "expert")
    address = NetworkNamespace(before.pid).addresses()
    target.signal(before, signal.SIGKILL)
    target.signal(before, signal.SIGKILL)
    wait_for("the engine starts it again", lambda: len(target.nodes()) == 5 and before not in target.nodes())
    after = node_of(target, "expert")
    assert (after.name, NetworkNamespace(after.pid).addresses()) == (before.name, address)


def test_a_stopped_node_stays_so_until_it_is_started(target: DockerTarget) -> None:
    node = node_of(target, "expert", 1)
    target.stop(node, 20)
    time.sleep(1)
    assert len(target.nodes()) == 4
    target.start(node.name)
    wait_for("it runs again", lambda: node.name in [running.name for running in target.nodes()])


def test_scaling_adds_new_names_and_the_newest_end_first(mesh: ComposeMesh, target: DockerTarget) -> None:
    before = target.nodes()
    target.scale("expert", 3)
    grown = [node for node in target.nodes() if node not in before]
    assert [node.kind for node in grown] == ["expert"]
    assert [node for node in target.nodes() if node in before] == before
    target.scale("expert", 2)
    assert target.nodes() == before


def test_a_node_that_is_off_reaches_nobody_until_it_is_healed(target: DockerTarget) -> None:
    victim, other, router = node_of(target, "expert"), node_of(target, "expert", 1), node_of(target, "router")
    fault = usable(Cut(kind="off"), target)
    assert reaches(victim, router)
    fault.apply(target, [victim])
    try:
        assert not reaches(victim, router)
        assert not reaches(other, victim)
        assert reaches(other, router)
    finally:
        fault.heal(target)
    # A node that was declared dead hears so and comes back as another incarnation.
    wait_for("it reaches the router", lambda: reaches(node_of(target, "expert"), router))
    wait_for("it is reached", lambda: reaches(other, node_of(target, "expert")))
    fault.heal(target)


def test_a_cut_pair_still_reaches_the_router(target: DockerTarget) -> None:
    stage, expert, router = node_of(target, "stage"), node_of(target, "expert"), node_of(target, "router")
    fault = usable(Cut(kind="pair"), target)
    fault.apply(target, [stage, expert])
    try:
        assert not reaches(stage, expert)
        assert not reaches(expert, stage)
        assert reaches(stage, router)
        assert reaches(expert, router)
    finally:
        fault.heal(target)
    wait_for("they reach each other", lambda: reaches(node_of(target, "stage"), node_of(target, "expert")))


def test_one_way_means_that_the_second_hears_nothing_and_the_first_hears_the_second(target: DockerTarget) -> None:
    speaker, listener = node_of(target, "expert"), node_of(target, "stage")
    fault = usable(Cut(kind="one_way"), target)
    fault.apply(target, [speaker, listener])
    try:
        assert packets_arrived(speaker, listener, 20) == 0
        assert packets_arrived(listener, speaker, 20) == 20
    finally:
        fault.heal(target)
    assert packets_arrived(node_of(target, "expert"), node_of(target, "stage"), 20) == 20


def test_a_rule_that_went_with_its_container_is_no_error_when_healing(target: DockerTarget) -> None:
    victim = node_of(target, "expert")
    fault = usable(Cut(kind="off"), target)
    fault.apply(target, [victim])
    target.signal(victim, signal.SIGKILL)
    wait_for("the engine starts it again", lambda: len(target.nodes()) == 5 and victim not in target.nodes())
    fault.heal(target)
    wait_for("it reaches the router", lambda: reaches(node_of(target, "expert"), node_of(target, "router")))


def test_a_link_goes_down_and_comes_up_with_its_routes(target: DockerTarget) -> None:
    victim, router = node_of(target, "stage"), node_of(target, "router")
    fault = usable(LinkDown(), target)
    namespace = NetworkNamespace(victim.pid)
    routes = namespace.run("ip", "route", "show")
    fault.apply(target, [victim])
    try:
        assert not reaches(victim, router)
    finally:
        fault.heal(target)
    assert not namespace.exists or namespace.run_if_there("ip", "route", "show") == routes
    wait_for("the link is up", lambda: reaches(node_of(target, "stage"), router))


def test_a_share_of_the_packets_is_lost_each_way(target: DockerTarget) -> None:
    victim, router = node_of(target, "expert"), node_of(target, "router")
    fault = usable(Loss(percent=25), target)
    fault.apply(target, [victim])
    try:
        assert 110 < packets_arrived(victim, router, 200) < 185
        assert 110 < packets_arrived(router, victim, 200) < 185
    finally:
        fault.heal(target)
    assert packets_arrived(node_of(target, "expert"), router, 200) == 200


def test_a_slow_line_takes_its_time(target: DockerTarget) -> None:
    victim, router = node_of(target, "expert"), node_of(target, "router")
    fault = usable(Bandwidth(kbit_per_s=800), target)
    fault.apply(target, [victim])
    try:
        assert seconds_to_send(victim, router, 200_000) > 1.2
    finally:
        fault.heal(target)
    assert seconds_to_send(node_of(target, "expert"), router, 200_000) < 0.5


def test_a_quota_holds_in_the_container_and_ends(target: DockerTarget) -> None:
    victim = node_of(target, "expert")
    fault = usable(CpuQuota(percent=10), target)
    group = group_of(victim, "cpu", UndoList())
    spin = "import time; [None for _ in iter(lambda: time.process_time() < 0.2, False)]"

    def times_throttled() -> int:
        """While 0.2 s of CPU time are spent in the container; how fast the machine is plays no part."""
        before = throttled(group)
        command = ["docker", "exec", victim.name, "python", "-S", "-c", spin]
        subprocess.run(command, check=True, timeout=60)
        return throttled(group) - before

    fault.apply(target, [victim])
    try:
        assert times_throttled() > 10
    finally:
        fault.heal(target)
    assert times_throttled() == 0


def test_out_of_memory_the_kernel_ends_the_node_and_the_engine_starts_it_without_a_limit(target: DockerTarget) -> None:
    victim = node_of(target, "expert")
    fault = usable(MemoryLimit(), target)
    fault.apply(target, [victim])
    try:
        wait_for("it was killed", lambda: victim not in target.nodes())
    finally:
        fault.heal(target)
    wait_for("it runs again", lambda: len(target.nodes()) == 5)
    inspected = docker.from_env().containers.get(victim.name).attrs["HostConfig"]
    assert inspected["Memory"] == 0


def test_a_frozen_container_does_nothing_until_it_is_healed(target: DockerTarget) -> None:
    victim = node_of(target, "expert")
    fault = usable(Freeze(), target)
    fault.apply(target, [victim])
    try:
        shown = subprocess.run(["docker", "inspect", victim.name], check=True, capture_output=True, text=True).stdout
        assert json.loads(shown)[0]["State"]["Paused"]
        spent = cpu_ticks(victim.pid)
        time.sleep(1)
        assert cpu_ticks(victim.pid) == spent
    finally:
        fault.heal(target)
    assert node_of(target, "expert") == victim
    wait_for("it works again", lambda: cpu_ticks(victim.pid) > spent)
    fault.heal(target)


def test_the_disk_of_the_host_is_not_filled(target: DockerTarget) -> None:
    assert "only one of at most" in DiskFull().unavailable(target)


def throttled(group: ControlGroup) -> int:
    lines = (group.folder / "cpu.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)["nr_throttled"])


def cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = re.sub(r"^.*\)", "", file.read()).split()
    return int(fields[11]) + int(fields[12])
