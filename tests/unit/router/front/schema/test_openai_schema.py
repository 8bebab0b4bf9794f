from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import InvalidRequestError
from services.router.front.schema.openai_schema import (
    MAX_LOGIT_BIASES,
    ChatCompletionRequest,
    CompletionRequest,
    parse_request,
)
from services.router.front.schema.unused_fields import NEUTRAL, TAKEN

MESSAGES = [{"role": "user", "content": "a"}]
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Bonn"}'},
}


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"model": "m", "prompt": "a"} | fields).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode(), ChatCompletionRequest)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_prompt_takes_four_forms(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 1, True, [1, "a"], [-1], [1.5], [True], {"a": 1}, [[1], "a"], [["a"]]])
def test_prompt_of_another_form_is_refused_by_name(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="a list of token ids") as caught:
        completion(prompt=prompt)
    assert caught.value.parameter == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"9" * 30: 1}),
        ("logit_bias", {str(token_id): 1 for token_id in range(MAX_LOGIT_BIASES + 1)}),
        ("seed", 2**63),
        ("seed", "x"),
        ("n", 0),
        ("n", 17),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 129),
        ("stop", [1]),
        ("stop", "x" * 1025),
        ("stop", ["a", "x" * 1025]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [5] * 1025),
        ("prompt", ["a"] * 1025),
        ("prompt", [[5]] * 1025),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("stream", "yes"),
        ("stream", 1),
        ("echo", 0),
        ("ignore_eos", "no"),
        ("model", 5),
        ("user", 5),
        ("user", "x" * 1025),
        ("safety_identifier", "x" * 1025),
        ("prompt_cache_key", "x" * 1025),
    ],
)
def test_wrong_value_is_refused_with_the_field_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**{field: value})
    assert caught.value.parameter in (field, f"{field}[0]")


def test_penalties_are_fields_of_both_routes() -> None:
    fields: dict[str, Any] = {
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "min_p": 1,
        "logit_bias": {"0": -100, "7": 2.5},
        "min_tokens": 3,
    }
    for request in (completion(**fields), chat(**fields)):
        assert {name: getattr(request, name) for name in fields} == fields
    for request in (completion(**dict.fromkeys(fields)), chat(**dict.fromkeys(fields))):
        assert {getattr(request, name) for name in fields} == {None}, "null asks for nothing"


def test_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(b'{"model": "m", "prompt": "a", "temperature": 1e999}', CompletionRequest)
    assert caught.value.parameter == "temperature"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"model": "\\ud800"}', b"[" * 5000, b'{"a":' * 5000]
)
def test_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_request(body, CompletionRequest)


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_required_field_is_named(field: str) -> None:
    fields = {"model": "m", "prompt": "a"}
    del fields[field]
    with pytest.raises(InvalidRequestError, match=f"`{field}`: is required"):
        parse_request(json.dumps(fields).encode(), CompletionRequest)


def test_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(temprature=0)
    assert caught.value.parameter == "temprature"


@pytest.mark.parametrize("ask", [completion, chat])
def test_a_field_that_would_change_the_answer_is_refused_by_its_name_and_taken_where_it_asks_for_nothing(
    ask: Callable[..., CompletionRequest | ChatCompletionRequest],
) -> None:
    for name, neutral_values in NEUTRAL.items():
        if name in type(ask()).model_fields:
            continue
        for neutral in (None, *neutral_values):
            assert ask(**{name: neutral}).unused_fields == (name,)
        for asking in ({"a": 1}, 7.5, True, "x", ["x"]):
            if asking in neutral_values:
                continue
            with pytest.raises(InvalidRequestError, match=f"`{name}` is not supported") as caught:
                ask(**{name: asking})
            assert caught.value.parameter == name


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize("value", [None, 0, True, "a", ["a"], {"a": {"b": 1}}])
def test_a_field_that_changes_nothing_is_taken_and_named(
    ask: Callable[..., CompletionRequest | ChatCompletionRequest], value: Any
) -> None:
    for name in TAKEN - {"user", "safety_identifier", "prompt_cache_key", "reasoning_effort"}:
        assert ask(**{name: value}).unused_fields == (name,)


