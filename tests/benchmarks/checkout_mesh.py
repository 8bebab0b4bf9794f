"""A mesh of any checkout of this project, started by that checkout's own command and known by HTTP and /proc only.

So builds whose modules have other names can be measured and compared by one tool.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.processes.process_table import children_of

THIS_CHECKOUT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 300
ENDED_WITHIN_S = 60
LOG_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class CheckoutMesh:
    """A mesh that has said that it is ready."""

    url: str
    pid: int
    """Of the supervisor, whose descendants are all other processes of the mesh."""

    def cpu_s(self) -> float:
        """Returns the CPU seconds that the mesh has used so far, the supervisor and ended processes included."""
        return tree_cpu_s(self.pid)


@contextmanager
def checkout_mesh(checkout: Path, settings: Mapping[str, str]) -> Iterator[CheckoutMesh]:
    """Starts a mesh with settings by their environment's names, and ends it.

    Raises RuntimeError with the last lines that it wrote if it does not become ready.
    """
    # Sockets live in the state folder, and their paths are bounded.
    state_dir = Path(tempfile.mkdtemp(prefix="build-"))
    log_path = state_dir / "up.log"
    try:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [command_of(checkout), "up"],
                cwd=checkout,
                env=_environment(settings, state_dir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield CheckoutMesh(_wait_ready(process, state_dir, log_path), process.pid)
        finally:
            _end(process)
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def command_of(checkout: Path) -> Path:
    """Returns the path of the checkout's `moemesh`. Raises RuntimeError if it is not installed there."""
    command = checkout.resolve() / ".venv" / "bin" / "moemesh"
    if not command.exists() and checkout.resolve() == THIS_CHECKOUT:
        command = Path(sys.executable).with_name("moemesh")
    if not command.exists():
        raise RuntimeError(f"{command} does not exist: run `make setup` in {checkout}")
    return command


def commit_of(checkout: Path) -> str:
    """Returns what git calls the checkout's state, or `unknown`."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tree_cpu_s(pid: int) -> float:
    """Returns the CPU seconds of a process and all its descendants.

    A process that has ended and was waited for counts as its parent's. What ends meanwhile counts as nothing.
    """
    try:
        # The command's name may hold blanks and brackets; fields count from behind it.
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        children = children_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    # utime, stime, and both of the children that were waited for.
    own_ticks = sum(int(field) for field in fields[11:15])
    return own_ticks / os.sysconf("SC_CLK_TCK") + sum(tree_cpu_s(child) for child in children)


def _environment(settings: Mapping[str, str], state_dir: Path) -> dict[str, str]:
    # A module path of ours would hand our modules to the other build.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**inherited, "PORT": "0", **settings, "STATE_DIR": str(state_dir)}


def _wait_ready(process: subprocess.Popen[bytes], state_dir: Path, log_path: Path) -> str:
    url_file, deadline_s = state_dir / "http.url", time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s and process.poll() is None:
        time.sleep(0.1)
        if url_file.exists() and (url := url_file.read_text().strip()) and _is_ready(url):
            return url
    written = log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
    raise RuntimeError(f"the mesh was not ready within {READY_WITHIN_S} s (status {process.returncode}):\n{written}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
