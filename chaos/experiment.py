"""A suite as people write it: one YAML document, checked here field by field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from chaos.faults.catalog import FAULTS
from chaos.record.requests import SuiteLoad
from chaos.suite_fields import Count, Positive, Section
from chaos.target import NODE_KINDS, NodeKind
from chaos.timeline import AllowedFault, TimelineRules, make_timeline
from chaos.verdicts.judgement import DEFAULT, Bounds

SUITES = Path(__file__).parent / "suites"


class ExperimentError(Exception):
    """A suite cannot be used. It names the field and what would be right."""


class SteadyState(Section):
    """What must hold before anything is hurt, and how long the run waits for it."""

    ready_within_s: Positive = 180.0
    streams_within_s: Positive = 60.0
    """How long the run waits until every stream has got tokens."""


def _of_known_kind(fault: AllowedFault) -> AllowedFault:
    if fault.kind not in FAULTS:
        raise ValueError(f"kind: there is no fault {fault.kind!r}; there are {', '.join(sorted(FAULTS))}")
    if fault.heal_after_s[0] > fault.heal_after_s[1]:
        raise ValueError("heal_after_s: the first is the shortest, the second the longest")
    return fault


class Timeline(TimelineRules):
    """Which faults come, how the run waits between them, and which nodes must always be left."""

    settle_within_s: Positive = 90.0
    """How long the next fault waits for the mesh to be whole; after that it comes all the same."""
    keep: dict[NodeKind, Count] = Field(default_factory=dict)
    """How many of a kind are always left unhurt: with 1 expert the last copy stays."""
    faults: Annotated[tuple[Annotated[AllowedFault, AfterValidator(_of_known_kind)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_drawable(self) -> Self:
        if self.spacing_s[0] > self.spacing_s[1]:
            raise ValueError("spacing_s: the first is the shortest, the second the longest")
        # All parameters that may be drawn cannot be tried, but those of one timeline can.
        planned = make_timeline(0, self.faults, self)
        for fault in planned:
            try:
                FAULTS[fault.kind].from_suite(fault.parameters)
            except ValueError as error:
                raise ValueError(f"faults: parameters of {fault.kind}: {error}") from error
        return self


def _with_known_keys(bounds: Bounds) -> Bounds:
    for key in bounds.tpot_ratio.keys() - FAULTS.keys():
        raise ValueError(f"tpot_ratio: {key!r} is not a fault kind")
    for name, limits in (("stall_s", bounds.stall_s), ("recovery_s", bounds.recovery_s)):
        if DEFAULT not in limits:
            raise ValueError(f"{name}: needs a value for `default`")
        for key in limits.keys() - {DEFAULT}:
            kind, _, victim = key.partition("/")
            if kind not in FAULTS or victim not in ("", *NODE_KINDS):
                raise ValueError(f"{name}: {key!r} is not a fault kind, alone or with a node kind")
    return bounds


class Rollback(Section):
    """What the run waits for when the faults are over; healing itself is not a choice."""

    finish_within_s: Positive = 120.0
    """How long it waits for the requests that are under way to come to their end."""
    quiet_within_s: Positive = 30.0
    """How long it waits for the mesh to give back what they held."""


class Experiment(Section):
    """A whole suite."""

    name: str
    description: str = ""
    mesh: dict[str, str | int] = Field(default_factory=dict)
    """A target that is started for the run gets these settings, by their environment's names."""
    links: Literal["direct", "proxy"] = "direct"
    """With `proxy` such a mesh has its links through the harness's proxy, which faults of links need."""
    hosts: Annotated[int, Field(ge=0, le=64)] = 0
    """The number of hosts, played by network namespaces, that such a mesh runs on; `host_loss` needs some."""
    steady_state: SteadyState = SteadyState()
    load: SuiteLoad = SuiteLoad()
    timeline: Timeline
    bounds: Annotated[Bounds, AfterValidator(_with_known_keys)] = Bounds()
    rollback: Rollback = Rollback()

    @model_validator(mode="after")
    def _links_are_of_one_kind(self) -> Self:
        if self.hosts and self.links != "direct":
            raise ValueError("hosts: links between played hosts are `direct`; a suite has hosts or a proxy")
        return self


def read_experiment(suite: str) -> Experiment:
    """Reads a suite by its name (`smoke`) or its path. Raises ExperimentError."""
    path = Path(suite) if suite.endswith((".yaml", ".yml")) or "/" in suite else SUITES / f"{suite}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in SUITES.glob("*.yaml")))
        raise ExperimentError(f"no suite {suite!r} ({error.strerror}); a name of {names}, or a path") from error
    except yaml.YAMLError as error:
        raise ExperimentError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise ExperimentError(f"{path} must hold a mapping with `name`, `timeline` and so on")
    return parse_experiment(document)


def parse_experiment(document: Mapping[str, Any]) -> Experiment:
    """Checks a suite. Raises ExperimentError with the first wrong field."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ExperimentError(f"{place or 'suite'}: {first['msg'].removeprefix('Value error, ')}") from error