def test_what_published_clients_send_is_taken() -> None:
    """Bodies as SDKs, benchmark clients and front ends make them."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    both: list[dict[str, Any]] = [
        {"stream": True, "stream_options": usage, "ignore_eos": True, "stop": None, "max_tokens": 5},
        {"best_of": 1, "use_beam_search": False, "repetition_penalty": 1.0, "stream": True, "stream_options": usage},
        {"stream_options": {"include_usage": True}},
        {
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "flex",
            "user": "u",
            "priority": 0,
            "usage": {"include": True},
        },
        {"skip_special_tokens": True, "include_stop_str_in_output": False, "spaces_between_special_tokens": True},
        {"cache_prompt": True, "typical_p": 1, "repeat_penalty": 1.0, "mirostat": 0, "tfs_z": 1.0, "min_p": 0.05},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"stop": [f"stop{number}" for number in range(17)]},
        {"logit_bias": None, "logprobs": False, "n": None, "seed": None, "whatever": None},
        {"rid": "a", "data_parallel_rank": 0, "return_routed_experts": False, "keep_alive": "5m", "extra_body": {}},
    ]
    for fields in both:
        completion(**fields)
        chat(**fields)
    of_chats: list[dict[str, Any]] = [
        {"reasoning_effort": "low", "verbosity": "high", "modalities": ["text"], "add_generation_prompt": True},
        {"logprobs": False, "top_logprobs": 0, "echo": False, "add_special_tokens": False},
        {"top_logprobs": 0},
        {"max_completion_tokens": 5, "max_tokens": 5, "prediction": {"type": "content", "content": "x"}},
    ]
    for fields in of_chats:
        chat(**fields)


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"typical_p": True}, "typical_p"),
        ({"guided_json": {}}, "guided_json"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
        ({"messages": [{"role": "assistant", "content": "a", "prefix": True}]}, "messages[0].prefix"),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]}, "messages[0].audio"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "bold": 1}]}]},
            "messages[0].content[0].bold",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL, CALL | {"mood": "b"}]}]},
            "messages[0].tool_calls[1].mood",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "mood": "b"}}]}]},
            "messages[0].tool_calls[0].function.mood",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}]},
            "messages[0].reasoning",
        ),
    ],
)
def test_what_would_change_the_answer_is_refused_wherever_it_stands(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.parameter == parameter


def test_what_changes_nothing_in_a_message_is_taken_and_named_without_its_place() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "x": None}
    message: dict[str, Any] = {
        "role": "user",
        "content": [part, part],
        "id": "msg_1",
        "cache_control": {},
        "mood": None,
    }
    request = chat(messages=[message, message | {"metadata": {}}], stream=True, stream_options={"a": None})
    assert request.messages[0].model_dump()["content"] == [{"type": "text", "text": "a"}] * 2
    assert set(request.unused_fields) == {
        "stream_options.a",
        "messages.id",
        "messages.cache_control",
        "messages.mood",
        "messages.metadata",
        "messages.content.cache_control",
        "messages.content.x",
    }


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=3), max_size=6))
def test_a_field_is_served_taken_and_named_or_refused_and_never_ignored(fields: dict[str, Any]) -> None:
    assume(not fields.keys() & {"model", "messages"})
    refused: list[InvalidRequestError] = []
    try:
        request = chat(**fields)
    except InvalidRequestError as error:
        refused.append(error)
    if refused:
        assert refused[0].parameter in fields
    else:
        assert set(fields) <= {*request.unused_fields, *ChatCompletionRequest.model_fields}


def test_best_of_may_equal_n() -> None:
    assert completion(best_of=2, n=2).num_choices == 2
    assert completion(best_of=1).num_choices == 1
    for fields in ({"best_of": 2}, {"best_of": 3, "n": 2}, {"best_of": True}):
        with pytest.raises(InvalidRequestError):
            completion(**fields)


def test_fields_of_one_route_are_unknown_on_the_other() -> None:
    of_completions: dict[str, Any] = {"prompt": "a", "echo": True, "add_special_tokens": True}
    of_chats: dict[str, Any] = {"messages": MESSAGES, "top_logprobs": 1, "max_completion_tokens": 1}
    for ask, fields in ((chat, of_completions), (completion, of_chats)):
        for name, value in fields.items():
            with pytest.raises(InvalidRequestError, match=f"`{name}`: is not a field of this route"):
                ask(**{name: value})


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": MESSAGES * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "x" * 1025}]}, "messages[0].name"),
        ({"messages": [{str(number): 1 for number in range(65)}]}, "messages[0]"),
        ({"chat_template_kwargs": {str(number): 1 for number in range(65)}}, "chat_template_kwargs"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL] * 129}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": None, "tool_call_id": "a"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "messages[0].mood"),
    ],
)
def test_wrong_chat_is_refused_with_the_place_named(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.parameter == parameter
    said = str(caught.value)
    assert said.count(f"`{parameter}`") == 1
    for word in ("Input", "should", "validation", "dictionary", "instance", "Extra"):
        assert word not in said, "plain words, not a validator's"


def test_a_history_with_tool_calls_is_taken_and_its_arguments_are_objects_to_the_template() -> None:
    asking = {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None}
    told = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"}
    request = chat(messages=[*MESSAGES, asking, told, *MESSAGES])
    rendered = [message.for_template() for message in request.messages]
    assert rendered[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    ]
    assert (rendered[1]["content"], rendered[2]["tool_call_id"]) == (None, "call_1")
    assert chat(messages=[{"role": "assistant", "tool_calls": [CALL]}]).messages[0].content is None
    assert chat(messages=[{"role": "assistant", "content": None}]).messages[0].content is None


@pytest.mark.parametrize(
    ("arguments", "as_object"),
    [("", {}), ("{}", {}), ({"a": 1}, {"a": 1}), ("[1]", "[1]"), ("no json", "no json"), ("[" * 5000, "[" * 5000)],
)
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(arguments: Any, as_object: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = chat(messages=[{"role": "assistant", "content": "", "tool_calls": [call]}]).messages[0]
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == as_object


def test_nulls_ask_for_nothing_however_deep_they_stand() -> None:
    call = CALL | {"function": CALL["function"] | {"strict": None}, "extra": None}
    request = chat(
        messages=[{"role": "assistant", "content": None, "tool_calls": [call]}],
        response_format={"type": "text", "json_schema": None},
    )
    assert set(request.unused_fields) == {
        "response_format",
        "messages.tool_calls.extra",
        "messages.tool_calls.function.strict",
    }
    with pytest.raises(InvalidRequestError):
        chat(response_format={"type": "json_object", "json_schema": None})


def test_nulls_ask_for_nothing_in_what_is_served_inside_of_parts_and_calls() -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": None}}
    parts = [{"type": "text", "text": "a", "cache_control": None}]
    message = chat(messages=[{"role": "assistant", "content": parts, "tool_calls": [call]}]).messages[0]
    assert message.for_template()["tool_calls"] == [
        {"id": None, "type": "function", "function": {"name": "f", "arguments": {}}}
    ]


def test_reasoning_is_taken_under_either_of_its_names_and_under_both_where_they_agree() -> None:
    for names in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        message: dict[str, Any] = {"role": "assistant", "content": "a"} | dict.fromkeys(names, "because")
        assert chat(messages=[message]).messages[0].reasoning_content == "because"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{}] * 100_000},
        {"messages": [{"role": "user", "content": [{}] * 100_000}]},
        {"messages": MESSAGES, "stop_token_ids": [-1] * 100_000},
        {"messages": MESSAGES} | {f"field{number}": 1 for number in range(100_000)},
    ],
)
def test_what_is_wrong_often_is_refused_at_its_first_place(fields: dict[str, Any]) -> None:
    """A message for each of them took 5 GB of a body of 8 MB."""
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() <= 2


def test_message_of_a_reply_may_be_sent_back_as_it_came() -> None:
    message = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "audio": None}
    assert chat(messages=[*MESSAGES, message, *MESSAGES]).messages[1].content == "a"


def test_message_of_a_reply_may_come_back_with_what_an_sdk_keeps_in_it() -> None:
    """LiteLLM's `provider_specific_fields`, and what OpenAI's helpers for parsing add."""
    function = CALL["function"] | {"parsed_arguments": {"city": "Bonn"}, "provider_specific_fields": {}}
    call = CALL | {"function": function, "provider_specific_fields": {"thought_signature": "x"}}
    message = {
        "role": "assistant",
        "content": "a",
        "provider_specific_fields": {"refusal": None},
        "images": [],
        "thinking_blocks": [],
        "parsed": {"b": 1},
        "tool_calls": [call],
    }
    request = chat(messages=[*MESSAGES, message, *MESSAGES])
    assert request.messages[1].model_dump()["tool_calls"] == [CALL]
    assert "messages.provider_specific_fields" in request.unused_fields


def test_a_body_may_begin_with_the_mark_of_utf_8() -> None:
    """Files that Windows programs write do."""
    body = json.dumps({"model": "m", "prompt": "ä"}, ensure_ascii=False)
    assert parse_request(body.encode("utf-8-sig"), CompletionRequest).prompt == "ä"
    with pytest.raises(InvalidRequestError, match="not JSON in UTF-8"):
        parse_request(body.encode("utf-16"), CompletionRequest)


def test_a_developer_is_a_role_of_its_own_and_the_chat_template_decides_what_it_is_called() -> None:
    roles = [message.role for message in chat(messages=[{"role": "developer", "content": "a"}, *MESSAGES]).messages]
    assert roles == ["developer", *(message["role"] for message in MESSAGES)]


def test_text_parts_are_taken() -> None:
    request = chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    assert request.messages[0].model_dump()["content"] == [{"type": "text", "text": "a"}]


def test_echo_with_logprobs_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(echo=True, logprobs=1)
    assert caught.value.parameter == "echo"


def test_logprobs_mean_the_same_on_both_routes() -> None:
    assert completion().num_top_logprobs is None
    assert completion(logprobs=0).num_top_logprobs == 0
    assert completion(logprobs=3).num_top_logprobs == 3
    assert chat(logprobs=False).num_top_logprobs is None
    assert chat(logprobs=True).num_top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).num_top_logprobs == 3


def test_whole_numbers_are_fine_where_fractions_are() -> None:
    assert completion(temperature=0, top_p=1).temperature == 0


def test_stop_is_one_or_many() -> None:
    assert completion().stop_strings == ()
    assert completion(stop="a").stop_strings == ("a",)
    assert completion(stop=["a", "b"]).stop_strings == ("a", "b")
    assert completion(stop=[]).stop_strings == ()
    assert completion(stop="x" * 1024).stop_strings == ("x" * 1024,)
