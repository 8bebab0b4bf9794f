"""A build with a planted bug turns the verdict red that speaks of it; the same run of the product as it is does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chaos.experiment import Experiment, parse_experiment
from chaos.record.history import History
from chaos.record.reference import Reference
from chaos.runner import Run
from chaos.targets.local_target import LocalTarget, ProxiedLocalTarget
from chaos.verdicts.judgement import RunJudgement, judge
from chaos.verdicts.verdict import State
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.chaos.planted_bugs import BUGS, module_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 4
BLIP = {"kind": "pause", "victims": {"kind": "expert"}, "heal_after_s": [0.1, 0.2]}
"""Nobody is declared dead for so short a time."""
LONG_PAUSE = {"kind": "pause", "victims": {"kind": "expert"}, "heal_after_s": [2.0, 3.0]}
SHORT_PAUSE = {"kind": "pause", "victims": {"kind": "expert"}, "heal_after_s": [0.4, 0.5]}
"""Long enough for answers to be late, too short for a death: who wakes up answers what others have answered."""
LOST_FILES = {
    "kind": "lose_files",
    "victims": {"kind": "stage"},
    "heal_after_s": [2.5, 2.5],
    "parameters": {"kill_after_s": 1.5},
}
"""The router has time to make its own again; the killed stage's successor must find it."""
SPOILT_RINGS = {
    "kind": "spoil_rings",
    "victims": {"kind": "stage"},
    "heal_after_s": [1.0, 2.0],
    "parameters": {"every_s": 0.05, "head_share": 0.0},
}
LOST_BELLS = {
    "kind": "lose_bells",
    "victims": {"kind": "stage"},
    "heal_after_s": [1.0, 2.0],
    "parameters": {"every_s": 0.02},
}
KILLED_IN_CALL = {"kind": "kill_in_call", "victims": {"kind": "expert"}, "parameters": {"state": "taken"}}
DAMAGED_FRAMES = {
    "kind": "frames",
    "victims": {"kind": "expert"},
    "heal_after_s": [1.0, 2.0],
    "parameters": {"kind": "corrupt", "percent": 10.0, "seed": 7},
}
ALIKE = {"alike": 1.0, "salted": 0.4, "requests": 8, "prompt_words": [40, 60]}
REPEATING = {"repeating": 1.0, "greedy": 0.0, "requests": 8}
KILLED_STAGE = {"kind": "kill", "victims": {"kind": "stage"}}


@dataclass(frozen=True)
class Case:
    """Which verdicts may speak of a bug, and what must happen for it to strike."""

    verdicts: tuple[str, ...]
    fault: Mapping[str, Any]
    settings: Mapping[str, str]
    num_faults: int = 2
    target: type[LocalTarget] = LocalTarget
    load: Mapping[str, Any] = field(default_factory=dict)
    """What is asked otherwise than by the rest; then the undisturbed answers of its own run are right."""


TOKENS = ("tokens_changed", "logprobs")
CASES = {
    "dropped_token": Case(("tokens_lost",), BLIP, {}),
    "doubled_token": Case(("tokens_doubled",), BLIP, {}),
    "flipped_logprob_bit": Case(("logprobs",), BLIP, {}),
    "leaked_block": Case(("leaks_mesh",), BLIP, {}),
    "forgotten_salt": Case(("salts",), BLIP, {}, load=ALIKE),
    "kept_evicted": Case(TOKENS, BLIP, {"KV_CACHE_TOKENS": "4096"}, num_faults=4, load=ALIKE),
    # Four streams hardly fit: who is preempted gets its own blocks back.
    "stale_tier": Case(TOKENS, BLIP, {"KV_CACHE_TOKENS": "1024"}, num_faults=4, load=ALIKE),
    "stale_samples": Case(TOKENS, BLIP, {}),
    "kept_draft": Case(TOKENS, BLIP, {"DRAFT_TOKENS": "4"}, load=REPEATING),
    "unfenced_late_reply": Case(TOKENS, SHORT_PAUSE, {"CALL_RINGS": "off"}),  # it is one of messages
    "hedge_counted_twice": Case(TOKENS, LONG_PAUSE, {}),
    "unchecked_ring": Case(TOKENS, SPOILT_RINGS, {}),
    "unsealed_link": Case(TOKENS, DAMAGED_FRAMES, {}, target=ProxiedLocalTarget),  # without rings: over tcp
    "bell_trusted": Case(("recovery", "hung"), LOST_BELLS, {}),
    "unfinished_answer": Case(TOKENS, KILLED_IN_CALL, {}, num_faults=4),
    "overclaimed_mark": Case(TOKENS, KILLED_STAGE, {"SPARES": "2"}),
    "told_only_once": Case(("recovery",), KILLED_STAGE, {"SPARES": "2"}),
    "files_left_lost": Case(("recovery",), LOST_FILES, {}),
    # Rows are replayed to the second slot alone, and either process may have it: four times hit both.
    "flipped_replayed_bit": Case(TOKENS, KILLED_STAGE, {"RECOVERY": "replay"}, num_faults=4),
}


