"""Faults that go through the kernel of this machine, on plain processes: what they say they do, and healed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chaos.faults.clock_jump import ClockJump
from chaos.faults.cpu_quota import CpuQuota
from chaos.faults.disk_full import FILLER, DiskFull
from chaos.faults.memory_limit import MemoryLimit
from chaos.faults.network import NetworkNamespace
from chaos.target import TargetError
from chaos.targets.host_commands import missing, run
from tests.chaos.plain_target import SPIN, PlainTarget, plain_target

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
HOLD_MEMORY = "import time; held = bytearray(b'x' * (40 << 20)); time.sleep(600)"
WITHIN_S = 15.0
LIBRARY = "faketime/libfaketime.so.1"
FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


@pytest.fixture
def target() -> Iterator[PlainTarget]:
    with plain_target() as running:
        yield running


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def groups(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


@needs_root
def test_a_quota_bounds_cpu_time_and_healing_gives_the_process_back(target: PlainTarget, tmp_path: Path) -> None:
    node = target.run("stage-0", "stage", "while True: pass", {}, tmp_path)
    fault = CpuQuota(percent=10.0)
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    before = groups(node.pid)
    fault.apply(target, [node])
    try:
        assert groups(node.pid) != before
        start = cpu_seconds(node.pid)
        time.sleep(1.0)
        assert cpu_seconds(node.pid) - start <= 0.2
    finally:
        fault.heal(target)
    assert groups(node.pid) == before
    start = cpu_seconds(node.pid)
    wait_for("the process is as slow as before", lambda: cpu_seconds(node.pid) - start > 0.5)
    fault.heal(target)


@needs_root
def test_out_of_memory_the_kernel_kills_the_node_and_nobody_else(target: PlainTarget, tmp_path: Path) -> None:
    node = target.run("expert-0", "expert", HOLD_MEMORY, {}, tmp_path)
    other = target.run("expert-1", "expert", HOLD_MEMORY, {}, tmp_path)
    fault = MemoryLimit()
    if reason := fault.unavailable(target):
        pytest.skip(reason)
    process = target.processes[node.name][1]
    fault.apply(target, [node])
    try:
        assert process.wait(WITHIN_S) == -signal.SIGKILL
    finally:
        fault.heal(target)
    assert [left.name for left in target.nodes()] == [other.name]
    assert not list(Path("/sys/fs/cgroup").glob("*/moemesh-chaos-*"))


@contextmanager
def small_disk(folder: Path, size_mib: int = 64) -> Iterator[Path]:
    """Puts the folder on a file system of its own in memory while the block runs. Needs root. Raises TargetError."""
    folder.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "moemesh-chaos", str(folder)])
    try:
        yield folder
    finally:
        run(["umount", str(folder)])


@needs_root
def test_a_full_disk_refuses_writes_until_it_is_healed(target: PlainTarget, tmp_path: Path) -> None:
    with small_disk(tmp_path / "state", size_mib=4) as folder:
        node = target.run("router-0", "router", SPIN, {"STATE_DIR": str(folder)}, Path("/"))
        fault = DiskFull()
        wait_for("the process has started", lambda: fault.unavailable(target) == "")
        (folder / "journal").write_bytes(b"before")
        fault.apply(target, [node])
        with pytest.raises(OSError, match="No space left"), (folder / "more").open("wb") as file:
            file.write(bytes(8192))
        assert (folder / "journal").read_bytes() == b"before"
        target.processes[node.name][1].kill()
        fault.heal(target)
        assert not (folder / FILLER).exists()
        (folder / "more").write_bytes(bytes(8192))
        fault.heal(target)


@needs_root
def test_a_disk_can_be_left_with_a_little(target: PlainTarget, tmp_path: Path) -> None:
    with small_disk(tmp_path / "state", size_mib=4) as folder:
        node = target.run("router-0", "router", SPIN, {"STATE_DIR": str(folder)}, Path("/"))
        fault = DiskFull(left_kib=64)
        wait_for("the process has started", lambda: fault.unavailable(target) == "")
        fault.apply(target, [node])
        try:
            status = os.statvfs(folder)
            assert 0 < status.f_bavail * status.f_frsize <= 64 << 10
        finally:
            fault.heal(target)


def test_a_large_disk_is_never_filled(target: PlainTarget) -> None:
    folder = Path(__file__).parent
    status = os.statvfs(folder)
    if status.f_blocks * status.f_frsize <= 1 << 30:
        pytest.skip("the disk of this checkout is a small one")
    node = target.run("router-0", "router", SPIN, {"STATE_DIR": str(folder)}, folder)
    fault = DiskFull()
    wait_for("the reason", lambda: "only one of at most" in fault.unavailable(target))
    with pytest.raises(TargetError, match="only one of at most"):
        fault.apply(target, [node])
    fault.heal(target)
    assert not (folder / FILLER).exists()


def faketime_environment(offset_file: Path) -> dict[str, str]:
    """Returns the settings that a mesh must be started with for this fault.

    Raises TargetError where libfaketime is missing or of no use.
    """
    library = next((path for folder in FOLDERS if os.path.exists(path := f"{folder}/{LIBRARY}")), "")
    if not library:
        raise TargetError("libfaketime is not installed")
    offset_file.write_text("+0")
    environment = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(offset_file.resolve()),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    # Some builds (0.9.10) fail every sleep of a Python that sleeps by the monotonic clock.
    trial = [sys.executable, "-S", "-c", "import time; time.sleep(0.001)"]
    try:
        run(trial, environment=os.environ | environment)
    except TargetError as error:
        raise TargetError(f"this build of libfaketime breaks Python's sleep: {error}") from None
    return environment


def test_a_clock_jumps_and_comes_back(target: PlainTarget, tmp_path: Path) -> None:
    try:
        environment = faketime_environment(tmp_path / "offset")
    except TargetError as error:
        pytest.skip(str(error))
    program = (
        "import sys, time\nwhile True: open('now', 'w').write(f'{time.time()} {time.monotonic()}'); time.sleep(0.02)"
    )
    node = target.run("router-0", "router", program, environment, tmp_path)

    def offset_s() -> float:
        try:
            return float((tmp_path / "now").read_text().split()[0]) - time.time()
        except (OSError, IndexError):
            return float("nan")

    wait_for("the clock is right at first", lambda: abs(offset_s()) < 5)
    fault = ClockJump(offset_s=3600)
    assert fault.unavailable(target) == ""
    fault.apply(target, [node])
    wait_for("the clock has jumped", lambda: abs(offset_s() - 3600) < 5)
    assert abs(float((tmp_path / "now").read_text().split()[1]) - time.monotonic()) < 5
    fault.heal(target)
    wait_for("the clock is right again", lambda: abs(offset_s()) < 5)


def test_a_clock_that_cannot_jump_says_why(target: PlainTarget, tmp_path: Path) -> None:
    target.run("router-0", "router", SPIN, {"LD_PRELOAD": ""}, tmp_path)
    fault = ClockJump()
    wait_for("the reason", lambda: fault.unavailable(target) == "router-0 was not started under libfaketime")


def test_the_harness_itself_has_no_network_namespace_to_hurt() -> None:
    with pytest.raises(TargetError, match="no network namespace of its own"):
        NetworkNamespace(os.getpid()).run("ip", "link", "show")


@needs_root
def test_addresses_and_interfaces_of_a_namespace_are_read_without_loopback() -> None:
    if reason := missing("unshare", "nsenter", "ip"):
        pytest.skip(reason)
    script = (
        "ip link add one type dummy && ip addr add 10.9.8.7/24 dev one && ip link set one up && echo up && sleep 600"
    )
    with subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"up\n":
                pytest.skip("this kernel has no dummy interfaces")
            namespace = NetworkNamespace(process.pid)
            assert namespace.interfaces() == ("one",)
            assert namespace.addresses() == ("10.9.8.7",)
        finally:
            process.kill()
    assert not namespace.exists
    assert namespace.run_if_there("ip", "link", "show") == ""
