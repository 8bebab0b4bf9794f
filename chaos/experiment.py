"""A suite as people write it: one YAML document, checked here field by field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chaos.faults.catalog import FAULTS
from chaos.record.requests import RequestShape
from chaos.target import NODE_KINDS
from chaos.timeline import AllowedFault, TimelineRules, make_timeline
from chaos.verdicts.judgement import DEFAULT, Bounds
from chaos.verdicts.leaks import LeakBounds
from chaos.victims import VictimRule

SUITES = Path(__file__).parent / "suites"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
NodeKind = Literal["router", "stage", "expert"]


class ExperimentError(Exception):
    """A suite cannot be used; names the field and what would be right."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SteadyState(_Strict):
    """What must hold before anything is hurt, and how long to wait for it."""

    ready_within_s: Positive = 180.0
    streams_within_s: Positive = 60.0
    """Until every stream has got tokens."""


class Load(_Strict):
    """Streaming clients; each asks one request after another until the timeline has ended."""

    streams: Annotated[int, Field(ge=1, le=1024)] = 16
    requests: Annotated[int, Field(ge=1, le=4096)] = 16
    """Different requests; the clients take them in turn."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    prompt_words: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (8, 48)
    greedy: Share = 0.5
    stop: Share = 0.2
    two_choices: Share = 0.2
    penalties: Share = 0.2
    resumable: bool = True
    """Clients ask for streams that they can re-attach to."""
    reattach_within_s: Positive = 60.0
    request_deadline_s: Positive = 300.0
    """A client that has neither an end nor an error by then gives up, and the request counts as hung."""

    @model_validator(mode="after")
    def _words_in_order(self) -> Self:
        if self.prompt_words[0] > self.prompt_words[1]:
            raise ValueError("prompt_words: the first is the fewest, the second the most")
        return self

    @property
    def shape(self) -> RequestShape:
        return RequestShape(
            self.max_tokens, self.prompt_words, self.greedy, self.stop, self.two_choices, self.penalties
        )


class Victims(_Strict):
    """Who is hurt; see chaos/victims.py."""

    rule: Literal["random", "same", "all", "everything_but_router", "pair", "named", "nobody", "host"] = "random"
    kind: NodeKind | Literal[""] = ""
    count: Annotated[int, Field(ge=1)] = 1
    names: tuple[str, ...] = ()
    role: Literal["", "holder", "mirror", "expert", "spare"] = ""


class FaultEntry(_Strict):
    """One kind of fault that the timeline may draw."""

    kind: str
    weight: Positive = 1.0
    victims: Victims = Victims()
    heal_after_s: tuple[Seconds, Seconds] = (0.0, 0.0)
    parameters: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.kind not in FAULTS:
            raise ValueError(f"kind: there is no fault {self.kind!r}; there are {', '.join(sorted(FAULTS))}")
        if self.heal_after_s[0] > self.heal_after_s[1]:
            raise ValueError("heal_after_s: the first is the shortest, the second the longest")
        return self

    @property
    def allowed(self) -> AllowedFault:
        rule = VictimRule(
            self.victims.rule, self.victims.kind, self.victims.count, self.victims.names, self.victims.role
        )
        return AllowedFault(self.kind, self.weight, rule, self.heal_after_s, self.parameters)


class Timeline(_Strict):
    """How many faults, how close, and who must always be left."""

    count: Annotated[int, Field(ge=1)]
    spacing_s: tuple[Seconds, Seconds] = (1.0, 4.0)
    overlap: Share = 0.0
    settle_within_s: Positive = 90.0
    """Longest wait for the mesh to be whole before the next fault; after that the next one comes all the same."""
    keep: dict[NodeKind, Annotated[int, Field(ge=0)]] = {}
    """How many of a kind are never hurt at once: 1 expert means that the last copy is left."""
    faults: Annotated[tuple[FaultEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_drawable(self) -> Self:
        if self.spacing_s[0] > self.spacing_s[1]:
            raise ValueError("spacing_s: the first is the shortest, the second the longest")
        # All parameters that may be drawn cannot be tried, but those of one timeline can.
        planned = make_timeline(0, [entry.allowed for entry in self.faults], self.rules)
        for fault in planned:
            try:
                FAULTS[fault.kind].from_suite(fault.parameters)
            except ValueError as error:
                raise ValueError(f"faults: parameters of {fault.kind}: {error}") from error
        return self

    @property
    def rules(self) -> TimelineRules:
        return TimelineRules(self.count, self.spacing_s, self.overlap)


class Leaks(_Strict):
    """See LeakBounds."""

    rss_share: Annotated[float, Field(ge=0)] = 0.35
    rss_mib: Annotated[int, Field(ge=0)] = 96
    files: Annotated[int, Field(ge=0)] = 16
    sockets: Annotated[int, Field(ge=0)] = 16


class SuiteBounds(_Strict):
    """What is still good; see chaos/verdicts/judgement.py. Maps take `kill/stage`, `kill` and `default`."""

    stall_s: dict[str, Positive] = {DEFAULT: 10.0}
    recovery_s: dict[str, Positive] = {DEFAULT: 60.0}
    first_token_s: Positive = 60.0
    max_refused: Annotated[int, Field(ge=0)] | None = 0
    tpot_ratio: dict[str, Positive] = {}
    throughput_share: Share | None = None
    harmless: tuple[str, ...] = ("cpu_hog",)
    leaks: Leaks = Leaks()

    @model_validator(mode="after")
    def _keys_are_known(self) -> Self:
        for key in self.tpot_ratio.keys() - FAULTS.keys():
            raise ValueError(f"tpot_ratio: {key!r} is no fault kind")
        for name, bounds in (("stall_s", self.stall_s), ("recovery_s", self.recovery_s)):
            if DEFAULT not in bounds:
                raise ValueError(f"{name}: needs a value for `default`")
            for key in bounds.keys() - {DEFAULT}:
                kind, _, victim = key.partition("/")
                if kind not in FAULTS or victim not in ("", *NODE_KINDS):
                    raise ValueError(f"{name}: {key!r} is no fault kind, and none of a node kind either")
        return self

    def bounds(self, sees_processes: bool) -> Bounds:
        """As verdicts take them."""
        return Bounds(
            stall_s=self.stall_s,
            recovery_s=self.recovery_s,
            first_token_s=self.first_token_s,
            max_refused=self.max_refused,
            tpot_ratio=self.tpot_ratio,
            throughput_share=self.throughput_share,
            harmless=self.harmless,
            leaks=LeakBounds(self.leaks.rss_share, self.leaks.rss_mib * 2**20, self.leaks.files, self.leaks.sockets),
            sees_processes=sees_processes,
        )


class Rollback(_Strict):
    """What is waited for when the faults are over; healing itself is not a choice."""

    finish_within_s: Positive = 120.0
    """For the requests that are under way to come to their end."""
    quiet_within_s: Positive = 30.0
    """For the mesh to have given back what they held."""


class Experiment(_Strict):
    """A whole suite."""

    name: str
    description: str = ""
    mesh: dict[str, str | int] = {}
    """Settings by their environment's names that a target which is started for the run gets."""
    links: Literal["direct", "proxy"] = "direct"
    """`proxy`: such a mesh has its links through the harness's proxy, which faults of links need."""
    hosts: Annotated[int, Field(ge=0, le=64)] = 0
    """Such a mesh runs on so many hosts, played by network namespaces; 0: on this machine. `host_loss` needs them."""
    steady_state: SteadyState = SteadyState()
    load: Load = Load()
    timeline: Timeline
    bounds: SuiteBounds = SuiteBounds()
    rollback: Rollback = Rollback()

    @model_validator(mode="after")
    def _links_are_of_one_kind(self) -> Self:
        if self.hosts and self.links != "direct":
            raise ValueError("hosts: links between played hosts are `direct`; a suite has hosts or a proxy")
        return self


def read_experiment(suite: str) -> Experiment:
    """A suite by its name (`smoke`) or its path. Raises ExperimentError."""
    path = Path(suite) if suite.endswith((".yaml", ".yml")) or "/" in suite else SUITES / f"{suite}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in SUITES.glob("*.yaml")))
        raise ExperimentError(f"no suite {suite!r} ({error.strerror}); a name of {names}, or a path") from error
    except yaml.YAMLError as error:
        raise ExperimentError(f"{path} is no YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise ExperimentError(f"{path} must hold a mapping with `name`, `timeline` and so on")
    return parse_experiment(document)


def parse_experiment(document: Mapping[str, Any]) -> Experiment:
    """Raises ExperimentError with the first wrong field."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ExperimentError(f"{place or 'suite'}: {first['msg'].removeprefix('Value error, ')}") from error
