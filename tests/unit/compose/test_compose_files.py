"""What the Compose files name exists: each variable has a value in mesh.env, each setting is one that is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from common.config import Settings

FOLDER = Path(__file__).parents[3] / "compose"
COMPOSE_TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
NOT_A_SETTING = {"MODEL_SOURCE", "HF_TOKEN", "HF_ENDPOINT"}


def compose_file() -> dict[str, Any]:
    content = yaml.safe_load(COMPOSE_TEXT)
    assert isinstance(content, dict)
    return content


def mesh_variables() -> set[str]:
    lines = (FOLDER / "mesh.env").read_text(encoding="utf-8").splitlines()
    return {line.split("=")[0] for line in lines if "=" in line and not line.startswith("#")}


def test_every_variable_has_its_value_in_mesh_env() -> None:
    code = "\n".join(line for line in COMPOSE_TEXT.splitlines() if not line.lstrip().startswith("#"))
    used = set(re.findall(r"\$\{(\w+)", code))
    assert used == mesh_variables()


def test_every_setting_is_one_that_the_processes_read() -> None:
    services = compose_file()["services"]
    handed_on = {name for service in services.values() for name in service["environment"]}
    unknown = {name for name in handed_on - NOT_A_SETTING if name.lower() not in Settings.model_fields}
    assert unknown == set()


def test_what_a_person_may_set_reaches_the_containers() -> None:
    handed_on = set(compose_file()["x-settings"]) | set(compose_file()["services"]["router"]["environment"])
    # How many stages there are is Compose's own business; labels and addresses differ in every container.
    elsewhere = {"stages", "advertise_host", "host_label"}
    assert {name.upper() for name in Settings.model_fields.keys() - elsewhere} <= handed_on


def test_published_ports_name_the_host_address() -> None:
    for service in compose_file()["services"].values():
        assert all(port.startswith("${HOST}:") for port in service.get("ports", []))
