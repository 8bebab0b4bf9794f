"""Memory limits of the control groups that a process is in, of both versions, and of those above them.

A limit anywhere on the way up ends a process that exceeds it, so all of them count. Which folder of the cgroup file
systems stands for a process is read from its `/proc/self/cgroup` and `/proc/self/mountinfo` (cgroups(7), proc(5)).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED_BYTES = 1 << 60
"""Version 1 writes no limit as the largest number of whole pages."""


@dataclass(frozen=True, slots=True)
class MemoryFiles:
    """What the files of one version are called."""

    limits: tuple[str, ...]
    used: str
    cached: str
    """A line of memory.stat: files that the kernel has cached, counts as used and gives up when memory is needed."""
    kills: str
    """The file that counts the processes which were ended for want of memory, as `oom_kill`."""


VERSION_1 = MemoryFiles(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)
VERSION_2 = MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One control group that limits this process's memory."""

    folder: Path
    limit_bytes: int
    free_bytes: int
    """What is free of the limit; what is cached counts as free. Below 0 where more is used than allowed."""


def group_folders(cgroup: str, mountinfo: str) -> list[tuple[PurePosixPath, MemoryFiles]]:
    """Folders of the process's own groups and of all above them that it can see, each from the innermost outwards.

    `cgroup`, `mountinfo`: the text of the files of those names in /proc/self. Pure.
    """
    folders: list[tuple[PurePosixPath, MemoryFiles]] = []
    paths = _paths_by_version(cgroup)
    for files, (root, mount) in _mounts_by_version(mountinfo).items():
        path = paths.get(files)
        if path is None:
            continue
        # Below the mount only where this process may look: in a container its path may be one of the host's.
        inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if ".." in inside:
            inside = ()
        for depth in range(len(inside), -1, -1):
            folders.append((mount.joinpath(*inside[:depth]), files))
    return folders


def memory_groups(proc: Path = Path("/proc"), root: Path = Path("/")) -> list[MemoryGroup]:
    """Returns those with a limit, the innermost of each version first. None where the system has no control groups.

    `root`: where paths of mounts begin.
    """
    groups = []
    for folder, files in own_folders(proc, root):
        limit_bytes = min((_number(folder / name) for name in files.limits), default=UNLIMITED_BYTES)
        used_bytes = _number(folder / files.used)
        if limit_bytes < UNLIMITED_BYTES and used_bytes < UNLIMITED_BYTES:
            cached_bytes = read_entry(folder / "memory.stat", files.cached)
            groups.append(MemoryGroup(folder, limit_bytes, limit_bytes - used_bytes + cached_bytes))
    return groups


def count_memory_kills(proc: Path = Path("/proc"), root: Path = Path("/")) -> int:
    """Returns how many processes of this process's own groups the kernel has ended for want of memory, so far."""
    return sum(read_entry(folder / files.kills, "oom_kill") for folder, files in own_folders(proc, root))


def own_folders(proc: Path, root: Path) -> Sequence[tuple[Path, MemoryFiles]]:
    """Returns the folders of this process's groups and of those above them; none where the system has none."""
    try:
        texts = [(proc / "self" / name).read_text(errors="replace") for name in ("cgroup", "mountinfo")]
    except OSError:
        return []
    return [(root / folder.relative_to("/"), files) for folder, files in group_folders(*texts)]


def _paths_by_version(cgroup: str) -> dict[MemoryFiles, PurePosixPath]:
    """Lines are `number:controllers:path`; version 2 is number 0 without controllers."""
    paths: dict[MemoryFiles, PurePosixPath] = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator or not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            paths[VERSION_2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            paths[VERSION_1] = PurePosixPath(path)
    return paths


def _mounts_by_version(mountinfo: str) -> dict[MemoryFiles, tuple[PurePosixPath, PurePosixPath]]:
    """Returns for each cgroup file system which of its folders its mount begins with, and where it is mounted.

    Lines are `id parent device root mount options ... - type source options-of-the-file-system`.
    """
    found: dict[MemoryFiles, tuple[PurePosixPath, PurePosixPath]] = {}
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        mounted, kind = before.split(" "), after.split(" ")
        if not separator or len(mounted) < 5 or len(kind) < 3:
            continue
        is_version_1 = kind[0] == "cgroup" and "memory" in kind[2].split(",")
        if is_version_1 or kind[0] == "cgroup2":
            root, mount = (PurePosixPath(_unescape(field)) for field in mounted[3:5])
            # A second mount of the same kind shows the same groups, perhaps fewer of them.
            found.setdefault(VERSION_1 if is_version_1 else VERSION_2, (root, mount))
    return found


def _unescape(field: str) -> str:
    """Blanks and the like are written as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(path: Path) -> int:
    """Returns UNLIMITED_BYTES for `max`, and where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return UNLIMITED_BYTES
    return int(text) if text.isdecimal() else UNLIMITED_BYTES


def read_entry(path: Path, name: str) -> int:
    """Returns the number behind a name at the beginning of a line; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = (line.split()[1] for line in lines if line.startswith(f"{name} "))
    return next((int(value) for value in values if value.isdecimal()), 0)
