"""Compiles native/kernels.cpp for this processor, or finds a prebuilt variant, and loads it through ctypes.

Order of choice: the best prebuilt variant that the processor can run (a Docker image has them and no compiler), else a
compiled one from the cache folder, else none: the callers then compute with torch, by the same rule, slower.

`python -m common.compute.native_library --output DIR` builds all variants ahead of time.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

ABI_VERSION = 11
LOOK_S = 0.05
"""How long to wait between looks at whether another process has finished compiling."""
SOURCE = Path(__file__).parent / "native" / "kernels.cpp"
PREBUILT_FOLDER = Path(__file__).parent / "native" / "prebuilt"
# Contraction stays off: which products are fused is written in the source, not chosen by the compiler.
COMMON_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
)
COMPILE_TIMEOUT_S = 180.0

log = structlog.get_logger(__name__)


CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One way to compile the kernels: its name, the compiler's flags, and the /proc/cpuinfo flags that it needs."""

    name: str
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    machine: str


_V3_CPU_FLAGS = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4_CPU_FLAGS = _V3_CPU_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# Best first.
INSTRUCTION_SETS = (
    InstructionSet(
        "x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4_CPU_FLAGS | {"avx512_bf16"}, machine="x86_64"
    ),
    InstructionSet("x86-64-v4", ("-march=x86-64-v4",), _V4_CPU_FLAGS, machine="x86_64"),
    InstructionSet("x86-64-v3", ("-march=x86-64-v3",), _V3_CPU_FLAGS, machine="x86_64"),
    InstructionSet("x86-64", (), frozenset(), machine="x86_64"),
    InstructionSet("aarch64", (), frozenset(), machine="aarch64"),
)


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The loaded kernels as C functions, argument types set. `variant` names what decides their bits."""

    variant: str
    threads: int
    path: Path
    linear: ctypes._NamedFuncPointer
    pack: ctypes._NamedFuncPointer
    packed_values: ctypes._NamedFuncPointer
    gated_ffn: ctypes._NamedFuncPointer
    attention: ctypes._NamedFuncPointer
    write_kv: ctypes._NamedFuncPointer
    rms_norm: ctypes._NamedFuncPointer
    rope: ctypes._NamedFuncPointer
    gated_product: ctypes._NamedFuncPointer
    choose_tokens: ctypes._NamedFuncPointer
    set_word: ctypes._NamedFuncPointer
    await_word: ctypes._NamedFuncPointer
    start_call_server: ctypes._NamedFuncPointer
    end_call_server: ctypes._NamedFuncPointer
    open_links: ctypes._NamedFuncPointer
    add_ring: ctypes._NamedFuncPointer
    remove_ring: ctypes._NamedFuncPointer
    set_held_shards: ctypes._NamedFuncPointer
    read_call_counts: ctypes._NamedFuncPointer
    link_seal: ctypes._NamedFuncPointer
    receive_answers: ctypes._NamedFuncPointer
    ask_experts: ctypes._NamedFuncPointer
    await_answers: ctypes._NamedFuncPointer
    take_call_back: ctypes._NamedFuncPointer
    sum_experts: ctypes._NamedFuncPointer
    choose_experts: ctypes._NamedFuncPointer
    layer_half: ctypes._NamedFuncPointer
    run_layers: ctypes._NamedFuncPointer


def load_native_kernels(
    *,
    threads: int = 1,
    cache_folder: Path | None = None,
    prebuilt_folder: Path = PREBUILT_FOLDER,
    cpu_flags: frozenset[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> NativeKernels | None:
    """Returns the kernels for this processor; None, with the reason logged, where there is no prebuilt library and no
    compiler.

    `threads`: on how many threads one call computes, at most; it changes no bits.
    `cache_folder`: where compiled libraries are kept; default the variable MOEMESH_CACHE, else ~/.cache/moemesh.
    """
    flags = read_cpu_flags() if cpu_flags is None else cpu_flags
    usable = usable_instruction_sets(flags)
    for instruction_set in usable:
        prebuilt = prebuilt_folder / library_name(instruction_set)
        if prebuilt.is_file():
            try:
                return _opened(prebuilt, threads)
            except OSError as failure:
                # Built against a newer C++ runtime than this machine's, say.
                log.warning("native_kernels_not_loaded", path=str(prebuilt), reason=str(failure))
    compiler = find_compiler(environment)
    if compiler is None:
        log.warning("native_kernels_absent", reason="no prebuilt library fits and no C++ compiler is installed")
        return None
    folder = cache_folder if cache_folder is not None else default_cache_folder(environment)
    for instruction_set in usable:
        try:
            return _opened(compile_cached(instruction_set, compiler, folder), threads)
        except (OSError, subprocess.SubprocessError) as failure:
            # An older compiler may not know the newest instructions: the next set may do.
            log.warning("native_kernels_not_built", instruction_set=instruction_set.name, reason=_reason(failure))
    return None


def read_cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Returns the processor's feature flags as Linux names them; empty where they cannot be read."""
    return frozenset(_read_cpuinfo(cpuinfo, "flags", "Features").split())


