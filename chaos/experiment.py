"""A suite as people write it: one YAML document, checked here field by field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chaos.faults.catalog import FAULTS
from chaos.record.requests import RequestShape
from chaos.target import NODE_KINDS
from chaos.timeline import AllowedFault, Seconds, TimelineRules, make_timeline
from chaos.verdicts.judgement import DEFAULT, Bounds, Positive, Share
from chaos.victims import NodeKind

SUITES = Path(__file__).parent / "suites"


class ExperimentError(Exception):
    """A suite cannot be used. It names the field and what would be right."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SteadyState(_Strict):
    """What must hold before anything is hurt, and how long the run waits for it."""

    ready_within_s: Positive = 180.0
    streams_within_s: Positive = 60.0
    """How long the run waits until every stream has got tokens."""


class SuiteLoad(_Strict):
    """Streaming clients, each of which asks one request after another until the timeline has ended."""

    streams: Annotated[int, Field(ge=1, le=1024)] = 16
    requests: Annotated[int, Field(ge=1, le=4096)] = 16
    """The number of different requests, which the clients ask in turn."""
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


def _of_known_kind(fault: AllowedFault) -> AllowedFault:
    if fault.kind not in FAULTS:
        raise ValueError(f"kind: there is no fault {fault.kind!r}; there are {', '.join(sorted(FAULTS))}")
    if fault.heal_after_s[0] > fault.heal_after_s[1]:
        raise ValueError("heal_after_s: the first is the shortest, the second the longest")
    return fault


class Timeline(_Strict):
    """How many faults there are, how close they come, and who must always be left."""

    count: Annotated[int, Field(ge=1)]
    spacing_s: tuple[Seconds, Seconds] = (1.0, 4.0)
    overlap: Share = 0.0
    settle_within_s: Positive = 90.0
    """How long the next fault waits for the mesh to be whole; after that it comes all the same."""
    keep: dict[NodeKind, Annotated[int, Field(ge=0)]] = {}
    """How many of a kind are always left unhurt: with 1 expert the last copy stays."""
    faults: Annotated[tuple[Annotated[AllowedFault, AfterValidator(_of_known_kind)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_drawable(self) -> Self:
        if self.spacing_s[0] > self.spacing_s[1]:
            raise ValueError("spacing_s: the first is the shortest, the second the longest")
        # All parameters that may be drawn cannot be tried, but those of one timeline can.
        planned = make_timeline(0, self.faults, self.rules)
        for fault in planned:
            try:
                FAULTS[fault.kind].from_suite(fault.parameters)
            except ValueError as error:
                raise ValueError(f"faults: parameters of {fault.kind}: {error}") from error
        return self

    @property
    def rules(self) -> TimelineRules:
        return TimelineRules(self.count, self.spacing_s, self.overlap)


def _with_known_keys(bounds: Bounds) -> Bounds:
    for key in bounds.tpot_ratio.keys() - FAULTS.keys():
        raise ValueError(f"tpot_ratio: {key!r} is no fault kind")
    for name, limits in (("stall_s", bounds.stall_s), ("recovery_s", bounds.recovery_s)):
        if DEFAULT not in limits:
            raise ValueError(f"{name}: needs a value for `default`")
        for key in limits.keys() - {DEFAULT}:
            kind, _, victim = key.partition("/")
            if kind not in FAULTS or victim not in ("", *NODE_KINDS):
                raise ValueError(f"{name}: {key!r} is no fault kind, and none of a node kind either")
    return bounds


class Rollback(_Strict):
    """What the run waits for when the faults are over; healing itself is not a choice."""

    finish_within_s: Positive = 120.0
    """How long it waits for the requests that are under way to come to their end."""
    quiet_within_s: Positive = 30.0
    """How long it waits for the mesh to give back what they held."""


class Experiment(_Strict):
    """A whole suite."""

    name: str
    description: str = ""
    mesh: dict[str, str | int] = {}
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
        raise ExperimentError(f"{path} is no YAML: {error}") from error
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
