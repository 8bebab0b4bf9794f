"""Which nodes are hurt: a rule of the suite, the nodes that run, and a drawn number make the victims. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from chaos.record.roles import Role
from chaos.suite_fields import AtLeastOne, Section
from chaos.target import NODE_KINDS, Node, NodeKind

NO_ROLES: Mapping[str, Role] = {}
Rule = Literal["random", "same", "all", "everything_but_router", "pair", "named", "nobody", "host"]


class VictimRule(Section):
    """Which nodes a suite hurts. `random` and `all` are of a `kind`; `random` has a `count`, `named` has `names`.

    `same` means those of the fault before, by name (flapping over restarts). `pair` means one node of each of two kinds
    where there are two kinds besides the router, else two nodes. `nobody` is for faults that hurt the mesh as a whole.
    `host` means all that run on one played host, a random one.
    """

    rule: Rule = "random"
    kind: NodeKind | Literal[""] = ""
    """Without it any kind is meant."""
    count: AtLeastOne = 1
    names: tuple[str, ...] = ()
    role: Literal["", "holder", "mirror", "expert", "spare"] = ""
    """It counts for `random` and `all`; without it any role is meant, and also where no role is known."""

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
    can_hurt: Callable[[Node], bool] = lambda node: True,
) -> list[Node]:
    """Chooses the victims, in the order of their names; none where the rule finds no node that may be hurt.

    `before` names the victims of the fault before, `keep` says how many of a kind must stay unhurt, `roles` what each
    node is for, by its name, and `can_hurt` which nodes have what the fault hurts.
    """
    ordered = sorted(nodes, key=lambda node: node.name)
    of_role = [node for node in ordered if not (rule.role and roles) or _has(roles.get(node.name), rule.role)]
    hurtable = [node for node in of_role if can_hurt(node)]
    chosen = sorted(_by_rule(rule, hurtable, draw, before), key=lambda node: node.name)
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


def _pair(nodes: Sequence[Node], draw: random.Random) -> list[Node]:
    kinds = [kind for kind in NODE_KINDS if kind != "router" and any(node.kind == kind for node in nodes)]
    if len(kinds) == 2:
        return [draw.choice([node for node in nodes if node.kind == kind]) for kind in kinds]
    return draw.sample(nodes, min(2, len(nodes)))


def _spare(chosen: Sequence[Node], nodes: Sequence[Node], keep: Mapping[str, int]) -> list[Node]:
    """Returns those that may be hurt and leave enough of their kind unhurt."""
    victims: list[Node] = []
    for node in chosen:
        unhurt = sum(1 for other in nodes if other.kind == node.kind) - sum(1 for v in victims if v.kind == node.kind)
        if unhurt > keep.get(node.kind, 0):
            victims.append(node)
    return victims
