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


def gpu_file() -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text(encoding="utf-8"))
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
    # How many stages there are and where rings are is Compose's own business; labels and addresses differ in every one.
    elsewhere = {"stages", "advertise_host", "host_label", "rings_folder"}
    assert {name.upper() for name in Settings.model_fields.keys() - elsewhere} <= handed_on


def test_published_ports_name_the_host_address() -> None:
    for service in compose_file()["services"].values():
        assert all(port.startswith("${HOST}:") for port in service.get("ports", []))


def test_the_router_knows_the_address_at_which_its_port_is_published() -> None:
    """Inside its container it listens on all, where a web page with a name of its own is none of its concern."""
    router = compose_file()["services"]["router"]
    (port,) = router["ports"]
    assert router["environment"]["PUBLISHED_HOST"] == port.partition(":")[0] == "${HOST}"


def test_the_gpu_file_changes_services_that_there_are_and_gives_each_that_computes_a_gpu() -> None:
    base, gpu = compose_file()["services"], gpu_file()["services"]
    assert set(gpu) == {"stage", "expert"} <= set(base)
    for name, service in gpu.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert service["environment"]["DEVICE"] == f"${{{name.upper()}_DEVICE:-cuda}}"
        settings = {each for each in service["environment"] if each.lower() in Settings.model_fields}
        assert settings == {"DEVICE", "DEVICE_PROCESSES"}


def test_the_gpu_file_needs_no_variable_and_has_an_image_of_its_own() -> None:
    """Values of mesh.env are those of the included file alone."""
    text = (FOLDER / "compose.gpu.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\$\{\w+\}", text) == []
    images = {service["image"] for service in gpu_file()["services"].values()}
    assert len(images) == 1
    assert images.isdisjoint({"moemesh-worker", "moemesh-router"})


def test_both_images_have_the_torch_that_the_project_asks_for() -> None:
    asked = re.search(r"torch==([\d.]+)", (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert asked is not None
    arguments, of_cpu = gpu_file()["services"]["stage"]["build"]["args"], compose_file()["services"]["stage"]["build"]
    assert set(arguments) == {"TORCH", "TORCH_INDEX_URL"} <= set(of_cpu["args"])
    assert arguments["TORCH"].startswith(f"${{TORCH_CUDA:-{asked[1]}+cu")
    assert f"TORCH={asked[1]}+cpu\n" in (FOLDER / "mesh.env").read_text(encoding="utf-8")
