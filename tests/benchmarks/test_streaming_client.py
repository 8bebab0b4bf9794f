"""How many tokens an event of each kind of server brings."""

from __future__ import annotations

from tests.benchmarks.streaming_client import cached_tokens_of, count_new_tokens, new_token_ids


def test_token_ids_are_counted_over_all_choices() -> None:
    assert count_new_tokens({"choices": [{"token_ids": [5, 6]}, {"token_ids": [7]}]}, num_before=9) == 3


def test_an_event_without_ids_brings_none() -> None:
    assert count_new_tokens({"choices": [{"text": "", "token_ids": None}]}, num_before=9) == 0
    assert count_new_tokens({"usage": {"completion_tokens": 9}}, num_before=9) == 0


def test_a_server_that_counts_for_itself_is_believed() -> None:
    # llama.cpp holds back half a character: the next event stands for two tokens.
    event = {"choices": [{"text": "é"}], "timings": {"predicted_n": 6}}
    assert count_new_tokens(event, num_before=4) == 2
    assert count_new_tokens(event | {"choices": [{"text": ""}]}, num_before=6) == 0


def test_ids_are_where_the_server_tells_them() -> None:
    assert new_token_ids({"choices": [{"token_ids": [5, 6]}]}) == [5, 6]
    assert new_token_ids({"choices": [{"text": "a"}], "__verbose": {"tokens": [7]}}) == [7]
    assert new_token_ids({"choices": [], "usage": {"completion_tokens": 9}}) == []


def test_a_usage_without_details_does_not_say_what_was_cached() -> None:
    assert cached_tokens_of({"prompt_tokens_details": {"cached_tokens": 0}}) == 0
    assert cached_tokens_of({"prompt_tokens_details": None}) is None
    assert cached_tokens_of({"prompt_tokens": 9}) is None
