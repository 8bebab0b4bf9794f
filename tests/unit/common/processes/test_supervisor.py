"""The supervisor: who is started, when what dies is started again, and how it ends. No process is started here."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common.errors import ConfigurationError, DeadlineError, NodeLostError
from common.processes.folder_lock import lock_folder
from common.processes.fork_server import ImportsUnderWayError, LocalStarter
from common.processes.supervisor import (
    KILLED_S,
    LOOK_INTERVAL_S,
    MAX_RESTART_DELAY_S,
    NO_START_DELAY_S,
    RESTART_DELAY_S,
    STEADY_S,
    LocalMesh,
)


class FakeProcess:
    """What would have been started."""

    started: list[FakeProcess]

    def __init__(self, starter: LocalStarter, command: str, environment: dict[str, str], log_path: Path) -> None:
        self.module, self.environment = command, environment
        self.pid = 1000 + len(self.started)
        self.returncode: int | None = None
        self.signals: list[int] = []
        self.hears_signals = True
        self.started.append(self)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self, timeout: float | None = None) -> int:
        if self.hears_signals and signal.SIGTERM in self.signals:
            self.returncode = 0
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.module, timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.returncode = -signal.SIGKILL


def start(starter: LocalStarter, command: str, environment: dict[str, str], log_path: Path) -> FakeProcess:
    return FakeProcess(starter, command, environment, log_path)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    FakeProcess.started = []
    monkeypatch.setattr(LocalStarter, "begin", lambda starter: None)
    monkeypatch.setattr(LocalStarter, "start", start)
    return FakeProcess.started


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mesh(tmp_path: Path, clock: Clock, started: list[FakeProcess]) -> LocalMesh:
    (tmp_path / "logs").mkdir()
    return LocalMesh({"MODEL": "m", "THREADS": "3"}, tmp_path, clock)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_how_many_share_a_gpu_is_said_and_how_much_that_is_each_finds_out(
    mesh: LocalMesh, started: list[FakeProcess], device: str
) -> None:
    """The supervisor has no torch, and may not touch CUDA before nodes are forked."""
    mesh.environment = {**mesh.environment, "DEVICE": device}
    mesh.num_nodes_at_start = 4
    mesh.add("stage", "stage-0")
    assert started[0].environment["DEVICE_PROCESSES"] == "4"
    assert "CAPACITY_BYTES" not in started[0].environment
    mesh.environment = {**mesh.environment, "DEVICE_PROCESSES": "2", "CAPACITY_BYTES": "77"}
    mesh.add("stage", "stage-1")
    assert (started[1].environment["DEVICE_PROCESSES"], started[1].environment["CAPACITY_BYTES"]) == ("2", "77")


@pytest.mark.parametrize("said", [{}, {"CAPACITY_BYTES": ""}, {"CAPACITY_BYTES": "0"}])
def test_the_hosts_memory_is_shared_out_among_nodes_without_a_gpu(
    mesh: LocalMesh, started: list[FakeProcess], said: dict[str, str]
) -> None:
    mesh.environment = {**mesh.environment, **said}
    mesh.num_nodes_at_start = 4
    mesh.add("stage", "stage-0")
    assert int(started[0].environment["CAPACITY_BYTES"]) > 0
    assert "DEVICE_PROCESSES" not in started[0].environment


def test_a_process_gets_the_meshs_settings_over_its_own(
    mesh: LocalMesh, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", "another")
    monkeypatch.setenv("HOST_LABEL", "kept")
    mesh.add("stage", "stage-0")
    (process,) = started
    assert process.module == "services.stage"
    assert process.environment["MODEL"] == "m"
    assert process.environment["HOST_LABEL"] == "kept"
    assert process.environment["STATE_DIR"] == str(mesh.state_dir)


def test_a_place_may_have_settings_of_its_own_over_those_of_all(mesh: LocalMesh, started: list[FakeProcess]) -> None:
    mesh.environment, mesh.places = {"MODEL": "whole", "PP": "2"}, {"stage-7": {"MODEL": "part"}}
    for name in ("stage-7", "stage-8"):
        mesh.add("stage", name)
    assert [(own.environment["MODEL"], own.environment["PP"]) for own in started[-2:]] == [
        ("part", "2"),
        ("whole", "2"),
    ]


def test_a_name_is_taken_once(mesh: LocalMesh) -> None:
    mesh.add("expert", "expert-0")
    with pytest.raises(ConfigurationError, match="expert-0"):
        mesh.add("expert", "expert-0")


def test_a_steady_process_that_dies_is_started_at_once(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess]
) -> None:
    mesh.add("stage", "stage-0")
    clock.now_s += STEADY_S + 1
    started[0].returncode = -9
    mesh._revive(mesh.children["stage-0"])
    assert len(started) == 2
    assert mesh.processes() == [("stage-0", started[1].pid)]


def test_a_process_that_keeps_dying_is_started_less_and_less_often(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess]
) -> None:
    mesh.add("stage", "stage-0")
    child = mesh.children["stage-0"]
    waits_s: list[float] = []
    while len(waits_s) < 9:
        started[-1].returncode = 1
        died_s, count = clock.now_s, len(started)
        while len(started) == count:
            mesh._revive(child)
            clock.now_s += 0.05
        waits_s.append(clock.now_s - died_s)
    for wait_s, wanted_s in zip(waits_s, (RESTART_DELAY_S * 2**n for n in range(9)), strict=True):
        assert wait_s == pytest.approx(min(wanted_s, MAX_RESTART_DELAY_S), abs=0.11)


def test_one_that_was_steady_starts_counting_anew(mesh: LocalMesh, clock: Clock, started: list[FakeProcess]) -> None:
    mesh.add("stage", "stage-0")
    child = mesh.children["stage-0"]
    child.failures_in_a_row = 5
    clock.now_s += STEADY_S
    started[-1].returncode = 1
    mesh._revive(child)
    assert child.failures_in_a_row == 0


def test_a_child_that_cannot_be_started_now_is_tried_again_and_the_watcher_goes_on(
    mesh: LocalMesh,
    clock: Clock,
    started: list[FakeProcess],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = [OSError(12, "Cannot allocate memory")] * 4

    def fork(starter: LocalStarter, command: str, environment: dict[str, str], log_path: Path) -> FakeProcess:
        if errors:
            raise errors.pop(0)
        return FakeProcess(starter, command, environment, log_path)

    mesh.add("stage", "stage-0")
    mesh._place("expert", "expert-0")
    monkeypatch.setattr(LocalStarter, "start", fork)
    clock.now_s += STEADY_S
    started[0].returncode = -9
    for _ in range(5):
        for child in mesh.children.values():
            mesh._attend(child)
        clock.now_s += NO_START_DELAY_S / 2
    assert [process.module for process in started] == ["services.stage", "services.stage", "services.expert"]
    assert mesh.children["stage-0"].restarts == 1
    killed, *said = capsys.readouterr().err.splitlines()
    assert "stage-0: it was ended by signal 9" in killed
    assert len(said) == 2, "the same trouble of the same child is told once"
    assert said[0].startswith("moemesh supervisor: stage-0 cannot be started")
    assert "Cannot allocate memory" in said[0]


def test_one_whose_imports_are_under_way_comes_as_soon_as_they_are_done_and_nobody_is_told(
    mesh: LocalMesh,
    clock: Clock,
    started: list[FakeProcess],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> FakeProcess:
        raise ImportsUnderWayError("torch")

    with monkeypatch.context() as imports:
        imports.setattr(LocalStarter, "start", refuse)
        mesh.add("stage", "stage-0")
        mesh._attend(mesh.children["stage-0"])
        assert mesh.processes() == []
    mesh._attend(mesh.children["stage-0"])
    assert mesh.processes() == [("stage-0", started[0].pid)]
    child = mesh.children["stage-0"]
    started[0].returncode = -9
    clock.now_s += STEADY_S
    with monkeypatch.context() as imports:
        imports.setattr(LocalStarter, "start", refuse)
        mesh._attend(child)
        assert child.restarts == 0
    mesh._attend(child)
    assert child.restarts == 1
    (killed,) = capsys.readouterr().err.splitlines()
    assert "stage-0: it was ended by signal 9" in killed


def test_imports_that_fail_again_and_again_are_hopeless_and_quoted(
    mesh: LocalMesh, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStarter, "is_hopeless", True)
    mesh.starter.log_path.write_text("Traceback\nImportError: libtorch.so is missing\n")
    with pytest.raises(NodeLostError, match=r"no node can start: ImportError: libtorch\.so is missing"):
        mesh.wait_ready(10.0)


def test_one_failed_fork_does_not_end_the_watcher(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(11, "Resource temporarily unavailable")]

    def fork(starter: LocalStarter, command: str, environment: dict[str, str], log_path: Path) -> FakeProcess:
        if errors:
            raise errors.pop()
        return FakeProcess(starter, command, environment, log_path)

    with mesh:
        monkeypatch.setattr(LocalStarter, "start", fork)
        before = len(started)
        mesh.scale("expert", 3)
        deadline_s = time.monotonic() + 5
        while len(started) == before and time.monotonic() < deadline_s:
            time.sleep(0.01)
            clock.now_s += 0.1
        assert [process.module for process in started[before:]] == ["services.expert"]


def test_a_process_that_refuses_to_start_is_quoted(mesh: LocalMesh, started: list[FakeProcess]) -> None:
    mesh.add("router", "router-0")
    mesh.logs("router-0").write_text('{"event": "x"}\nmoemesh router: PORT=99999 is wrong\n{"event": "y"}\n')
    started[0].returncode = 1
    with pytest.raises(NodeLostError, match="router-0 cannot start: moemesh router: PORT=99999 is wrong"):
        mesh.wait_ready(10.0)


def test_one_that_dies_three_times_in_a_row_is_hopeless(mesh: LocalMesh) -> None:
    mesh.add("stage", "stage-0")
    mesh.children["stage-0"].failures_in_a_row = 3
    with pytest.raises(NodeLostError, match=r"stage-0 cannot start: \(it wrote no log\)"):
        mesh.wait_ready(10.0)


def test_one_that_is_killed_again_and_again_in_a_mesh_that_was_ready_each_time_is_not_hopeless(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalMesh, "_ask_ready", lambda self: (True, "ready"))
    mesh.add("router", "router-0")
    child = mesh.children["router-0"]
    for number in range(2, 8):
        started[-1].returncode = -signal.SIGKILL
        while len(started) < number:
            mesh._revive(child)
            clock.now_s += 0.05
        mesh.wait_ready(10.0)


def test_nodes_end_before_the_router_so_that_they_can_say_goodbye(
    mesh: LocalMesh, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def end(self: FakeProcess, number: int) -> None:
        told.append(self.module)
        self.returncode = 0

    monkeypatch.setattr(FakeProcess, "send_signal", end)
    for service, name in (("router", "router-0"), ("stage", "stage-0"), ("expert", "expert-0")):
        mesh.add(service, name)
    mesh.close()
    assert list(dict.fromkeys(told)) == ["services.stage", "services.expert", "services.router"]


def test_the_watcher_outlives_its_children_since_the_kernel_ends_a_child_with_the_thread_that_started_it(
    mesh: LocalMesh, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[bool] = []

    def end(self: FakeProcess, number: int) -> None:
        watched.append(mesh._watcher is not None and mesh._watcher.is_alive())
        self.returncode = 0

    monkeypatch.setattr(FakeProcess, "send_signal", end)
    with mesh:
        num_started = len(started)
    assert watched
    assert all(watched)
    assert mesh._watcher is None
    assert len(started) == num_started


def test_a_process_that_does_not_hear_is_killed(mesh: LocalMesh, started: list[FakeProcess]) -> None:
    mesh.add("stage", "stage-0")
    started[0].hears_signals = False
    mesh.stop("stage-0", timeout_s=0.0)
    assert started[0].signals == [signal.SIGTERM, signal.SIGCONT, signal.SIGKILL]
    assert mesh.processes() == []


def test_a_folder_belongs_to_one_mesh_and_a_second_touches_nothing_in_it(mesh: LocalMesh) -> None:
    with mesh:
        (mesh.state_dir / "http.url").write_text("http://127.0.0.1:8000\n")
        with pytest.raises(ConfigurationError, match="another mesh runs on STATE_DIR"):
            LocalMesh({"MODEL": "m"}, mesh.state_dir).__enter__()
        assert mesh.url == "http://127.0.0.1:8000"
    with LocalMesh({"MODEL": "m"}, mesh.state_dir):
        assert len(mesh.processes()) == 0


def test_the_shape_of_a_mesh_is_read_as_its_processes_read_it(
    tmp_path: Path, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is a whole number to the settings, and a name in small letters."""
    for name, value in (("experts", "3"), ("PP", "2.0"), ("SPARES", " 1 ")):
        monkeypatch.setenv(name, value)
    with LocalMesh({"MODEL": "m"}, tmp_path) as local:
        assert sorted(local.children) == [
            *(f"expert-{i}" for i in range(3)),
            "router-0",
            "stage-0",
            "stage-1",
            "stage-2",
        ]
    with pytest.raises(ConfigurationError, match="PP='two'"):
        LocalMesh({"MODEL": "m", "PP": "two"}, tmp_path).__enter__()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"STATE_DIR=.* cannot be used"):
        LocalMesh({"MODEL": "m"}, tmp_path / "file" / "state").__enter__()


