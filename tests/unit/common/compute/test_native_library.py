from __future__ import annotations

import ast
import fcntl
import os
import platform
import pwd
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import structlog

from common.compute import native_library
from common.compute.native_library import (
    INSTRUCTION_SETS,
    bits_variant,
    compile_cached,
    compile_to,
    compiler_turn,
    default_cache_folder,
    find_compiler,
    library_name,
    load_native_kernels,
    read_cpu_flags,
    source_hash,
    usable_instruction_sets,
)
from tests.support.nodes.kernels import kernels_for

V4_BF16, V4, V3, BASE, _ = INSTRUCTION_SETS


@pytest.fixture
def on_x86_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("on_x86_64")
def test_best_set_comes_first_and_needs_all_its_cpu_flags() -> None:
    assert usable_instruction_sets(V4_BF16.cpu_flags) == [V4_BF16, V4, V3, BASE]
    assert usable_instruction_sets(V4.cpu_flags) == [V4, V3, BASE]
    assert usable_instruction_sets(V3.cpu_flags - {"fma"}) == [BASE]


def test_another_machine_gets_none_of_these_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert usable_instruction_sets(V4_BF16.cpu_flags) == []


def test_cpu_flags_are_read_from_either_spelling(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fma avx2\n\nprocessor\t: 1\nflags\t\t: fma\n")
    assert read_cpu_flags(cpuinfo) == {"fma", "avx2"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: asimd\n")
    assert read_cpu_flags(cpuinfo) == {"asimd"}
    assert read_cpu_flags(tmp_path / "absent") == frozenset()


def test_kernels_whose_sums_are_the_processors_name_its_vendor(tmp_path: Path) -> None:
    """`vdpbf16ps` adds the products of a pair in an order of its own, and need not do so on another vendor's chip."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fma avx2\n")
    assert bits_variant("avx512bf16", cpuinfo) == "avx512bf16-GenuineIntel"
    assert bits_variant("avx512", cpuinfo) == "avx512"
    assert bits_variant("avx512bf16", tmp_path / "absent") == "avx512bf16-unknown-vendor"


def test_kernels_of_another_source_are_another_class() -> None:
    """In a mesh that is upgraded node by node; nodes of one class are held to equal bits."""
    kernels = kernels_for("native")
    assert kernels is not None
    assert kernels.variant.endswith(f"-{source_hash()[:8]}")


def test_no_compiler_and_no_prebuilt_library_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_native_kernels(prebuilt_folder=tmp_path, cache_folder=tmp_path, environment={}) is None


def test_compiler_that_fails_means_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    kernels = load_native_kernels(
        prebuilt_folder=tmp_path / "absent", cache_folder=tmp_path / "cache", environment={"CXX": str(broken)}
    )
    assert kernels is None


def test_prebuilt_library_wins_over_compiling(tmp_path: Path) -> None:
    compiled = kernels_for("native")
    assert compiled is not None
    best = usable_instruction_sets(read_cpu_flags())[0]
    (tmp_path / library_name(best)).write_bytes(compiled.path.read_bytes())
    kernels = load_native_kernels(prebuilt_folder=tmp_path, cache_folder=tmp_path / "cache", environment={"CXX": "no"})
    assert kernels is not None
    assert kernels.path.parent == tmp_path
    assert kernels.variant == compiled.variant
    assert kernels.variant.startswith("native-")


def test_prebuilt_library_that_does_not_load_is_passed_over(tmp_path: Path) -> None:
    for one in usable_instruction_sets(read_cpu_flags()):
        (tmp_path / library_name(one)).write_bytes(b"not a library")
    assert load_native_kernels(prebuilt_folder=tmp_path, cache_folder=tmp_path, environment={"CXX": "no"}) is None


@pytest.fixture
def without_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As a container's user has it whose number no file names; what stands in place of /tmp."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_goes_on_with_a_folder_of_its_own_and_is_told_of_the_setting(
    without_home: Path,
) -> None:
    with structlog.testing.capture_logs() as logs:
        folder = default_cache_folder({})
    assert folder == without_home / f"moemesh-cache-{os.getuid()}"
    assert "MOEMESH_CACHE" in logs[0]["reason"]
    assert default_cache_folder({"MOEMESH_CACHE": "/somewhere"}) == Path("/somewhere")


def test_a_home_that_cannot_be_written_to_is_none(monkeypatch: pytest.MonkeyPatch, without_home: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/1")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert default_cache_folder({}).parent == without_home


def test_compiled_code_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    (tmp_path / "theirs").mkdir()
    if uid == 0:
        os.chown(tmp_path / "theirs", 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user: MOEMESH_CACHE"):
        compile_cached(INSTRUCTION_SETS[0], find_compiler(os.environ) or "g++", tmp_path / "theirs")


def test_a_process_that_compiles_is_waited_for_and_one_that_was_stopped_is_not_for_ever(tmp_path: Path) -> None:
    now_s = [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if is_done and now_s[0] >= 3.0:
            other.close()

    for is_done in (True, False):
        (tmp_path / "cache").mkdir(exist_ok=True)
        other = (tmp_path / "cache" / "compile.lock").open("w")
        fcntl.flock(other, fcntl.LOCK_EX)
        now_s[0] = 0.0
        with compiler_turn(tmp_path / "cache", 10.0, lambda: now_s[0], sleep):
            assert now_s[0] == pytest.approx(3.0 if is_done else 10.0, abs=0.1)
        other.close()


def test_cache_folder_is_a_setting() -> None:
    assert default_cache_folder({"MOEMESH_CACHE": "/somewhere"}) == Path("/somewhere")
    assert default_cache_folder({}) == Path.home() / ".cache" / "moemesh"


def test_processes_that_build_at_once_leave_one_whole_library(tmp_path: Path) -> None:
    writer = tmp_path / "slow-compiler"
    writer.write_text('#!/bin/sh\nfor last; do :; done\nprintf half > "$last"\nsleep 0.02\nprintf whole > "$last"\n')
    writer.chmod(0o755)
    path = tmp_path / "cache" / "kernels.so"
    with ThreadPoolExecutor(5) as executor:
        list(executor.map(lambda _: compile_to(path, BASE, str(writer)), range(5)))
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["kernels.so"]


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, ids=lambda one: one.name)
def test_every_set_compiles_without_warnings(
    instruction_set: native_library.InstructionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = find_compiler({})
    if compiler is None or instruction_set.machine != platform.machine():
        pytest.skip("needs a compiler for that machine")
    # gcc 12 warns of its own AVX-512 header
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
    monkeypatch.setattr(native_library, "COMMON_FLAGS", (*native_library.COMMON_FLAGS, *warnings))
    try:
        compile_to(tmp_path / "kernels.so", instruction_set, compiler)
    except subprocess.CalledProcessError as failure:
        pytest.fail(failure.stderr.decode())


def test_the_module_that_builds_kernels_imports_nothing_of_ours() -> None:
    """Images build them from this folder alone, before anything else is there."""
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in ast.walk(ast.parse(Path(native_library.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name for name in imported if name.split(".")[0] in ("common", "services", "compose", "chaos")}
