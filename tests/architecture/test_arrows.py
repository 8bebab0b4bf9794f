"""Arrows run one way. A new arrow is a change of design, and is made here first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.architecture.sources import ROOT, Module, modules

SERVICES = ("router", "stage", "expert")
OWN = ("common", "services", "compose", "chaos", "tests")
PURE_PACKAGES = ("services.router.scheduling", "services.router.control")
PURE_MODULES = (
    "common.array",
    "common.child_exit",
    "common.codec",
    "common.errors",
    "common.ids",
    "common.membership",
    "common.messages",
    "common.misspelt_settings",
    "common.model_config",
    "common.model_refusals",
    "common.rope_config",
    "common.topology",
    "services.expert.grouping",
    "services.router.engine",
    "services.router.mesh_status",
    "services.router.step_message",
    "services.stage.dispatch",
    "services.stage.micro_batch",
    "services.stage.ranks.cut",
    "services.stage.replica_selection",
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
TORCH_FILES = ("common.tensor", "common.weights", "common.numeric_class", "common.compute")


def of(*packages: str) -> list[Module]:
    return [module for module in modules() if module.is_in(*packages)]


def arrows(chosen: list[Module], forbidden: Callable[[Module], list[str]]) -> list[str]:
    return [f"{module.name} -> {imported}" for module in chosen for imported in forbidden(module)]


def test_the_reader_of_imports_sees_the_tree() -> None:
    names = {module.name for module in modules()}
    assert {"common.codec", "services.router.__main__", "services.stage.model", "compose.cli"} <= names
    router_loop = next(module for module in modules() if module.name == "services.router.mesh_loop")
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
        arrows(of(*PURE_PACKAGES), lambda module: module.imports_any("torch", "common.transport", "common.node")) == []
    )


def test_the_messages_know_ids_only_and_the_codec_no_transport() -> None:
    allowed = {
        "common.ids": (),
        "common.errors": (),
        "common.messages": ("common.ids",),
        "common.topology": ("common.ids",),
        "common.codec": ("common.ids", "common.errors", "common.messages"),
        "common.socket_files": (),
        "common.echo": (),
        "common.socket_limits": (),
        "common.transport": (
            "common.ids",
            "common.errors",
            "common.messages",
            "common.codec",
            "common.echo",
            "common.socket_files",
            "common.socket_limits",
        ),
    }
    names = {module.name for module in modules()}
    for module in modules():
        if module.name in allowed:
            imported = {name for name in module.imports_any("common") if name in names} - {"common"}
            imported = {name for name in imported if not name.startswith("common.messages.")}  # parts of one thing
            assert imported <= set(allowed[module.name]), module.name


def test_the_front_knows_the_mesh_only_by_its_seam() -> None:
    mesh = [
        f"services.router.{name}"
        for name in ("mesh_loop", "mesh_client", "mesh_engine", "mesh_status", "mesh_metrics", "step_flow", "control")
    ]
    assert (
        arrows(of("services.router.front"), lambda module: module.imports_any(*mesh, "zmq", "common.transport")) == []
    )


def test_nothing_of_the_project_is_unpickled_or_evaluated() -> None:
    chosen = [module for module in modules() if not module.is_in("tests")]
    assert arrows(chosen, lambda module: module.imports_any("pickle", "marshal", "shelve", "dill")) == []


def test_every_folder_is_a_package_that_says_what_it_is() -> None:
    folders = {module.path.parent for module in modules()}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
    # The name of a test module says which module it tests.
    silent = [module.name for module in modules() if not module.docstring and not module.path.name.startswith("test_")]
    assert silent == []


def test_files_stay_short() -> None:
    """300 lines are a reason to look for the second concept in a file; tests may be longer, as lists of cases are."""
    limits = {module.name: 500 if module.is_in("tests") else 400 for module in modules()}
    assert [module.name for module in modules() if module.num_lines > limits[module.name]] == []
    written = [module for module in modules() if not module.is_in("tests")]
    long = [module.name for module in written if module.num_lines > 300]
    assert len(long) <= 0.05 * len(written), long


@pytest.mark.parametrize("entry", ["services.router.__main__", "compose.cli", "services.router.service"])
def test_what_runs_without_torch_does_not_load_it(entry: str) -> None:
    code = f"import sys, {entry}; print(sorted({{'torch', 'transformers', 'safetensors.torch'}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
