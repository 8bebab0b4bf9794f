"""MODEL means the same to people whether it is a directory, a hub name or nothing; containers see a path."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from compose.container import become, is_healthy, main, process_environment, router_answers


def test_without_a_model_the_demo_model_is_served() -> None:
    found = process_environment({"MODEL": "", "PP": "2"})
    assert found == {"MODEL": "/checkpoint/moemesh-demo", "SERVED_NAME": "moemesh-demo", "PP": "2"}


@pytest.mark.parametrize("model", ["/data/mixtral-8x7b", "./mixtral-8x7b/", "../models/mixtral-8x7b"])
def test_a_host_directory_is_served_under_its_own_name(model: str) -> None:
    found = process_environment({"MODEL": model, "MODEL_SOURCE": ""})
    assert (found["MODEL"], found["SERVED_NAME"]) == ("/checkpoint", "mixtral-8x7b")


def test_a_hub_name_is_handed_on_and_read_from_the_volume_without_the_hub() -> None:
    found = process_environment({"MODEL": "owner/name", "MODEL_SOURCE": "models"}, mount=Path("/somewhere"))
    assert (found["MODEL"], found["SERVED_NAME"]) == ("owner/name", "name")
    assert (found["HF_HOME"], found["HF_HUB_OFFLINE"]) == ("/somewhere", "1")


def test_a_served_name_that_was_given_wins() -> None:
    assert process_environment({"MODEL": "/data/a", "SERVED_NAME": "mine"})["SERVED_NAME"] == "mine"


def test_a_container_becomes_the_process_with_the_changed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str]] = []

    def run_module(name: str, run_name: str, alter_sys: bool) -> None:
        started.append((name, os.environ["MODEL"]))

    monkeypatch.setattr("runpy.run_module", run_module)
    monkeypatch.setattr("os.environ", {"MODEL": "/data/mixtral"})
    monkeypatch.setattr("sys.argv", ["container"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["services.stage"]) == 0
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started == [("services.stage", "/checkpoint")]


def test_a_directory_without_a_config_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compose.container.CHECKPOINT_MOUNT", tmp_path)
    monkeypatch.setenv("MODEL", "/data/empty")
    monkeypatch.delenv("MODEL_SOURCE", raising=False)
    assert main(["prepare"]) == 2
    assert "MODEL=/data/empty holds no config.json" in capsys.readouterr().err


def test_no_router_is_not_healthy(tmp_path: Path) -> None:
    assert not router_answers("1", "/health")
    assert not is_healthy("1", tmp_path / "ready")


def test_a_router_is_healthy_once_the_mesh_is_ready_and_then_as_long_as_it_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers: set[str] = set()
    monkeypatch.setattr("compose.container.router_answers", lambda port, path: path in answers)
    seen: list[bool] = []
    for now in ({"/health"}, {"/health", "/ready"}, {"/health"}, set(), {"/health"}):
        answers = now
        seen.append(is_healthy("8000", tmp_path / "ready"))
    assert seen == [False, True, True, False, True]


def test_a_router_that_starts_again_in_its_container_has_to_become_ready_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = tmp_path / "ready"
    monkeypatch.setattr("compose.container.READY_BEFORE", before)
    monkeypatch.setattr("compose.container.runpy.run_module", lambda *arguments, **named: None)
    monkeypatch.setattr("compose.container.signal.signal", lambda *arguments: None)
    monkeypatch.setattr("compose.container.sys.argv", [])
    monkeypatch.setattr("compose.container.os.environ", {})
    for module, is_left in (("services.stage", True), ("services.router", False)):
        before.touch()
        become(module)
        assert before.exists() is is_left
