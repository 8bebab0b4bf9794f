"""Memory limits of control groups, from the text of real machines' files: both versions, hybrid, nested, containers."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from common.processes.cgroup import VERSION_1, VERSION_2, MemoryFiles, count_memory_kills, group_folders, memory_groups
from common.processes.memory import offered_bytes

MIB = 1 << 20

V2_SYSTEMD = (
    "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u7.scope\n",
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
)
V2_DOCKER = (
    "0::/\n",
    "1057 1053 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n",
)
V2_DOCKER_HOST_NAMESPACE = (
    "0::/system.slice/docker-4f1c.scope\n",
    "801 790 0:26 /system.slice/docker-4f1c.scope /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n",
)
V2_SIBLING = (
    "0::/../other.scope\n",
    "801 790 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n",
)
V1_DOCKER = (
    "12:pids:/docker/4f1c\n9:memory:/docker/4f1c\n4:cpu,cpuacct:/docker/4f1c\n1:name=systemd:/docker/4f1c\n",
    "721 717 0:32 /docker/4f1c /sys/fs/cgroup/memory ro,nosuid,nodev - cgroup cgroup rw,memory\n"
    "722 717 0:33 /docker/4f1c /sys/fs/cgroup/pids ro,nosuid,nodev - cgroup cgroup rw,pids\n",
)
V1_HOST = (
    "9:name=systemd:/\n4:memory:/process_api/2f50\n3:cpuset:/\n0::/\n",
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
)
PODMAN_ROOTLESS = (
    "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-9a.scope/container\n",
    "612 601 0:26 /user.slice/user-1000.slice/user@1000.service/user.slice/libpod-9a.scope /sys/fs/cgroup "
    "ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup2 rw,nsdelegate\n",
)
BLANKS = ("0::/my group\n", r"30 23 0:26 / /mnt/c\040groups rw - cgroup2 cgroup2 rw" + "\n")


def paths(*names: str, files: MemoryFiles = VERSION_2) -> list[tuple[PurePosixPath, MemoryFiles]]:
    return [(PurePosixPath(name), files) for name in names]


@pytest.mark.parametrize(
    ("texts", "folders"),
    [
        (
            V2_SYSTEMD,
            paths(
                "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/run-u7.scope",
                "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice",
                "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service",
                "/sys/fs/cgroup/user.slice/user-1000.slice",
                "/sys/fs/cgroup/user.slice",
                "/sys/fs/cgroup",
            ),
        ),
        (V2_DOCKER, paths("/sys/fs/cgroup")),
        (V2_DOCKER_HOST_NAMESPACE, paths("/sys/fs/cgroup")),
        (V2_SIBLING, paths("/sys/fs/cgroup")),
        (V1_DOCKER, paths("/sys/fs/cgroup/memory", files=VERSION_1)),
        (
            V1_HOST,
            paths(
                "/sys/fs/cgroup/memory/process_api/2f50",
                "/sys/fs/cgroup/memory/process_api",
                "/sys/fs/cgroup/memory",
                files=VERSION_1,
            )
            + paths("/sys/fs/cgroup/unified"),
        ),
        (PODMAN_ROOTLESS, paths("/sys/fs/cgroup/container", "/sys/fs/cgroup")),
        (BLANKS, paths("/mnt/c groups/my group", "/mnt/c groups")),
        (("", ""), []),
        (("nonsense\n0::\n:::\n", "1 2 3\n - \nx - cgroup2\n"), []),
    ],
    ids=[
        "v2 nested",
        "v2 docker",
        "v2 docker, host's names",
        "v2 of a sibling",
        "v1 docker",
        "v1 nested, hybrid",
        "podman",
        "blanks",
        "empty",
        "nonsense",
    ],
)
def test_all_groups_from_the_own_one_outwards_are_found(
    texts: tuple[str, str], folders: list[tuple[PurePosixPath, MemoryFiles]]
) -> None:
    assert group_folders(*texts) == folders


class Machine:
    """A folder in place of /, with what a process sees of its control groups."""

    def __init__(self, root: Path, texts: tuple[str, str], available_mib: int = 19_000) -> None:
        self.root, self.proc = root, root / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {available_mib * 1024} kB\n")
        for name, text in zip(("cgroup", "mountinfo"), texts, strict=True):
            (self.proc / "self" / name).write_text(text)

    def group(self, path: str, **files: str | int) -> None:
        folder = self.root / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n")

    @property
    def offered_mib(self) -> float:
        return offered_bytes(self.proc, self.root) / MIB


def test_a_limit_of_version_1_is_kept(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V1_DOCKER)
    machine.group(
        "/sys/fs/cgroup/memory",
        limit_in_bytes=1500 * MIB,
        usage_in_bytes=600 * MIB,
        stat=f"cache 5\ninactive_file 1\ntotal_inactive_file {100 * MIB}",
    )
    assert machine.offered_mib == 800


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V1_DOCKER)
    machine.group("/sys/fs/cgroup/memory", limit_in_bytes=9223372036854771712, usage_in_bytes=600 * MIB)
    assert machine.offered_mib == 15_200
    assert memory_groups(machine.proc, machine.root) == []


@pytest.mark.parametrize("limited", ["run-u7.scope", "", ".."])
def test_the_tightest_limit_on_the_way_up_counts(limited: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2_SYSTEMD)
    slice_of_apps = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice"
    for folder in (f"{slice_of_apps}/run-u7.scope", slice_of_apps, f"{slice_of_apps}/.."):
        machine.group(folder, max="max", current=300 * MIB)
    machine.group("/sys/fs/cgroup/user.slice", max=8000 * MIB, current=1000 * MIB)
    machine.group(f"{slice_of_apps}/{limited}", max=1500 * MIB, current=500 * MIB)
    assert machine.offered_mib == 800
    tightest = min(memory_groups(machine.proc, machine.root), key=lambda group: group.limit_bytes)
    assert (tightest.limit_bytes, tightest.free_bytes) == (1500 * MIB, 1000 * MIB)


def test_a_group_that_is_slowed_down_above_a_mark_stays_below_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2_DOCKER)
    machine.group("/sys/fs/cgroup", max=4000 * MIB, high=1000 * MIB, current=0)
    assert machine.offered_mib == 800


def test_a_group_whose_use_is_not_told_is_no_reason_to_offer_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2_DOCKER, available_mib=1000)
    machine.group("/sys/fs/cgroup", max=100 * MIB)
    assert machine.offered_mib == 800


@pytest.mark.parametrize(
    ("texts", "folder", "file"),
    [(V2_DOCKER, "/sys/fs/cgroup", "events"), (V1_DOCKER, "/sys/fs/cgroup/memory", "oom_control")],
)
def test_processes_that_were_ended_for_want_of_memory_are_counted(
    texts: tuple[str, str], folder: str, file: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, texts)
    assert count_memory_kills(machine.proc, machine.root) == 0
    machine.group(folder, **{file: "low 0\noom 5\noom_kill 3\noom_group_kill 1"})
    assert count_memory_kills(machine.proc, machine.root) == 3


def test_this_machines_own_groups_can_be_read() -> None:
    assert all(group.limit_bytes > 0 for group in memory_groups())
    assert count_memory_kills() >= 0