def test_the_address_is_known_only_while_the_router_listens(mesh: LocalMesh) -> None:
    with pytest.raises(NodeLostError, match="does not listen yet"):
        _ = mesh.url
    (mesh.state_dir / "http.url").write_text("http://127.0.0.1:8000\n")
    assert mesh.url == "http://127.0.0.1:8000"


def test_one_that_is_stopped_stays_ended_until_it_is_started_and_then_comes_without_delay(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess]
) -> None:
    mesh.add("expert", "expert-0")
    mesh.stop("expert-0", timeout_s=0.0)
    assert started[0].signals[0] == signal.SIGTERM
    assert mesh.processes() == []
    assert not mesh.children["expert-0"].is_wanted
    clock.now_s += 0.05
    mesh.start("expert-0")
    mesh._revive(mesh.children["expert-0"])
    assert mesh.processes() == [("expert-0", started[1].pid)]
    assert mesh.children["expert-0"].failures_in_a_row == 0


def test_scaling_gives_new_names_and_ends_the_newest_first(mesh: LocalMesh, started: list[FakeProcess]) -> None:
    for number in range(2):
        mesh.add("expert", f"expert-{number}")
    mesh.scale("expert", 4)
    assert list(mesh.children) == ["expert-0", "expert-1", "expert-2", "expert-3"]
    assert len(started) == 2, "the watcher starts them: the kernel ends a child with the thread that started it"
    for name in ("expert-2", "expert-3"):
        mesh._start(mesh.children[name])
    mesh.scale("expert", 1)
    assert list(mesh.children) == ["expert-0"]
    assert [process.returncode for process in started] == [None, 0, 0, 0]


