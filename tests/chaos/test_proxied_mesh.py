"""Whole meshes whose links lead through the proxy: local processes, and containers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from chaos.faults.base import Fault
from chaos.faults.cut import Cut
from chaos.faults.cut_in_call import CutInCall
from chaos.faults.delay import Delay
from chaos.faults.frames import Frames
from chaos.faults.half_close import HalfClose
from chaos.faults.stall import Stall
from chaos.proxy.link_proxy import LinkProxy, link_proxy
from chaos.target import Node, Target
from chaos.targets.docker_target import DockerTarget
from chaos.targets.local_target import ProxiedLocalTarget
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.compose.compose_mesh import BUILD_TIMEOUT_S, ComposeMesh, free_port
from tests.support.served.mesh_client import Answer, Ask, mesh_client

WITHIN_S = 90.0
GREEDY = Ask((3, 50, 60), max_tokens=16, ignore_eos=True)
BRIDGE = "172.17.0.1"
"""The engine's own bridge: an address of this machine that every container reaches."""


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


def is_ready(target: Target) -> bool:
    try:
        return httpx.get(f"{target.url}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(target: Target) -> tuple[Answer, float]:
    """The answer and the seconds that it took."""
    with mesh_client(target.url, timeout_s=60) as client:
        started_s = time.monotonic()
        return client.ask(GREEDY), time.monotonic() - started_s


def kinds_linked(proxy: LinkProxy, nodes: list[Node]) -> set[tuple[str, str]]:
    kinds = {node.name: node.kind for node in nodes}
    return {(kinds.get(one, ""), kinds.get(other, "")) for one, other in proxy.links()}


ALL_LINKS = {
    ("stage", "router"),
    ("expert", "router"),
    ("router", "stage"),
    ("router", "expert"),
    ("stage", "stage"),
    ("stage", "expert"),
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedLocalTarget]:
    folder = tmp_path_factory.mktemp("proxied")
    settings = {"MODEL": str(write_tiny_checkpoint(folder / "tiny")), "PP": "2", "EXPERTS": "2", "COPIES": "2"}
    with ProxiedLocalTarget(settings, folder / "logs") as target:
        wait_for("the mesh is ready", lambda: is_ready(target))
        yield target


def expert(target: Target) -> Node:
    wait_for("an expert runs", lambda: any(node.kind == "expert" for node in target.nodes()))
    return next(node for node in target.nodes() if node.kind == "expert")


@pytest.mark.slow
def test_every_kind_of_link_goes_through_and_both_its_ends_are_known(local: ProxiedLocalTarget) -> None:
    ask(local)
    assert kinds_linked(link_proxy(local), local.nodes()) == ALL_LINKS


@pytest.mark.slow
def test_native_code_calls_every_expert_node_over_a_link_of_its_own_that_goes_through_too(
    local: ProxiedLocalTarget,
) -> None:
    fault = CutInCall()
    fault.apply(local, [node for node in local.nodes() if node.kind == "expert"])
    try:
        before, _ = ask(local)
        after, _ = ask(local)
    finally:
        fault.heal(local)
    assert after == before
    assert fault.remark.startswith("links cut in a call: ")
    stages, experts = ([node.name for node in local.nodes() if node.kind == kind] for kind in ("stage", "expert"))

    def have_both() -> bool:
        """A connection for messages, and a link."""
        links = link_proxy(local).links()
        return all(links.count((stage, expert)) == 2 for stage in stages for expert in experts)

    wait_for("links are made again", have_both)


@pytest.mark.slow
def test_a_delayed_expert_slows_the_answer_and_changes_nothing(local: ProxiedLocalTarget) -> None:
    before, _ = ask(local)
    fault = Delay(delay_ms=40)
    assert fault.unavailable(local) == ""
    fault.apply(local, [node for node in local.nodes() if node.kind == "expert"])
    try:
        after, seconds = ask(local)
    finally:
        fault.heal(local)
    assert after == before
    # At least one call to an expert for each of 16 tokens, there and back; a call may be answered by the faster copy.
    assert seconds > 16 * 0.08


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Stall(direction="from"), id="stall"),
        pytest.param(lambda: Cut(kind="off"), id="cut"),
        pytest.param(lambda: HalfClose(), id="half_close"),
        pytest.param(lambda: Frames(kind="replay", percent=50), id="frames"),
    ],
)
def test_after_a_hurt_link_is_healed_the_answer_is_the_same(
    local: ProxiedLocalTarget, make: Callable[[], Fault]
) -> None:
    before, _ = ask(local)
    fault = make()
    assert fault.unavailable(local) == ""
    fault.apply(local, [expert(local)])
    time.sleep(0.5)
    fault.heal(local)
    wait_for("the mesh is ready", lambda: is_ready(local))
    assert ask(local)[0] == before


@pytest.fixture(scope="module")
def containers() -> Iterator[DockerTarget]:
    mesh = ComposeMesh(project=f"moemesh-test-proxied-{free_port()}", port=free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOCKS_PROXY", f"{BRIDGE}:{free_port()}")
        mesh.compose("build", timeout_s=BUILD_TIMEOUT_S)
        try:
            mesh.compose("up", "-d", "--no-build")  # it is a mesh only with the target, through which its links lead
            with DockerTarget(mesh.project) as target:
                mesh.wait_until_ready()
                yield target
        finally:
            mesh.take_down()


@pytest.mark.docker
@pytest.mark.timeout(1800)
def test_containers_find_the_proxy_and_are_known_by_their_names(containers: DockerTarget) -> None:
    assert "proxy" in containers.features
    ask(containers)
    assert kinds_linked(link_proxy(containers), containers.nodes()) == ALL_LINKS


@pytest.mark.docker
@pytest.mark.timeout(1800)
def test_a_delay_between_containers_changes_nothing_but_the_time(containers: DockerTarget) -> None:
    before, _ = ask(containers)
    fault = Delay(delay_ms=40)
    fault.apply(containers, [node for node in containers.nodes() if node.kind == "expert"])
    try:
        after, seconds = ask(containers)
    finally:
        fault.heal(containers)
    assert after == before
    assert seconds > 16 * 0.08
