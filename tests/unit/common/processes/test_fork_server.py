"""Processes that are forked from one that has imported: what they get, how their end is seen, who ends with whom."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.processes import fork_server
from common.processes.fork_child import MAX_MESSAGE_BYTES
from common.processes.fork_server import ForkedProcess, ForkServer, ImportsUnderWayError, LocalStarter
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

PROGRAM = """
import json, os, sys, time
import once
what, *rest = sys.argv[1:]
if what == "tell":
    names = sorted(os.environ)
    descriptors = sorted(map(int, os.listdir("/proc/self/fd")))
    print(json.dumps([rest, names, once.IMPORTED_BY, os.getsid(0) == os.getpid(), descriptors]))
elif what == "read":
    print(os.read(int(rest[0]), 100).decode())
elif what == "value":
    print(ascii(os.environ[rest[0]]))
elif what == "sleep":
    time.sleep(60)
elif what == "fail":
    raise ValueError("it is " + rest[0])
elif what == "exit":
    sys.exit(int(rest[0]))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "once.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
    (folder / "forked_program.py").write_text(PROGRAM)
    return folder


def environment(code: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), str(Path.cwd())]), "OF_THE_SERVER": "1"}


@pytest.fixture
def server(code: Path, tmp_path: Path) -> Iterator[ForkServer]:
    made = ForkServer(["once"], environment(code), tmp_path / "forks.log")
    made.launch()
    yield made
    made.close()


def spawn(server: ForkServer, *arguments: str, descriptors: dict[int, int] | None = None) -> ForkedProcess:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            return server.spawn("forked_program", arguments, {"OWN": "setting"}, descriptors)
        except ImportsUnderWayError:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def output(server: ForkServer, folder: Path, *arguments: str) -> tuple[int, str]:
    path = folder / "output"
    with path.open("wb") as stream:
        process = spawn(server, *arguments, descriptors={1: stream.fileno(), 2: stream.fileno()})
    return process.wait(10), path.read_text()


def test_a_process_has_its_own_arguments_settings_and_session_and_what_was_imported_before(
    server: ForkServer, tmp_path: Path
) -> None:
    status, text = output(server, tmp_path, "tell", "one", "two words")
    rest, names, imported_by, leads, descriptors = json.loads(text)
    assert status == 0
    assert rest == ["one", "two words"]
    assert names == ["OWN"]
    assert server._process is not None
    assert imported_by == server._process.pid
    assert leads, "Ctrl-C is its maker's"
    # One is the listing's own. Neither the server's sockets nor another's descriptor are open in it.
    assert descriptors[:3] == [0, 1, 2]
    assert len(descriptors) == 4


def test_descriptors_are_open_under_the_numbers_that_were_asked_for(server: ForkServer, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"through the pipe")
    os.close(writing)
    for number in (reading, 3, 4, 5, 6, 77):
        if number == reading:
            with (tmp_path / "output").open("wb") as stream:
                process = spawn(server, "read", str(number), descriptors={number: reading, 1: stream.fileno()})
            assert process.wait(10) == 0
            assert (tmp_path / "output").read_text() == "through the pipe\n"
        else:
            assert spawn(server, "exit", "0", descriptors={number: reading}).wait(10) == 0
    os.close(reading)


@pytest.mark.parametrize(("arguments", "status"), [(("exit", "0"), 0), (("exit", "3"), 3), (("nothing",), 0)])
def test_an_exit_status_is_passed_on(server: ForkServer, arguments: tuple[str, ...], status: int) -> None:
    process = spawn(server, *arguments)
    assert process.wait(10) == status
    assert process.poll() == status
    process.kill()
    process.send_signal(signal.SIGTERM)


def test_an_error_that_nobody_catches_is_printed_and_ends_it_with_1(server: ForkServer, tmp_path: Path) -> None:
    status, text = output(server, tmp_path, "fail", "wrong")
    assert status == 1
    assert text.splitlines()[-1] == "ValueError: it is wrong"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_ends_it_and_is_told_as_a_negative_status(server: ForkServer, number: signal.Signals) -> None:
    process = spawn(server, "sleep")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert process.wait(10) == -number


def test_the_ends_of_many_are_told_apart(server: ForkServer) -> None:
    processes = [spawn(server, "exit", str(number)) for number in range(20)]
    assert [process.wait(10) for process in reversed(processes)] == list(reversed(range(20)))


def test_with_the_server_its_processes_end_and_the_next_ones_have_another(server: ForkServer) -> None:
    process = spawn(server, "sleep")
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    wait_until(lambda: not is_alive(process.pid), 5, "its end")
    assert spawn(server, "exit", "4").wait(10) == 4
    assert server.failures_in_a_row == 0


def test_closing_ends_what_still_runs(server: ForkServer) -> None:
    process = spawn(server, "sleep")
    server.close()
    assert process.poll() == -signal.SIGKILL
    wait_until(lambda: not is_alive(process.pid), 5, "its end")


def test_imports_that_fail_are_counted_and_said_in_the_log(code: Path, tmp_path: Path) -> None:
    server = ForkServer(["not_there"], environment(code), tmp_path / "forks.log")
    server.launch()

    def has_failed() -> bool:
        with pytest.raises(ImportsUnderWayError):
            server.spawn("forked_program", ["sleep"], {})
        return server.failures_in_a_row >= 2

    wait_until(has_failed, 10, "two failures")
    assert "No module named 'not_there'" in (tmp_path / "forks.log").read_text()
    server.close()


