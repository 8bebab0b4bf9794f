"""Suite and seed name a run for ever: a plan that was reported once can be drawn again by every later build."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence

import pytest

from chaos.experiment import Experiment, read_experiment
from chaos.faults.catalog import FAULTS
from chaos.record.requests import draw_requests
from chaos.record.roles import Role
from chaos.target import Node
from chaos.timeline import AllowedFault, make_timeline
from chaos.victims import choose_victims

MESH = [
    Node("router-0", "router", 1),
    *(Node(f"stage-{n}", "stage", 10 + n, host=str(n % 3)) for n in range(4)),
    *(Node(f"expert-{n}", "expert", 20 + n, host=str(n % 3)) for n in range(3)),
]
ROLES = {
    **{f"stage-{n}": Role("holder", f"0/{n}") for n in range(2)},
    **{f"stage-{n}": Role("mirror", f"0/{n - 2}") for n in range(2, 4)},
    **{f"expert-{n}": Role("expert") for n in range(3)},
}

# Drawn by the build of 2026-11-29, those of `network` by that of 2026-11-30: it has `cut_in_call` since. Who changes a
# suite on purpose draws its lines anew and says so.
SMOKE_1 = """
0.000 stop of expert-1 for 0.776
1.135 pause of expert-2 for 2.844
2.559 scale change=1 kind=expert of nobody for 7.958
4.215 kill of stage-3 for 0.000
5.657 flap off_s=0.4713 on_s=0.5 times=3 of expert-0 for 0.000
6.554 cpu_hog per_cpu=1.0 of nobody for 6.340
7.914 pause of stage-0 for 2.182
8.755 restart of stage-0 for 0.000
10.610 lose_files kill_after_s=1.5 of stage-1 for 2.500
11.796 pause of stage-0 for 1.774
13.579 lose_files kill_after_s=1.5 of stage-1 for 2.500
15.293 kill of router-0 for 0.000
16.865 kill of router-0 for 0.000
17.736 pause of expert-2 for 1.842
19.016 cpu_hog per_cpu=1.0 of nobody for 6.671
20.391 kill of expert-1 for 0.000
21.825 flap off_s=0.3928 on_s=0.5 times=3 of expert-2 for 0.000
22.563 stop of expert-2 for 1.991
23.628 flap off_s=0.5778 on_s=0.5 times=3 of expert-2 for 0.000
24.816 kill of stage-1 for 0.000
"""

PLANS = {
    ("hosts", 1): "- - - 1bf844d4af9a826e",
    ("hosts", 2): "- - - fbdaca23860896c6",
    ("hosts", 1700): "- - - dfa0e5798d65a800",
    ("isolation", 1): "bc3ce18c5727eb48 bc3ce18c5727eb48 378cc5fdcae4a564 378cc5fdcae4a564",
    ("isolation", 2): "e00cc99340d35f58 e00cc99340d35f58 967307fcb8894c06 967307fcb8894c06",
    ("isolation", 1700): "275473b34d57715d 275473b34d57715d 42365295494745a2 42365295494745a2",
    ("network", 1): "8de20f16fbec1db4 eea21f20a57b4768 c60b32824270f8b0 fb151861da7a314d",
    ("network", 2): "6f86392c57a438af 64ed4d976bc84ebe 0a66628f529cbfba 574b0d05fa207915",
    ("network", 1700): "32f09848e8c56a77 880cd0568556c42b a902e2b0868e3d45 1254cd9f5ae10fda",
    ("nightly", 1): "97c31d6f870cc049 4d1301155a76c37c 5138d4953dbca1f9 b5017b98ff0ae4bf",
    ("nightly", 2): "d6ce86d4420a94d3 251c74407cfc8551 d076cee5637f7608 efc7c284d9622ebc",
    ("nightly", 1700): "3f25ba30d66e1177 e595f7f1623dfe57 3355acbde65056e6 e30329580527fb9e",
    ("nodes", 1): "01b7f378a6d4637e 01b7f378a6d4637e 01b7f378a6d4637e 01b7f378a6d4637e",
    ("nodes", 2): "2aee18a2bbcf6d2f 2aee18a2bbcf6d2f 2aee18a2bbcf6d2f 2aee18a2bbcf6d2f",
    ("nodes", 1700): "460a3e166e075105 460a3e166e075105 460a3e166e075105 460a3e166e075105",
    ("ranks", 1): "56e76e68b1e258c0 56e76e68b1e258c0 56e76e68b1e258c0 56e76e68b1e258c0",
    ("ranks", 2): "45d38126eedb633e 45d38126eedb633e 45d38126eedb633e 45d38126eedb633e",
    ("ranks", 1700): "e9a412baa9397456 e9a412baa9397456 e9a412baa9397456 e9a412baa9397456",
    ("ranks-replay", 1): "05cead1a118933b8 05cead1a118933b8 05cead1a118933b8 05cead1a118933b8",
    ("ranks-replay", 2): "fcbc80a5191d6c35 fcbc80a5191d6c35 fcbc80a5191d6c35 fcbc80a5191d6c35",
    ("ranks-replay", 1700): "c3cfbbf7ca260d0a c3cfbbf7ca260d0a c3cfbbf7ca260d0a c3cfbbf7ca260d0a",
    ("replay", 1): "7ec97b9b5e13af9b 7ec97b9b5e13af9b 7ec97b9b5e13af9b 7ec97b9b5e13af9b",
    ("replay", 2): "42bae7aa68559115 42bae7aa68559115 42bae7aa68559115 42bae7aa68559115",
    ("replay", 1700): "99fe75c46b9947ff 99fe75c46b9947ff 99fe75c46b9947ff 99fe75c46b9947ff",
    ("rolling", 1): "828733de0e5ca37b 828733de0e5ca37b 828733de0e5ca37b 828733de0e5ca37b",
    ("rolling", 2): "cb1ac76c7115b6ce cb1ac76c7115b6ce cb1ac76c7115b6ce cb1ac76c7115b6ce",
    ("rolling", 1700): "3af4b55c9ba7080f 3af4b55c9ba7080f 3af4b55c9ba7080f 3af4b55c9ba7080f",
    ("smoke", 1): "0b9e31ea059be759 0b9e31ea059be759 0b9e31ea059be759 0b9e31ea059be759",
    ("smoke", 2): "33d46b7a553d2e61 33d46b7a553d2e61 33d46b7a553d2e61 33d46b7a553d2e61",
    ("smoke", 1700): "dc94c484bc61bdad dc94c484bc61bdad dc94c484bc61bdad dc94c484bc61bdad",
    ("soak", 1): "0a6a252f81d62f33 9e463d9a37c8cb6b 4000e33c4af6c1e1 b74bae7a77ce7981",
    ("stalls", 1): "c2d4d5d0b5b2c7d1 c2d4d5d0b5b2c7d1 c2d4d5d0b5b2c7d1 c2d4d5d0b5b2c7d1",
    ("stalls", 2): "77aa6f6633bccbc7 77aa6f6633bccbc7 77aa6f6633bccbc7 77aa6f6633bccbc7",
    ("stalls", 1700): "c0d39c75d03b555f c0d39c75d03b555f c0d39c75d03b555f c0d39c75d03b555f",
}

REQUESTS = {
    ("network", 1): "4ab5d54094871f8b 5995c012a54489a0",
    ("network", 2): "6beb17effd8906b4 1f8789a34ff1c594",
    ("network", 1700): "4469f75e7c90c346 ecb3e1141bcf0cc0",
    ("nightly", 1): "5b120c6053aa220f 43aa6793bfb00b2c",
    ("nightly", 2): "0cebdab6474a1da5 9d9f09ceb748fee8",
    ("nightly", 1700): "8fa533486c0af7d4 a9bb4a7e5fbdab76",
    ("rolling", 1): "c141439bbd5bd8f8 bb47d13876f361e6",
    ("rolling", 2): "4c08cb4ca50c8b14 fea3e5615c0f917e",
    ("rolling", 1700): "210b9e32482ae121 d8ab1f976bdcfc24",
    ("smoke", 1): "de79826d83c238f2 96d37fbf7dea16c5",
    ("smoke", 2): "fc1b0938c4e1aaa0 0e48779ca14ef738",
    ("smoke", 1700): "15c3a5acf5e72b64 cd57e0054c5b709b",
}


def plan(experiment: Experiment, seed: int, allowed: Sequence[AllowedFault]) -> Iterator[str]:
    """One line a fault, with the victims that it has in MESH."""
    keep = {str(kind): count for kind, count in experiment.timeline.keep.items()}
    before: tuple[str, ...] = ()
    for fault in make_timeline(seed, allowed, experiment.timeline):
        draw = random.Random(f"{seed}/victims/{fault.number}")
        victims = choose_victims(fault.victims, MESH, draw, before, keep, ROLES)
        before = tuple(node.name for node in victims) or before
        parameters = " ".join(f"{name}={value}" for name, value in fault.parameters.items())
        words = [f"{fault.at_s:.3f}", fault.kind, parameters, "of", ",".join(node.name for node in victims) or "nobody"]
        words += [f"for {fault.heal_after_s:.3f}", "beside" if fault.overlaps else ""]
        yield " ".join(word for word in words if word)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_plan_is_the_one_that_is_written_down() -> None:
    experiment = read_experiment("smoke")
    allowed = experiment.timeline.faults
    assert list(plan(experiment, 1, allowed)) == SMOKE_1.split("\n")[1:-1]


@pytest.mark.parametrize(("suite", "seed"), PLANS)
def test_plans_of_all_suites_are_those_of_former_builds(suite: str, seed: int) -> None:
    experiment = read_experiment(suite)
    entries = experiment.timeline.faults
    found = []
    # A target without a feature leaves out the kinds that need it, and so has a plan of its own.
    for features in ({"processes"}, {"processes", "proxy"}, {"processes", "containers", "netns"}):
        offered = [entry for entry in entries if FAULTS[entry.kind].needs <= features]
        found.append(sha256("\n".join(plan(experiment, seed, offered))) if offered else "-")
    found.append(sha256("\n".join(plan(experiment, seed, entries))))
    assert found == PLANS[suite, seed].split()


@pytest.mark.parametrize(("suite", "seed"), REQUESTS)
def test_requests_are_those_of_former_builds(suite: str, seed: int) -> None:
    load = read_experiment(suite).load.model_copy(
        update={"alike": 0.0, "salted": 0.0, "repeating": 0.0}
    )  # which came later
    found = []
    for with_penalties in (True, False):
        requests = draw_requests(seed, load, with_penalties)
        lines = [json.dumps([r.name, r.kind, r.body_sha256("demo")]) for r in requests]
        found.append(sha256("\n".join(lines)))
    assert found == REQUESTS[suite, seed].split()
