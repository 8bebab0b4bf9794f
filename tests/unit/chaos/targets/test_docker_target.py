from __future__ import annotations

from chaos.targets.docker_target import ContainerAddress, ContainerNames

ROUTER = ContainerAddress("mesh-router-1", "router", ("10.0.0.2",))
EXPERT = ContainerAddress("mesh-expert-1", "expert", ("10.0.0.3",))
LATER = ContainerAddress("mesh-expert-2", "expert", ("10.0.0.4",))


def test_names_and_addresses_are_found_and_asked_for_again_only_when_unknown() -> None:
    answers = [[ROUTER, EXPERT], [ROUTER, EXPERT, LATER], [ROUTER]]
    names = ContainerNames(lambda: answers.pop(0))
    assert names.address_of("router") == "10.0.0.2"
    assert names.name_at("10.0.0.3", 4711) == "mesh-expert-1"
    assert len(answers) == 2
    assert names.name_at("10.0.0.4", 4711) == "mesh-expert-2"
    assert names.name_at("10.0.0.9", 4711) == ""


def test_an_address_stays_as_it_is_and_nobody_is_asked_for_it() -> None:
    asked: list[int] = []

    def look_up() -> list[ContainerAddress]:
        asked.append(1)
        return []

    assert ContainerNames(look_up).address_of("10.0.0.3") == "10.0.0.3"
    assert asked == []
    assert ContainerNames(look_up).address_of("elsewhere") == "elsewhere"
    assert asked == [1]
