"""`moemesh up` before anything runs: what it refuses, and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from compose.cli import NO_ROUTER_S, _Progress, app
from compose.tiny_checkpoint import write_tiny_checkpoint


def run_up(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`moemesh up` in a pipe, where it cannot start."""
    return subprocess.run(
        [sys.executable, "-m", "compose.cli", "up"],
        env={**os.environ, "STATE_DIR": str(folder / "s"), "PORT": "0", "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_error_is_one_line_in_a_pipe_whatever_is_in_it(tmp_path: Path) -> None:
    model = tmp_path / f"{'long-' * 40}[/red] [0, 2)"
    model.mkdir(parents=True)
    done = run_up({"MODEL": str(model)}, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("moemesh: ")
    assert str(model) in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [("TP", "5", "TP=5 does not divide"), ("TP", "17", "TP=17: a stage has at most"), ("PP", "5", "PP=5: ")],
)
def test_what_does_not_fit_the_model_is_refused_before_a_process_is_started(
    name: str, value: str, named: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Mock()
    monkeypatch.setattr("compose.cli.LocalMesh", started)
    for setting, given in {"MODEL": str(tiny), "STATE_DIR": str(tmp_path), name: value}.items():
        monkeypatch.setenv(setting, given)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 1
    assert named in result.stderr
    started.assert_not_called()


def test_a_router_that_does_not_answer_for_long_is_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("compose.cli.time.monotonic", lambda: now_s[0])
    with _Progress("starting") as progress:
        progress.show("the router does not listen yet")
        now_s[0] += NO_ROUTER_S
        progress.show("the router does not listen yet")
    assert capsys.readouterr().err.splitlines() == ["starting", "waiting: the router does not listen yet"]
