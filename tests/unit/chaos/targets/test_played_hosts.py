"""Nodes on played hosts. No process is started here, and no namespace is made."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.faults.host_loss import HostLoss
from chaos.target import Node, TargetError
from chaos.targets import local_target, played_hosts
from chaos.targets.host_commands import missing
from chaos.targets.played_hosts import HostsTarget, PlayedHosts, free_network
from tests.unit.chaos.targets.test_local_target import StandIn


class ThreeNodes(StandIn):
    """Two of them on host 0."""

    def kinds(self) -> dict[str, str]:
        return {"router-0": "router", "stage-0": "stage", "expert-0": "expert", "expert-1": "expert"}

    def processes(self) -> list[tuple[str, int]]:
        return [(name, 10 + number) for number, name in enumerate(self.kinds())]

    def start(self, name: str) -> None:
        self.calls.append(("start", name))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of this machine."""
    said: list[str] = []

    def run(words: list[str]) -> str:
        said.append(" ".join(words))
        return "[]"

    StandIn.made = []
    monkeypatch.setattr(local_target, "LocalMesh", ThreeNodes)
    monkeypatch.setattr(played_hosts, "run", run)
    monkeypatch.setattr(played_hosts, "missing", lambda *_: "")
    monkeypatch.setattr(played_hosts, "remove_left_over", lambda: None)
    return said


def test_nodes_of_one_host_share_its_label_its_folder_and_its_network_and_nothing_with_others(
    commands: list[str],
) -> None:
    with HostsTarget({}, num_hosts=2):
        (mesh,) = StandIn.made
        first, second, third = (mesh.places[f"stage-{number}"] for number in range(3))
    assert first == third
    assert all(first[name] != second[name] for name in first)
    assert {"HOST_LABEL", "STATE_DIR", "ADVERTISE_HOST", "CHAOS_NAMESPACE"} == set(first)
    assert mesh.environment["CONTROL"].startswith("tcp://10.213.")
    on_host = "chaos.targets.on_host"
    assert mesh.modules == {"stage": f"{on_host} services.stage", "expert": f"{on_host} services.expert"}


def test_a_planted_bug_runs_on_a_host_too(commands: list[str]) -> None:
    with HostsTarget({}, modules={"stage": "tests.chaos.planted_bugs x"}, num_hosts=2):
        assert StandIn.made[0].modules["stage"] == "chaos.targets.on_host tests.chaos.planted_bugs x"


def test_a_lost_host_loses_its_link_before_its_processes_and_gets_it_back_before_they_start(
    commands: list[str],
) -> None:
    with HostsTarget({}, num_hosts=2) as target:
        mesh = StandIn.made[0]
        victims = [node for node in target.nodes() if node.host == "0"]
        assert [node.name for node in victims] == ["expert-0", "stage-0"]
        order: list[str] = []
        mesh.stop = lambda name, timeout_s: order.append(f"{commands[-1].split()[-2:]} {name} {timeout_s}")  # type: ignore[method-assign]
        fault = HostLoss()
        fault.apply(target, victims)
        assert order == ["['host0', 'down'] expert-0 0.0", "['host0', 'down'] stage-0 0.0"]
        mesh.start = lambda name: order.append(f"{commands[-1].split()[-2:]} {name}")  # type: ignore[method-assign]
        fault.heal(target)
        fault.heal(target)
        assert order[2:] == ["['host0', 'up'] stage-0", "['host0', 'up'] expert-0"]


def test_who_runs_on_no_host_cannot_lose_it(commands: list[str]) -> None:
    with HostsTarget({}, num_hosts=2) as target, pytest.raises(TargetError, match="runs on no played host"):
        HostLoss().apply(target, [node for node in target.nodes() if node.kind == "router"])


def test_what_was_made_is_removed_also_when_the_mesh_does_not_start(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TargetError("no mesh")

    monkeypatch.setattr(local_target, "LocalMesh", fails)
    with pytest.raises(TargetError, match="no mesh"):
        HostsTarget({}, num_hosts=2).__enter__()
    made = [line.split()[-1] for line in commands if line.startswith("ip netns add")]
    removed = [line.split()[-1] for line in commands if line.startswith("ip netns delete")]
    assert sorted(made) == sorted(removed)
    assert len(made) == 3


def test_the_link_to_hosts_is_deleted_by_name_before_the_namespace_of_its_other_end(commands: list[str]) -> None:
    with PlayedHosts(1):
        pass
    (made,) = (line.split()[3] for line in commands if line.startswith("ip link add"))
    deleted = commands.index(f"ip link delete {made}")
    assert commands[deleted + 1 :] == [line for line in commands if line.startswith("ip netns delete")]


@pytest.mark.skipif(missing("ip") != "", reason="hosts cannot be played here")
def test_hosts_are_played_again_at_once_while_a_namespace_of_those_before_is_still_there() -> None:
    with ExitStack() as guests:
        for _ in range(3):
            with PlayedHosts(1) as hosts:
                words = ["ip", "netns", "exec", hosts._switch, sys.executable, "-c", "print(1, flush=True); input()"]
                guest = guests.enter_context(
                    subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
                guests.callback(guest.kill)
                assert guest.stdout is not None
                assert guest.stdout.readline() == "1\n", "it is in there, and keeps it"


def test_a_network_in_use_is_not_taken() -> None:
    links = [{"addr_info": [{"local": f"10.213.{number}.1"}]} for number in range(3)]
    assert free_network(json.dumps(links)) == "10.213.3"
    with pytest.raises(TargetError, match="no network"):
        free_network(json.dumps([{"addr_info": [{"local": f"10.213.{number}.1"} for number in range(256)]}]))


@pytest.mark.parametrize("count", [0, 201])
def test_a_number_of_hosts_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(TargetError, match="1 to 200"):
        PlayedHosts(count)


def test_namespaces_of_a_harness_that_was_killed_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr(played_hosts, "run", said.append)
    for name in ("moemesh-chaos-1-host-0", "moemesh-chaos-999999999-switch", "somebody-elses"):
        (tmp_path / name).touch()
    played_hosts.remove_left_over(tmp_path)
    assert said == [
        ["ip", "link", "delete", "mm999999999"],
        ["ip", "netns", "delete", "moemesh-chaos-999999999-switch"],
    ]


def test_a_target_without_hosts_says_so() -> None:
    with pytest.raises(TargetError, match="plays no hosts"):
        HostLoss().apply(_NoHosts(), [Node("stage-0", "stage", 1, host="0")])  # type: ignore[arg-type]


class _NoHosts:
    """A target of another kind."""