def bits_variant(variant: str, cpuinfo: Path = CPUINFO) -> str:
    """Returns what decides the bits of kernels of this variant.

    The order in which `vdpbf16ps` adds the two products of a pair, and what becomes of denormals, is the processor's:
    until two vendors are shown to agree, each is a class of its own.
    """
    if variant != "avx512bf16":
        return variant
    return f"{variant}-{_read_cpuinfo(cpuinfo, 'vendor_id') or 'unknown-vendor'}"


def _read_cpuinfo(cpuinfo: Path, *names: str) -> str:
    """Returns the first value under one of these names; "" where there is none."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def usable_instruction_sets(cpu_flags: frozenset[str]) -> list[InstructionSet]:
    """Returns the sets that a processor with these flags can run, best first."""
    return [one for one in INSTRUCTION_SETS if one.machine == platform.machine() and one.cpu_flags <= cpu_flags]


def library_name(instruction_set: InstructionSet) -> str:
    """Returns the file name of a prebuilt variant; the hash of the source keeps a stale one from being loaded."""
    return f"kernels-{instruction_set.name}-{source_hash()[:12]}.so"


def source_hash() -> str:
    """Hex digest of kernels.cpp and of every header beside it."""
    digest = hashlib.sha256()
    for path in sorted([SOURCE, *SOURCE.parent.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_compiler(environment: Mapping[str, str]) -> str | None:
    """CXX where it is set, else the first of g++, clang++, c++ on the path."""
    candidates = [environment["CXX"]] if environment.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def compile_cached(instruction_set: InstructionSet, compiler: str, folder: Path) -> Path:
    """Returns the compiled library, from the folder if it is there. Raises OSError or SubprocessError if it cannot be
    made."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S).stdout
    key = hashlib.sha256(version)
    key.update(" ".join((compiler, *COMMON_FLAGS, *instruction_set.compiler_flags)).encode())
    key.update(source_hash().encode())
    path = folder / f"kernels-{instruction_set.name}-{key.hexdigest()[:16]}.so"
    refuse_folder_of_others(folder)
    if not path.is_file():
        # The processes of a mesh start together: one compiles, the others wait for it rather than all do the same.
        with compiler_turn(folder, COMPILE_TIMEOUT_S):
            if not path.is_file():
                compile_to(path, instruction_set, compiler)
    return path


