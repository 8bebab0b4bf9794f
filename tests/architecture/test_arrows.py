"""Arrows run one way. A new arrow is a change of design, and is made here first."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.architecture.sources import ROOT, Module, modules

SERVICES = ("router", "stage", "expert")
OWN = ("common", "services", "compose", "chaos", "tests")
PURE_PACKAGES = ("services.router.scheduling", "services.router.control")
PURE_MODULES = (
    "common.checkpoint.model_config",
    "common.checkpoint.rope_config",
    "common.errors",
    "common.ids",
    "common.messages",
    "common.misspelt_settings",
    "common.processes.child_exit",
    "common.topology",
    "common.wire.array",
    "common.wire.codec",
    "common.wire.records",
    "services.expert.calls",
    "services.router.engine",
    "services.router.mesh.status",
    "services.router.mesh.step_message",
    "services.stage.experts.dispatch",
    "services.stage.model.micro_batch",
    "services.stage.model.tp_shard",
)
IMPURE = (
    "zmq",
    "fastapi",
    "uvicorn",
    "httpx",
    "docker",
    "asyncio",
    "structlog",
    "time",
    "logging",
    "threading",
    "socket",
)
TORCH_FILES = ("common.wire.tensor", "common.checkpoint.weights", "common.compute")
MAX_LINES = 600
MAX_FILES = 12
CATALOGS = ("chaos/faults", "compose/demo/tasks", "tests/benchmarks")
"""Folders of like things, of which there may be as many as there are."""


def of(*packages: str) -> list[Module]:
    return [module for module in modules() if module.is_in(*packages)]


def arrows(chosen: list[Module], forbidden: Callable[[Module], list[str]]) -> list[str]:
    return [f"{module.name} -> {imported}" for module in chosen for imported in forbidden(module)]


def test_the_reader_of_imports_sees_the_tree() -> None:
    names = {module.name for module in modules()}
    assert {"common.wire.codec", "services.router.__main__", "services.stage.model", "compose.cli"} <= names
    router_loop = next(module for module in modules() if module.name == "services.router.mesh.loop")
    assert router_loop.imports_any("common.messages")
    assert router_loop.imports_any("services.router.control")


def test_common_imports_nothing_of_the_rest() -> None:
    others = tuple(package for package in OWN if package != "common")
    assert arrows(of("common"), lambda module: module.imports_any(*others)) == []


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_common_and_itself_only(service: str) -> None:
    own = f"services.{service}"
    foreign = ("compose", "chaos", "tests", *(f"services.{other}" for other in SERVICES if other != service))
    assert of(own)
    assert arrows(of(own), lambda module: module.imports_any(*foreign)) == []


def test_chaos_imports_common_only() -> None:
    assert arrows(of("chaos"), lambda module: module.imports_any("services", "compose", "tests")) == []


def test_compose_imports_no_tests_and_of_services_only_what_is_pure() -> None:
    assert arrows(of("compose"), lambda module: module.imports_any("tests")) == []
    pure = {module.name for module in of(*PURE_PACKAGES, *PURE_MODULES)}
    own = {module.name for module in modules()}
    impure = arrows(
        of("compose"),
        lambda module: [name for name in module.imports_any("services") if name in own and name not in pure],
    )
    assert [arrow for arrow in impure if not arrow.endswith(("-> services", *(f"-> {p}" for p in PURE_PACKAGES)))] == []


def test_no_torch_in_the_router() -> None:
    chosen = [module for module in of("services.router", "compose") if not module.is_in("compose.demo")]
    assert arrows(chosen, lambda module: module.imports_any("torch", *TORCH_FILES)) == []


def test_no_torch_in_common_but_in_the_files_that_are_named() -> None:
    rest = [module for module in of("common") if not module.is_in(*TORCH_FILES)]
    # What stage and expert processes share imports none of these either: the router loads it too.
    assert arrows(rest, lambda module: module.imports_any("torch", *TORCH_FILES)) == []


def test_pure_files_do_no_io_and_read_no_clock() -> None:
    chosen = of(*PURE_PACKAGES, *PURE_MODULES)
    assert {module.name for module in chosen} >= set(PURE_MODULES)
    assert arrows(chosen, lambda module: module.imports_any(*IMPURE)) == []


def test_the_decisions_of_the_router_know_no_torch_and_no_sockets_of_ours() -> None:
    assert (
        arrows(
            of(*PURE_PACKAGES),
            lambda module: module.imports_any("torch", "common.wire.transport", "common.node.control_link"),
        )
        == []
    )


def test_the_messages_know_ids_only_and_the_codec_no_transport() -> None:
    allowed = {
        "common.ids": (),
        "common.errors": (),
        "common.messages": ("common.ids",),
        "common.topology": ("common.ids",),
        "common.wire.codec": ("common.ids", "common.errors", "common.messages"),
        "common.wire.socket_files": (),
        "common.wire.tcp_resends": (),
        "common.wire.transport": (
            "common.ids",
            "common.errors",
            "common.messages",
            "common.wire.codec",
            "common.wire.socket_files",
            "common.wire.tcp_resends",
        ),
    }
    names = {module.name for module in modules()}
    for module in modules():
        if module.name in allowed:
            imported = {name for name in module.imports_any("common") if name in names} - {"common"}
            assert imported <= set(allowed[module.name]), module.name


def test_the_front_knows_the_mesh_only_by_its_seam() -> None:
    mesh = (
        "services.router.mesh",
        "services.router.control",
        "services.router.scheduling",
        "zmq",
        "common.wire.transport",
    )
    assert arrows(of("services.router.front"), lambda module: module.imports_any(*mesh)) == []


def test_nothing_of_the_project_is_unpickled_or_evaluated() -> None:
    chosen = [module for module in modules() if not module.is_in("tests")]
    assert arrows(chosen, lambda module: module.imports_any("pickle", "marshal", "shelve", "dill")) == []


def test_every_folder_is_a_package_that_says_what_it_is() -> None:
    folders = {module.path.parent for module in modules()}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
    # The name of a test module says which module it tests.
    silent = [module.name for module in modules() if not module.docstring and not module.path.name.startswith("test_")]
    assert silent == []


def test_a_file_is_read_in_one_sitting() -> None:
    assert [module.name for module in modules() if module.num_lines > MAX_LINES] == []


def test_a_folder_is_seen_at_a_glance() -> None:
    """Of what services and tests are made; a folder of tests has as many of them as there is to test."""
    counts = Counter(
        str(module.path.parent.relative_to(ROOT)) for module in modules() if not module.path.name.startswith("test_")
    )
    crowded = {folder for folder, count in counts.items() if count > MAX_FILES and folder not in CATALOGS}
    assert sorted(crowded) == []


@pytest.mark.parametrize("entry", ["services.router.__main__", "compose.cli", "services.router.service"])
def test_what_runs_without_torch_does_not_load_it(entry: str) -> None:
    code = f"import sys, {entry}; print(sorted({{'torch', 'transformers', 'safetensors.torch'}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
