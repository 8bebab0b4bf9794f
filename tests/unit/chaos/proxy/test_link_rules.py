from __future__ import annotations

from chaos.proxy.link_rules import LinkRule, around, combined
from chaos.proxy.zmtp_frames import FrameRule


def test_no_rule_leaves_bytes_alone() -> None:
    assert combined([LinkRule("a", "b", delay_ms=5)], "b", "a") == LinkRule("b", "a")


def test_delays_add_up_and_the_smallest_bandwidth_counts() -> None:
    rules = [LinkRule("a", "b", delay_ms=5), LinkRule("a", delay_ms=2, bytes_per_s=100), LinkRule(bytes_per_s=50)]
    assert combined(rules, "a", "b") == LinkRule("a", "b", delay_ms=7, bytes_per_s=50)


def test_a_bandwidth_without_limit_lifts_no_other_limit() -> None:
    assert combined([LinkRule(bytes_per_s=50), LinkRule()], "a", "b").bytes_per_s == 50


def test_around_a_node_both_directions_are_hurt_and_no_other_link() -> None:
    rules = around("a", LinkRule(is_stalled=True))
    assert combined(rules, "a", "b").is_stalled
    assert combined(rules, "b", "a").is_stalled
    assert not combined(rules, "b", "c").is_stalled


def test_damages_follow_each_other() -> None:
    one, other = FrameRule("corrupt", 0.5, 1), FrameRule("lose", 0.5, 2)
    assert combined([LinkRule(frames=(one,)), LinkRule(), LinkRule(frames=(other,))], "a", "b").frames == (one, other)