def test_imports_that_hang_are_said_and_begun_anew(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(fork_server, "IMPORTS_S", 0.5)
    server = ForkServer(["hangs"], environment(code), tmp_path / "forks.log")
    server.launch()

    def is_said() -> bool:
        try:
            server.spawn("forked_program", ["sleep"], {})
        except ImportsUnderWayError:
            return False
        except OSError as error:
            return "has not imported its modules within 0 s" in str(error)
        return False

    wait_until(is_said, 10, "a word about it")
    assert server.failures_in_a_row == 1
    (code / "hangs.py").write_text("")
    assert spawn(server, "exit", "3").wait(10) == 3
    server.close()


@pytest.mark.parametrize("num_bytes", [MAX_MESSAGE_BYTES, 1 << 20])
def test_a_settings_list_that_is_too_long_is_an_error_of_that_one_only(server: ForkServer, num_bytes: int) -> None:
    process = spawn(server, "sleep")
    with pytest.raises(OSError, match="long"):
        server.spawn("forked_program", ["sleep"], {"LONG": "x" * num_bytes})
    assert process.poll() is None
    assert spawn(server, "exit", "5").wait(10) == 5


def test_an_environment_may_hold_bytes_that_are_no_text(server: ForkServer, code: Path, tmp_path: Path) -> None:
    spawn(server, "sleep").kill()  # it is ready now
    path = tmp_path / "printed"
    with path.open("wb") as printed:
        process = server.spawn(
            "forked_program",
            ["value", "ODD"],
            environment(code) | {"ODD": os.fsdecode(b"caf\xe9")},
            {1: printed.fileno()},
        )
        assert process.wait(10) == 0
    assert path.read_text().strip() == ascii("caf\udce9")


def test_nothing_outlives_a_maker_that_is_killed(code: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from common.processes.fork_server import ForkServer, ImportsUnderWayError\n"
        "server = ForkServer(['once'], dict(os.environ))\n"
        "server.launch()\n"
        "while True:\n"
        "    try:\n"
        "        print(server.spawn('forked_program', ['sleep'], {}).pid, flush=True)\n"
        "        time.sleep(60)\n"
        "    except ImportsUnderWayError:\n"
        "        time.sleep(0.01)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], env=environment(code), stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    with maker.stdout:
        pid = int(maker.stdout.readline())
    assert is_alive(pid)
    maker.kill()
    maker.wait()
    wait_until(lambda: not is_alive(pid), 5, "its end")


def test_a_fork_of_the_maker_itself_serves_as_well(code: Path) -> None:
    program = (
        "import os, sys\n"
        "import once\n"
        "from common.processes.fork_server import ForkServer, ImportsUnderWayError\n"
        "server = ForkServer(['once'], dict(os.environ))\n"
        "server.fork_off()\n"
        "def spawn(*arguments):\n"
        "    while True:\n"
        "        try:\n"
        "            return server.spawn('forked_program', arguments, dict(os.environ))\n"
        "        except ImportsUnderWayError:\n"
        "            pass\n"
        "assert spawn('tell').wait(10) == 0\n"
        "server.close()\n"
        "print(once.IMPORTED_BY, flush=True)\n"
    )
    text = subprocess.run(
        [sys.executable, "-c", program], env=environment(code), capture_output=True, text=True, check=True, timeout=30
    ).stdout
    told, imported_by = text.splitlines()
    assert f", {imported_by}, true" in told


@pytest.fixture
def folder_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a person works who has packages of the same names as ours, and starts a mesh."""
    for name in ("common", "services"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "__init__.py").write_text("raise ImportError('this is not what you wanted')\n")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("has_path", [False, True])
def test_packages_of_the_same_names_where_a_person_works_are_not_imported(
    has_path: bool, folder_of_the_users: Path, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "PYTHONPATH")}
    if has_path:
        environment["PYTHONPATH"] = str(folder_of_the_users)
    forks = ForkServer(["services.router.journal.state_folder"], environment, tmp_path / "logs" / "forks.log")
    starter = LocalStarter(tmp_path / "logs", environment)
    try:
        forks.launch()
        router = starter.start("services.router", environment, tmp_path / "logs" / "router.log")
        with (tmp_path / "logs" / "forked.log").open("wb") as log:
            forked = spawned(forks, "services.router", environment, {1: log.fileno(), 2: log.fileno()})
        assert (router.wait(60), forked.wait(60)) == (1, 1)
    finally:
        forks.close()
    for name in ("router.log", "forked.log"):
        assert (tmp_path / "logs" / name).read_text().splitlines()[-1] == (
            "moemesh router: wrong settings: MODEL is not set"
        )


def spawned(forks: ForkServer, module: str, environment: dict[str, str], descriptors: dict[int, int]) -> ForkedProcess:
    """As soon as it has imported."""
    found: list[ForkedProcess] = []

    def spawn() -> bool:
        with contextlib.suppress(ImportsUnderWayError):
            found.append(forks.spawn(module, [], environment, descriptors))
        return bool(found)

    wait_until(spawn, 60, "a fork")
    return found[0]
