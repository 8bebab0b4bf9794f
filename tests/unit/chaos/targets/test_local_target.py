"""The supervisor's mesh as a target. No process is started here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from chaos.target import Node, TargetError
from chaos.targets import local_target
from chaos.targets.local_target import LocalTarget
from common.errors import ConfigurationError


class StandIn:
    """In place of LocalMesh."""

    made: list[StandIn]

    def __init__(
        self, environment: dict[str, str], state_dir: Path, modules: dict[str, str], places: dict[str, dict[str, str]]
    ) -> None:
        self.environment, self.state_dir, self.modules = environment, state_dir, modules
        self.places = places
        self.calls: list[tuple[object, ...]] = []
        self.made.append(self)

    def __enter__(self) -> StandIn:
        (self.state_dir / "logs").mkdir()
        (self.state_dir / "logs" / "stage-0.log").write_text("hello")
        return self

    def close(self) -> None:
        self.calls.append(("close",))

    def kinds(self) -> dict[str, str]:
        return {"stage-0": "stage", "router-0": "router", "expert-0": "expert"}

    def processes(self) -> list[tuple[str, int]]:
        return [("stage-0", 11), ("router-0", 10)]

    def stop(self, name: str, timeout_s: float) -> None:
        self.calls.append(("stop", name, timeout_s))

    def start(self, name: str) -> None:
        raise ConfigurationError(f"{name} is not part of this mesh")

    def scale(self, kind: str, count: int) -> None:
        self.calls.append(("scale", kind, count))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn.made = []
    monkeypatch.setattr(local_target, "LocalMesh", StandIn)
    monkeypatch.delenv("MODEL", raising=False)


def test_the_mesh_has_a_fixed_port_the_suites_settings_and_the_demo_model() -> None:
    with LocalTarget({"PP": "3", "PORT": "1"}) as target:
        (mesh,) = StandIn.made
        assert mesh.environment["PP"] == "3"
        assert target.url == f"http://127.0.0.1:{mesh.environment['PORT']}"
        assert mesh.environment["PORT"] not in ("0", "1")
        assert (Path(mesh.environment["MODEL"]) / "config.json").exists()


def test_model_of_the_environment_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "/some/model")
    with LocalTarget({}):
        assert StandIn.made[0].environment["MODEL"] == "/some/model"


def test_those_who_run_are_nodes_by_name_and_the_state_goes_with_the_mesh_but_not_its_logs(tmp_path: Path) -> None:
    with LocalTarget({}, tmp_path / "logs") as target:
        assert target.nodes() == [Node("router-0", "router", 10), Node("stage-0", "stage", 11)]
        state_dir = StandIn.made[0].state_dir
        assert state_dir.exists()
    assert not state_dir.exists()
    assert StandIn.made[0].calls == [("close",)]
    assert (tmp_path / "logs" / "stage-0.log").read_text() == "hello"


def test_signals_go_only_to_the_process_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with LocalTarget({}) as target:
        target.signal(Node("stage-0", "stage", 11), signal.SIGSTOP)
        target.signal(Node("stage-0", "stage", 12), signal.SIGKILL)
    assert sent == [(11, signal.SIGSTOP)], "12 was an earlier process; its number may be anybody's by now"


def test_stopping_and_scaling_are_the_supervisors_and_its_refusals_are_sentences() -> None:
    with LocalTarget({}) as target:
        target.stop(Node("stage-0", "stage", 11), 3.0)
        target.scale("expert", 4)
        with pytest.raises(TargetError, match="stage-9 is not part of this mesh"):
            target.start("stage-9")
        with pytest.raises(TargetError, match="router cannot be scaled"):
            target.scale("router", 2)
    assert StandIn.made[0].calls == [("stop", "stage-0", 3.0), ("scale", "expert", 4), ("close",)]


def test_outside_of_the_context_there_is_no_mesh() -> None:
    with pytest.raises(TargetError, match="not started"):
        LocalTarget({}).nodes()
