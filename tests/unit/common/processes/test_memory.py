"""What a node may offer: what is free, within the container that it is in."""

from __future__ import annotations

from pathlib import Path

from common.processes.memory import offered_bytes, offered_device_bytes

MIB = 1 << 20


def meminfo(folder: Path, available_mib: int) -> Path:
    """What stands in place of /proc."""
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "meminfo").write_text(
        f"MemTotal:  {4 * available_mib * 1024} kB\nMemAvailable:  {available_mib * 1024} kB\n"
    )
    return proc


def cgroup(root: Path, limit: str, used_mib: int, cached_mib: int | None = None) -> Path:
    """A container's one group, and what stands in place of /."""
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/self/mountinfo").write_text("1 2 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n")
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used_mib * MIB}\n")
    if cached_mib is not None:
        (folder / "memory.stat").write_text(f"anon 5\nfile 1\ninactive_file {cached_mib * MIB}\nactive_file 7\n")
    return root


def test_without_a_container_four_fifths_of_what_is_available_are_offered(tmp_path: Path) -> None:
    assert offered_bytes(meminfo(tmp_path, 1000), tmp_path / "none") == int(800 * MIB)
    assert offered_bytes(meminfo(tmp_path, 1000), cgroup(tmp_path, "max", 990)) == int(800 * MIB)


def test_a_container_offers_no_more_than_is_left_of_its_limit(tmp_path: Path) -> None:
    assert offered_bytes(meminfo(tmp_path, 1000), cgroup(tmp_path, str(600 * MIB), 100)) == int(400 * MIB)
    assert offered_bytes(meminfo(tmp_path, 100), cgroup(tmp_path, str(600 * MIB), 100)) == int(80 * MIB)


def test_cached_files_of_a_container_are_free_memory(tmp_path: Path) -> None:
    """Else a node that starts again beside a warm checkpoint would offer nothing."""
    assert offered_bytes(meminfo(tmp_path, 1000), cgroup(tmp_path, str(600 * MIB), 600, 500)) == int(400 * MIB)


def test_a_container_over_its_limit_offers_nothing(tmp_path: Path) -> None:
    assert offered_bytes(meminfo(tmp_path, 1000), cgroup(tmp_path, str(100 * MIB), 200)) == 0


def test_where_nothing_can_be_read_something_is_offered(tmp_path: Path) -> None:
    assert offered_bytes(tmp_path / "none", tmp_path / "none") > 0


def test_this_machine_has_memory() -> None:
    assert offered_bytes() > 0


def test_a_process_that_has_a_gpu_alone_offers_four_fifths_of_what_is_free_there() -> None:
    assert offered_device_bytes(1000, 1600, 1) == 800
    assert offered_device_bytes(0, 1600, 1) == 0


def test_processes_that_share_a_gpu_offer_a_part_each_and_as_much_after_a_restart() -> None:
    at_start, others_loaded = (offered_device_bytes(free, 1600, 4) for free in (1590, 700))
    assert at_start == others_loaded == 320
    assert offered_device_bytes(100, 1600, 4) == 80, "what is not free cannot be offered"
