"""What an image installs is what pyproject.toml says, and the router's share of it has no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from compose.list_dependencies import dependencies

REPOSITORY = Path(__file__).parents[3]
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">")[0].split("=")[0].split("[")[0] for requirement in requirements}


def test_only_workers_get_torch() -> None:
    assert "torch" not in names(dependencies(PYPROJECT, []) + dependencies(PYPROJECT, ["router"]))
    assert dependencies(PYPROJECT, ["worker"]) == ["torch==2.13.0"]


def test_an_unknown_extra_is_an_error() -> None:
    with pytest.raises(KeyError):
        dependencies(PYPROJECT, ["nothing"])


def test_every_dependency_is_locked_to_one_version() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lock if "==" in line}
    wanted = names(dependencies(PYPROJECT, []) + dependencies(PYPROJECT, ["router", "worker", "cli", "dev"]))
    assert {name.lower().replace("_", "-") for name in wanted} <= locked


def test_the_lock_names_versions_and_no_places() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert " @ " not in lock
    assert "+cpu" not in lock
