"""One run: steady state, the answers without faults, load and faults, healing in any case, quiet.

It makes the record and nothing else; what the record means is said by chaos/verdicts/judgement.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import httpx

from chaos.experiment import Experiment
from chaos.faults.base import Fault
from chaos.faults.catalog import FAULTS
from chaos.record.history import (
    Event,
    FaultApplied,
    FaultHealed,
    FaultSkipped,
    History,
    MeshWhole,
    PhaseBegan,
    RunBegan,
)
from chaos.record.load import ClientLoad, StreamingClient, http_client
from chaos.record.observer import Observer, Progress
from chaos.record.operations import read_operations
from chaos.record.reference import Reference, reference_of
from chaos.record.requests import ChaosRequest, draw_requests
from chaos.target import Target, TargetError
from chaos.timeline import AllowedFault, PlannedFault, TimelineRules, make_timeline, overlapping_groups
from chaos.victims import VictimRule, choose_victims

BETWEEN_OVERLAPPING_S = 0.4
WORK_WITHIN_S = 10.0
"""A fault waits at most this long for most streams to be in mid-answer."""


_NEVER = 1 << 30
"""Collections of the middle generation."""


class CannotRunError(Exception):
    """The run could not be made, and nothing is known about the mesh. It says what was missing."""


@dataclass(slots=True)
class Run:
    """One run, made once. `history` grows while `execute` runs, and is worth reading also when it raises."""

    experiment: Experiment
    target: Target
    target_name: str
    seed: int
    history: History
    clock: Callable[[], float]
    """It tells the seconds since the run began."""
    began_unix_s: float
    say: Callable[[str], None]
    transport: httpx.AsyncBaseTransport | None = None
    """Tests have it in place of the network."""
    sees_processes: bool = False
    requests: list[ChaosRequest] = field(default_factory=list)
    model: str = ""
    _progress: Progress = field(default_factory=Progress)
    _open_faults: dict[int, Fault] = field(default_factory=dict)
    """The faults that are not healed, by their number, in the order in which they came."""
    _last_victims: tuple[str, ...] = ()

    async def execute(self) -> None:
        """Runs all phases. Raises CannotRunError. All that was hurt is healed when it returns or raises."""
        load = self.experiment.load
        with without_long_collections():
            async with (
                http_client(load.streams, self.transport) as http,
                httpx.AsyncClient(timeout=5, trust_env=False, transport=self.transport) as ask,
            ):
                observer = Observer(ask, self.target, self._record, self.clock)
                await self._reach_steady_state(observer)
                self.requests = draw_requests(self.seed, load, await self._accepts_penalties(ask))
                client = StreamingClient(http, self.target.url, self.model, load, self._record, self.clock)
                label = uuid.uuid4().hex[:12]
                cold = replace(client, is_cold=True)
                await self._run_undisturbed(ClientLoad(cold, self.requests, load.streams, f"{label}-reference"))
                await self._begin_baseline(observer)
                await self._run_faults(observer, ClientLoad(client, self.requests, load.streams, label))
                await self._end(observer)

    def _record(self, event: Event) -> None:
        self.history.add(event)
        self._progress.see(event)

    def _begin(self, phase: str) -> None:
        self.say(f"{self.clock():7.1f} s  {phase}")
        self._record(PhaseBegan(self.clock(), phase))

    async def _reach_steady_state(self, observer: Observer) -> None:
        within_s = self.experiment.steady_state.ready_within_s
        said = await observer.wait_ready(within_s)
        if said:
            raise CannotRunError(f"{self.target.url} was not ready within {within_s:.0f} s: {said}")
        try:
            reply = await observer.http.get(f"{self.target.url}/v1/models")
            self.model = str(reply.json()["data"][0]["id"])
        except (httpx.TransportError, ValueError, KeyError, IndexError) as error:
            raise CannotRunError(f"{self.target.url}/v1/models does not name a model: {error}") from error
        began = RunBegan(0.0, self.experiment.name, self.seed, self.target_name, self.model, self.began_unix_s)
        self._record(began)
        self._begin("steady")

    async def _accepts_penalties(self, http: httpx.AsyncClient) -> bool:
        body = {"model": self.model, "prompt": "a", "max_tokens": 1, "presence_penalty": 0.5}
        try:
            reply = await http.post(f"{self.target.url}/v1/completions", json=body, timeout=60)
        except httpx.TransportError as error:
            raise CannotRunError(f"{self.target.url} does not answer a request: {error}") from error
        return reply.status_code == 200

    async def _run_undisturbed(self, load: ClientLoad) -> None:
        self._begin("reference")
        await load.run_once()
        operations = [o for o in read_operations(self.history.events) if o.phase == "reference"]
        failed = [operation for operation in operations if not operation.is_whole]
        if failed:
            raise CannotRunError(f"without any fault {failed[0].name} is not answered: {failed[0].failure}")

    @property
    def reference(self) -> Reference:
        """The answers of the undisturbed phase."""
        return reference_of(read_operations(self.history.events))

    async def _begin_baseline(self, observer: Observer) -> None:
        self._begin("baseline")
        await observer.wait_quiet(self.experiment.rollback.quiet_within_s)
        await observer.set_baseline()
        self.sees_processes = observer.sample_processes() > 0
        observer.record_metrics()

    async def _run_faults(self, observer: Observer, load: ClientLoad) -> None:
        self._begin("faults")
        watching = [asyncio.create_task(watch()) for watch in (observer.watch, observer.watch_harness)]
        began_s = self.clock()
        load.start()
        try:
            await self._wait_all_stream(began_s, self.experiment.steady_state.streams_within_s)
            await self._apply_timeline(observer)
            self._begin("finish")
            load.stop()
            await load.join(self.experiment.rollback.finish_within_s)
        finally:
            # Not awaited piece by piece: this runs also when the run is being cancelled.
            self._heal_all()
            load.stop()
            for task in (*load.tasks, *watching):
                task.cancel()
            await asyncio.gather(*load.tasks, *watching, return_exceptions=True)
        for task in watching:
            if not task.cancelled() and (error := task.exception()) is not None:
                # Nothing was known to be whole from then on.
                raise CannotRunError(f"the observer failed: {error!r}")

    async def _wait_all_stream(self, since_s: float, timeout_s: float) -> None:
        await self._wait_until(lambda: self._progress.all_since(since_s, self.experiment.load.streams), timeout_s)

    async def _wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        """Waits until it is so, or until the timeout; the record tells which."""
        deadline_s = self.clock() + timeout_s
        while True:
            if is_so() or self.clock() > deadline_s:
                return
            await asyncio.sleep(0.01)

    async def _offered_faults(self) -> list[AllowedFault]:
        """Returns what can be done to this target from here, and names once what cannot.

        As many faults as the suite says come all the same, of the kinds that are left.
        """
        offered: list[AllowedFault] = []
        for number, entry in enumerate(self.experiment.timeline.faults):
            (example,) = make_timeline(self.seed, [entry], TimelineRules(count=1))
            reason = await self._reason_against(example)
            if reason:
                self._skip(replace(example, number=-1 - number), reason, is_expected=True)
            else:
                offered.append(entry)
        return offered

    async def _reason_against(self, planned: PlannedFault) -> str:
        fault = FAULTS[planned.kind].from_suite(planned.parameters)
        lacking = fault.needs - self.target.features
        if lacking:
            return f"the target has no {', '.join(sorted(lacking))}"
        return await asyncio.to_thread(self._unavailable, fault, planned.victims)

    def _unavailable(self, fault: Fault, victims: VictimRule) -> str:
        if (reason := fault.unavailable(self.target)) or victims.rule == "nobody":
            return reason
        of_kind = [node for node in self.target.nodes() if victims.kind in ("", node.kind)]
        is_hopeless = of_kind and not any(map(fault.can_hurt, of_kind))  # where none runs just now, one comes back
        return f"no {victims.kind or 'node'} has what it hurts" if is_hopeless else ""

    async def _apply_timeline(self, observer: Observer) -> None:
        offered = await self._offered_faults()
        planned = make_timeline(self.seed, offered, self.experiment.timeline) if offered else []
        before_s = 0.0
        for group in overlapping_groups(planned):
            await asyncio.sleep(group[0].at_s - before_s)
            before_s = group[-1].at_s
            if await self._hurt(group, observer):
                await self._settle(group, observer)

    async def _hurt(self, group: Sequence[PlannedFault], observer: Observer) -> bool:
        """Applies a fault and those that overlap it, heals each after its time, and returns whether any was applied."""
        healing_s: list[tuple[float, PlannedFault]] = []
        for position, planned in enumerate(group):
            if position:
                await asyncio.sleep(min(BETWEEN_OVERLAPPING_S, group[0].heal_after_s / 2 or BETWEEN_OVERLAPPING_S))
            if await self._apply(planned, observer):
                healing_s.append((self.clock() + planned.heal_after_s, planned))
        for due_s, planned in sorted(healing_s, key=lambda item: item[0]):
            await asyncio.sleep(max(0.0, due_s - self.clock()))
            await self._heal(planned)
        return bool(healing_s)

    async def _apply(self, planned: PlannedFault, observer: Observer) -> bool:
        if reason := await self._reason_against(planned):
            return self._skip(planned, reason, is_expected=True)
        fault = FAULTS[planned.kind].from_suite(planned.parameters)
        nodes, roles = await observer.look_at_nodes(), await observer.look_at_roles()
        draw = random.Random(f"{self.seed}/victims/{planned.number}")
        keep = {str(kind): count for kind, count in self.experiment.timeline.keep.items()}
        victims = choose_victims(planned.victims, nodes, draw, self._last_victims, keep, roles, fault.can_hurt)
        if not victims and planned.victims.rule != "nobody":
            return self._skip(planned, f"no node to hurt: {planned.victims}", is_expected=False)
        # Streams that run in step end at the same moment; a fault between two rounds would hit nothing.
        most = max(1, self.experiment.load.streams * 3 // 4)
        await self._wait_until(lambda: self._progress.num_streaming >= most, WORK_WITHIN_S)
        at_s = self.clock()
        self._open_faults[planned.number] = fault
        try:
            await asyncio.to_thread(fault.apply, self.target, victims)
        except TargetError as error:
            await self._heal(planned)
            return self._skip(planned, str(error), is_expected=False)
        names = tuple(victim.name for victim in victims)
        self._last_victims = names or self._last_victims  # a fault of the machine has none
        words = tuple(str(roles.get(name, "")) for name in names)
        hurt = ", ".join(f"{name} ({word})" if word else name for name, word in zip(names, words, strict=True))
        self.say(f"{at_s:7.1f} s  {planned.number + 1}/{self.experiment.timeline.count} {planned.kind} {hurt}")
        self._record(FaultApplied(at_s, planned.number, planned.kind, tuple(victims), names, planned.parameters, words))
        return True

    def _skip(self, planned: PlannedFault, reason: str, is_expected: bool) -> bool:
        self.say(f"{self.clock():7.1f} s  {planned.kind} left out: {reason}")
        self._record(FaultSkipped(self.clock(), planned.number, planned.kind, reason, is_expected))
        return False

    async def _heal(self, planned: PlannedFault) -> None:
        fault = self._open_faults[planned.number]
        await asyncio.to_thread(self._try_to_heal, fault)
        del self._open_faults[planned.number]
        self._record(FaultHealed(self.clock(), planned.number, fault.remark, fault.doubt))

    def _heal_all(self) -> None:
        """Heals everything in the loop's own thread: nothing may come between."""
        while self._open_faults:
            number, fault = self._open_faults.popitem()
            self._try_to_heal(fault)
            self._record(FaultHealed(self.clock(), number, fault.remark, fault.doubt))

    def _try_to_heal(self, fault: Fault) -> None:
        """Says what cannot be healed and raises nothing: the verdict that the mesh is not whole will show it."""
        try:
            fault.heal(self.target)
        except TargetError as error:
            self.say(f"{self.clock():7.1f} s  healing of {fault.name}: {error}")

    async def _settle(self, group: Sequence[PlannedFault], observer: Observer) -> None:
        """Waits until the mesh is whole and all streams go on: the next fault should hit work in flight."""
        within_s = self.experiment.timeline.settle_within_s
        whole_s = await observer.wait_whole(self.clock(), within_s)
        if whole_s is None:
            self.say(f"{self.clock():7.1f} s  not whole within {within_s:.0f} s")
            return
        for planned in group:
            self._record(MeshWhole(whole_s, planned.number))
        await self._wait_all_stream(whole_s, within_s)

    async def _end(self, observer: Observer) -> None:
        self._begin("quiet")
        await observer.wait_quiet(self.experiment.rollback.quiet_within_s)
        # A node that has only just come back is still loading; its memory is looked at when it has settled.
        with contextlib.suppress(TargetError):
            await observer.look()
        self._begin("end")
        observer.record_metrics()
        observer.sample_processes()


@contextlib.contextmanager
def without_long_collections() -> Iterator[None]:
    """Keeps Python's garbage collector from looking through the whole record, which grows to millions of objects.

    At the end of a nightly it did so for 0.7 s, in which the harness stood still and saw gaps that were its own. Young
    objects are still collected.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(before[0], before[1], _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