def test_the_watcher_starts_what_scaling_asked_for(mesh: LocalMesh, started: list[FakeProcess]) -> None:
    with mesh:
        before = len(started)
        mesh.scale("stage", 3)
        deadline_s = time.monotonic() + 5
        while len(started) == before and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert [process.module for process in started[before:]] == ["services.stage"]
        assert mesh.kinds()["stage-2"] == "stage"


def test_a_name_that_is_not_there_is_a_sentence(mesh: LocalMesh) -> None:
    mesh.add("stage", "stage-0")
    with pytest.raises(ConfigurationError, match="stage-7 is not part of this mesh; it has stage-0"):
        mesh.stop("stage-7")


def test_files_of_the_state_folder_that_somebody_removed_are_made_again_and_it_is_said_once(
    mesh: LocalMesh, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with mesh:
        shutil.rmtree(mesh.state_dir)
        for _ in range(3):
            clock.now_s += LOOK_INTERVAL_S
            mesh._look_after_folder()
        assert {path.name for path in mesh.state_dir.iterdir()} == {"mesh.lock", "logs"}
        with pytest.raises(ConfigurationError, match="another mesh runs"):
            lock_folder(mesh.state_dir, "mesh")
    assert capsys.readouterr().err.count("have been recreated") == 1


def test_a_child_that_was_killed_is_told_as_killed_and_not_by_its_last_log_line(
    mesh: LocalMesh, clock: Clock, started: list[FakeProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.add("expert", "expert-0")
    child = mesh.children["expert-0"]
    child.log_path.write_text("loaded 12 shards\n")
    for _ in range(2):
        started[-1].returncode = -9
        died = len(started)
        while len(started) == died:
            clock.now_s += 0.3
            mesh._attend(child)
    started[-1].returncode = -9
    mesh._attend(child)
    with pytest.raises(NodeLostError, match=r"expert-0 cannot start: it was ended by signal 9 \(SIGKILL\)") as caught:
        mesh._raise_if_hopeless()
    assert "loaded 12 shards" not in str(caught.value)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert all("expert-0: it was ended by signal 9" in line for line in told)


def test_a_process_that_not_even_a_kill_ends_is_left_behind_after_its_time_and_named(
    mesh: LocalMesh, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits_s: list[float | None] = []

    def wait(process: FakeProcess, timeout: float | None = None) -> int:
        waits_s.append(timeout)
        raise subprocess.TimeoutExpired(process.module, timeout or 0.0)

    monkeypatch.setattr(FakeProcess, "wait", wait)
    mesh.add("stage", "stage-0")
    mesh.stop("stage-0", timeout_s=0.5)
    assert started[0].signals[-1] == signal.SIGKILL
    assert waits_s == [pytest.approx(0.5, abs=0.1), KILLED_S]
    assert f"process {started[0].pid} was killed and has not ended" in capsys.readouterr().err


def test_waiting_for_a_mesh_ends_with_what_is_missing(mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMesh, "_ask_ready", lambda mesh: (False, "1 of 2 stage nodes"))
    with pytest.raises(DeadlineError, match=r"not ready within 0 s: 1 of 2 stage nodes"):
        mesh.wait_ready(timeout_s=0.2)