def experiment(case: Case) -> Experiment:
    return parse_experiment(
        {
            "name": "planted",
            "load": {
                "streams": 4,
                "requests": 4,
                "max_tokens": 160,
                "prompt_words": [4, 8],
                "stop": 0,
                "two_choices": 0,
                "penalties": 0,
                **case.load,
            },
            "timeline": {
                "count": case.num_faults,
                "spacing_s": [0.2, 0.5],
                "settle_within_s": 30,
                "faults": [case.fault],
            },
            "bounds": {"max_refused": None},
            "rollback": {"finish_within_s": 60, "quiet_within_s": 5},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("planted") / "tiny")


def run(case: Case, model: Path, logs: Path, modules: Mapping[str, str]) -> tuple[History, Run]:
    settings = {"MODEL": str(model), "PP": "2", "EXPERTS": "2", "COPIES": "2", "KV_CACHE_TOKENS": "16384"}
    history, started_s = History(), time.monotonic()
    with case.target({**settings, **case.settings}, logs, modules=modules) as target:
        made = Run(experiment(case), target, "local", SEED, history, lambda: time.monotonic() - started_s, 0.0, print)
        asyncio.run(made.execute())
    return history, made


def judged(case: Case, history: History, reference: Reference) -> RunJudgement:
    return judge(history.events, experiment(case).bounds, reference)


@pytest.fixture(scope="module")
def healthy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Reference]:
    """The product as it is, under the mildest of the faults; its undisturbed answers are the truth for all others."""
    history, made = run(CASES["dropped_token"], model, tmp_path_factory.mktemp("healthy"), {})
    return history, made.reference


def test_the_product_as_it_is_has_none_of_these_bugs(healthy: tuple[History, Reference]) -> None:
    judgement = judged(CASES["dropped_token"], *healthy)
    states = {verdict.name: verdict.state for verdict in judgement.verdicts}
    named = {name for case in CASES.values() for name in case.verdicts if not case.load}
    assert {name: states[name] for name in named} == dict.fromkeys(named, State.HELD)


def test_nor_has_it_one_where_tokens_are_guessed(model: Path, tmp_path: Path) -> None:
    case = CASES["kept_draft"]
    history, made = run(case, model, tmp_path, {})
    judgement = judged(case, history, made.reference)
    assert {v.name: v.state for v in judgement.verdicts if v.name in (*TOKENS, "leaks_mesh")} == dict.fromkeys(
        (*TOKENS, "leaks_mesh"), State.HELD
    )


@pytest.mark.parametrize("name", ["kept_evicted", "stale_tier"])
def test_nor_has_it_one_where_prompts_begin_alike(name: str, model: Path, tmp_path: Path) -> None:
    case = CASES[name]
    history, made = run(case, model, tmp_path, {})
    judgement = judged(case, history, made.reference)
    assert {v.name: v.state for v in judgement.verdicts if v.name in (*TOKENS, "salts", "leaks_mesh")} == dict.fromkeys(
        (*TOKENS, "salts", "leaks_mesh"), State.HELD
    )


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_verdict_red(
    name: str, model: Path, healthy: tuple[History, Reference], tmp_path: Path
) -> None:
    case = CASES[name]
    history, made = run(case, model, tmp_path / "logs", module_of(name))
    reference = made.reference if case.load else healthy[1]
    verdicts = {verdict.name: verdict for verdict in judged(case, history, reference).verdicts}
    broken = [verdicts[found].sentence for found in case.verdicts if verdicts[found].state is State.BROKEN]
    assert broken, [(verdict.name, verdict.state.value, verdict.sentence) for verdict in verdicts.values()]
