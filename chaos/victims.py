"""Who is hurt: a rule of the suite, the nodes that run, and a drawn number make the victims. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chaos.record.roles import Role
from chaos.target import NODE_KINDS, Node

NO_ROLES: Mapping[str, Role] = {}
RULES = ("random", "same", "all", "everything_but_router", "pair", "named", "nobody", "host")


@dataclass(frozen=True, slots=True)
class VictimRule:
    """One of RULES. `random` and `all` take `kind`; `random` takes `count`; `named` takes `names`.

    `same`: those of the fault before, by name (flapping over restarts). `pair`: one node of each of two kinds where
    there are two kinds besides the router, else two nodes. `nobody`: for faults that hurt the mesh as a whole.
    `host`: all who run on one played host, a random one.
    """

    rule: str = "random"
    kind: str = ""
    """One of NODE_KINDS; empty means any of them."""
    count: int = 1
    names: tuple[str, ...] = ()
    role: str = ""
    """One of ROLES, for `random` and `all`; empty means any. Where nobody's role is known, it asks for nothing."""

    def __str__(self) -> str:
        what = f"{self.kind or 'node'} ({self.role})" if self.role else self.kind or "node"
        match self.rule:
            case "random":
                return f"{self.count} random {what}"
            case "all":
                return f"all of kind {what}" if self.kind or self.role else "all"
            case "named":
                return ", ".join(self.names)
            case _:
                return self.rule.replace("_", " ")


def choose_victims(
    rule: VictimRule,
    nodes: Sequence[Node],
    draw: random.Random,
    before: Sequence[str],
    keep: Mapping[str, int],
    roles: Mapping[str, Role] = NO_ROLES,
) -> list[Node]:
    """The victims, by name. Empty where the rule finds nobody that may be hurt.

    `before`: names of the victims of the fault before. `keep`: how many of a kind must stay unhurt. `roles`: what each
    is for, by name.
    """
    ordered = sorted(nodes, key=lambda node: node.name)
    of_role = [node for node in ordered if not (rule.role and roles) or _has(roles.get(node.name), rule.role)]
    chosen = sorted(_by_rule(rule, of_role, draw, before), key=lambda node: node.name)
    return _spare(chosen, ordered, keep)


def _has(role: Role | None, word: str) -> bool:
    return role is not None and role.word == word


def _by_rule(rule: VictimRule, nodes: Sequence[Node], draw: random.Random, before: Sequence[str]) -> Sequence[Node]:
    of_kind = [node for node in nodes if rule.kind in ("", node.kind)]
    match rule.rule:
        case "random":
            return draw.sample(of_kind, min(rule.count, len(of_kind)))
        case "same":
            again = [node for node in nodes if node.name in before]
            return again or draw.sample(of_kind, min(1, len(of_kind)))  # a mesh that was scaled down has it no more
        case "all":
            return of_kind
        case "everything_but_router":
            return [node for node in nodes if node.kind != "router"]
        case "named":
            return [node for node in nodes if node.name in rule.names]
        case "nobody":
            return ()
        case "host":
            hosts = sorted({node.host for node in of_kind} - {""})
            lost = draw.choice(hosts) if hosts else None
            return [node for node in nodes if node.host == lost]
        case "pair":
            return _pair(of_kind, draw)
        case unknown:
            raise ValueError(f"no such victim rule: {unknown}; there are {', '.join(RULES)}")


def _pair(nodes: Sequence[Node], draw: random.Random) -> list[Node]:
    kinds = [kind for kind in NODE_KINDS if kind != "router" and any(node.kind == kind for node in nodes)]
    if len(kinds) == 2:
        return [draw.choice([node for node in nodes if node.kind == kind]) for kind in kinds]
    return draw.sample(nodes, min(2, len(nodes)))


def _spare(chosen: Sequence[Node], nodes: Sequence[Node], keep: Mapping[str, int]) -> list[Node]:
    """Without those that would leave too few of their kind unhurt."""
    victims: list[Node] = []
    for node in chosen:
        unhurt = sum(1 for other in nodes if other.kind == node.kind) - sum(1 for v in victims if v.kind == node.kind)
        if unhurt > keep.get(node.kind, 0):
            victims.append(node)
    return victims