def compile_to(path: Path, instruction_set: InstructionSet, compiler: str) -> None:
    """Compiles beside `path` and renames: several processes may do so at once, each sees a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as build:
        result = Path(build) / path.name
        command = [compiler, *COMMON_FLAGS, *instruction_set.compiler_flags, str(SOURCE), "-o", str(result)]
        subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(result, path)


_LETTERS: dict[str, Any] = {"a": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
"""Letters of signatures: an address, a whole number, a float."""


def _opened(path: Path, threads: int) -> NativeKernels:
    library = ctypes.CDLL(str(path))
    # Small calls keep the GIL: giving it up and waiting for it again can cost more than the call.
    quick_library = ctypes.PyDLL(str(path))

    def function(
        name: str, signature: str, result: type | None = None, quick: bool = False
    ) -> ctypes._NamedFuncPointer:
        found = (quick_library if quick else library)[f"moemesh_{name}"]
        found.argtypes, found.restype = [_LETTERS[letter] for letter in signature], result
        return found

    version = function("abi_version", "", result=ctypes.c_int64)()
    if version != ABI_VERSION:
        raise OSError(f"{path} has kernel interface {version}, this code needs {ABI_VERSION}")
    variant = function("variant", "", result=ctypes.c_char_p)().decode()
    log.info("native_kernels_loaded", variant=variant, path=str(path), threads=threads)
    return NativeKernels(
        variant=f"native-{bits_variant(variant)}-{source_hash()[:8]}",
        threads=threads,
        path=path,
        linear=function("linear", "aaiai"),
        pack=function("pack", "aaiii"),
        packed_values=function("packed_values", "iii", result=ctypes.c_int64),
        gated_ffn=function("gated_ffn", "aaaiiii"),
        attention=function("attention", "ai"),
        write_kv=function("write_kv", "aiaiaaaiiiii", quick=True),
        rms_norm=function("rms_norm", "aiaaaaiifi", quick=True),
        rope=function("rope", "aiaaaiaiiiifi", quick=True),
        gated_product=function("gated_product", "aaaii", quick=True),
        choose_tokens=function("choose_tokens", "aiaiiii"),
        set_word=function("set_word", "ai", quick=True),
        await_word=function("await_word", "aiaiii", result=ctypes.c_int64),
        start_call_server=function("start_call_server", "iiaiii", result=ctypes.c_void_p),
        end_call_server=function("end_call_server", "a"),
        open_links=function("open_links", "aa"),
        add_ring=function("add_ring", "aiai"),
        remove_ring=function("remove_ring", "ai"),
        set_held_shards=function("set_held_shards", "aai"),
        read_call_counts=function("read_call_counts", "aa", quick=True),
        link_seal=function("link_seal", "iia", result=ctypes.c_uint64, quick=True),
        receive_answers=function("receive_answers", "aa", quick=True),
        ask_experts=function("ask_experts", "aaiaaa", result=ctypes.c_int64, quick=True),
        await_answers=function("await_answers", "aaiaaaaii", result=ctypes.c_int64),
        take_call_back=function("take_call_back", "aaa", quick=True),
        sum_experts=function("sum_experts", "aaiiiiia", quick=True),
        choose_experts=function("choose_experts", "aaiaai", quick=True),
        layer_half=function("layer_half", "aaaaiaaaaaa"),
        run_layers=function("run_layers", "aaaaaiaaaii", result=ctypes.c_int64),
    )


def _reason(failure: Exception) -> str:
    if isinstance(failure, subprocess.CalledProcessError):
        return bytes(failure.stderr).decode(errors="replace")[-500:]
    return str(failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds every variant of this machine's kind into a folder."""
    parser = argparse.ArgumentParser(prog="python -m common.compute.native_library", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=PREBUILT_FOLDER)
    options = parser.parse_args(arguments)
    compiler = find_compiler(os.environ)
    if compiler is None:
        print("no C++ compiler found: install g++, or set CXX", file=sys.stderr)
        return 1
    for instruction_set in (one for one in INSTRUCTION_SETS if one.machine == platform.machine()):
        path = options.output / library_name(instruction_set)
        try:
            compile_to(path, instruction_set, compiler)
        except (OSError, subprocess.SubprocessError) as failure:
            print(f"{instruction_set.name}: {_reason(failure)}", file=sys.stderr)
            return 1
        print(path)
    return 0


def default_cache_folder(environment: Mapping[str, str]) -> Path:
    """MOEMESH_CACHE, else ~/.cache/moemesh, else a folder of this user's own among the temporary files.

    A user of a container, say, may have no name and no home, or one that cannot be written to.
    """
    configured = environment.get("MOEMESH_CACHE")
    if configured:
        return Path(configured)
    home = Path(os.path.expanduser("~"))
    folder = home / ".cache" / "moemesh"
    if home.is_absolute() and _can_be_made(folder):
        return folder
    instead = Path(tempfile.gettempdir()) / f"moemesh-cache-{os.getuid()}"
    log.warning(
        "no_cache_folder",
        reason=f"no home directory that can be written to: compiled kernels go to {instead}, or to MOEMESH_CACHE",
    )
    return instead


def _can_be_made(folder: Path) -> bool:
    """Returns whether files can be made in it, once those of its parents that are missing are there."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(there, os.W_OK | os.X_OK)


def refuse_folder_of_others(folder: Path) -> None:
    """Raises PermissionError. Among the temporary files anybody may make a folder of that name and put code into it."""
    if folder.exists() and folder.stat().st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{folder} belongs to another user: MOEMESH_CACHE must name a folder of your own")


@contextmanager
def compiler_turn(
    folder: Path,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """While no other process compiles into this folder, which is made if need be. Raises OSError.

    One that takes longer than `patience_s`, because it was stopped, say, is not waited for: compiling beside it does no
    harm, since what is compiled is renamed into place.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    until_s = clock() + patience_s
    with (folder / "compile.lock").open("w") as lock:
        while not _is_locked(lock.fileno()):
            if clock() >= until_s:
                log.warning("compiler_wait_timed_out", reason=f"another has been compiling for over {patience_s:.0f} s")
                break
            sleep(LOOK_S)
        yield


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
