from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from common.errors import ContextLengthError, InvalidRequestError, MoemeshError, UnknownModelError
from services.router.engine import SamplingParameters
from services.router.front import planning as planning_module
from services.router.front.planning import PlannedRequest, ReplyIdentity, RequestPlanner, with_salt
from services.router.front.schema.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    parse_object,
    parse_request,
)
from services.router.front.settings import FrontSettings
from services.router.front.text.checkpoint_file import CheckpointDefaults
from services.router.front.text.tokenizer import TextTokenizer

CONTEXT_TOKENS = 64
MESSAGES = [{"role": "user", "content": "fox"}]


def planner(tokenizer: TextTokenizer, **settings: Any) -> RequestPlanner:
    return RequestPlanner(tokenizer, FrontSettings("m", **settings), lambda: CONTEXT_TOKENS)


def plan(tokenizer: TextTokenizer, settings: dict[str, Any] | None = None, **fields: Any) -> PlannedRequest:
    body = json.dumps({"model": "m", "prompt": "fox"} | fields).encode()
    request = parse_request(body, CompletionRequest)
    return asyncio.run(planner(tokenizer, **(settings or {})).plan_completion(request, ReplyIdentity("cmpl-1", 0, 77)))


def plan_chat(tokenizer: TextTokenizer, **fields: Any) -> PlannedRequest:
    body = json.dumps({"model": "m", "messages": MESSAGES} | fields).encode()
    identity = ReplyIdentity("chatcmpl-1", 0, 77)
    return asyncio.run(planner(tokenizer).plan_chat(parse_request(body, ChatCompletionRequest), identity))


def sampling(planned: PlannedRequest) -> SamplingParameters:
    return planned.choices[0].request.sampling


def test_defaults_are_complete(tokenizer: TextTokenizer) -> None:
    assert sampling(plan(tokenizer)) == SamplingParameters(16, 1.0, 1.0, 0, 77, None, frozenset({2}))


def test_checkpoint_defaults_fill_what_the_client_left_out(tokenizer: TextTokenizer) -> None:
    changed = TextTokenizer(tokenizer._tokenizer, {}, CheckpointDefaults(frozenset({5}), None, 0.6, 0.9, 20))
    filled = sampling(plan(changed))
    assert (filled.temperature, filled.top_p, filled.top_k, filled.stop_token_ids) == (0.6, 0.9, 20, frozenset({5}))
    own = sampling(plan(changed, temperature=0, top_p=1, top_k=0))
    assert (own.temperature, own.top_p, own.top_k) == (0, 1, 0)


def test_penalties_reach_the_mesh_as_they_were_asked_for(tokenizer: TextTokenizer) -> None:
    asked: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "min_p": 0.1,
        "min_tokens": 4,
    }
    for planned in (plan(tokenizer, **asked), plan_chat(tokenizer, **asked)):
        assert {name: getattr(sampling(planned), name) for name in asked} == asked
    assert sampling(plan(tokenizer, logit_bias={"9": -1, "3": 100})).logit_bias == ((3, 100.0), (9, -1.0))


def test_checkpoint_defaults_of_penalties_give_way_to_the_clients(tokenizer: TextTokenizer) -> None:
    defaults = CheckpointDefaults(frozenset({5}), None, min_p=0.05, repetition_penalty=1.05)
    changed = TextTokenizer(tokenizer._tokenizer, {}, defaults)
    filled = sampling(plan(changed))
    assert (filled.min_p, filled.repetition_penalty) == (0.05, 1.05)
    own = sampling(plan(changed, min_p=0, repetition_penalty=1))
    assert (own.min_p, own.repetition_penalty, own.counts_tokens) == (0, 1, False)


def test_top_k_minus_one_is_off(tokenizer: TextTokenizer) -> None:
    assert sampling(plan(tokenizer, top_k=-1)).top_k == 0


@pytest.mark.parametrize("top_k", [2**31 - 1, 2**31, 2**63, 10**400])
def test_top_k_above_any_vocabulary_is_a_number_that_a_step_can_carry(tokenizer: TextTokenizer, top_k: int) -> None:
    assert sampling(plan(tokenizer, top_k=top_k)).top_k == 2**31 - 1


def test_clients_stop_tokens_join_the_checkpoints(tokenizer: TextTokenizer) -> None:
    assert sampling(plan(tokenizer, stop_token_ids=[9])).stop_token_ids == {2, 9}
    assert sampling(plan(tokenizer, stop_token_ids=[9], ignore_eos=True)).stop_token_ids == {9}
    assert sampling(plan(tokenizer, ignore_eos=True)).stop_token_ids == frozenset()


def test_a_stop_string_that_names_a_special_token_stands_for_the_token(tokenizer: TextTokenizer) -> None:
    """Special tokens do not show in the text, where the string would never be found."""
    planned = plan(tokenizer, stop=["</s>", "<|user|>", "x"], ignore_eos=True)
    ids = {tokenizer._tokenizer.token_to_id(token) for token in ("</s>", "<|user|>")}
    assert sampling(planned).stop_token_ids == ids
    assert [stop.text for stop in planned.choices[0].stop_strings] == ["</s>", "<|user|>", "x"]
    assert sampling(plan(tokenizer, stop=["<|user|>\n", "user", "<|nobody|>"], ignore_eos=True)).stop_token_ids == set()


@pytest.mark.parametrize(("vocabulary_size", "kept"), [(400, {2, 9, 399}), (None, {2, 9, 399, 400, 2**31 - 1})])
def test_stop_tokens_that_the_vocabulary_does_not_have_are_left_out(
    tokenizer: TextTokenizer, vocabulary_size: int | None, kept: set[int]
) -> None:
    changed = TextTokenizer(tokenizer._tokenizer, {}, replace(tokenizer.defaults, vocabulary_size=vocabulary_size))
    asked = [9, 399, 400, 2**31 - 1, 2**31, 10**400]
    assert sampling(plan(changed, stop_token_ids=asked)).stop_token_ids == kept


@pytest.mark.parametrize("seed", [0, 5, -1, -(2**63), 2**63 - 1])
def test_any_seed_becomes_63_bits_and_the_same_each_time(tokenizer: TextTokenizer, seed: int) -> None:
    first, second = sampling(plan(tokenizer, seed=seed)).seed, sampling(plan(tokenizer, seed=seed)).seed
    assert first == second == seed % 2**63


def test_choices_are_counted_in_the_reply_and_in_the_prompt(tokenizer: TextTokenizer) -> None:
    planned = plan(tokenizer, prompt=["fox", "dog"], n=2)
    assert [choice.index for choice in planned.choices] == [0, 1, 2, 3]
    assert [choice.request.choice for choice in planned.choices] == [0, 1, 0, 1]
    assert len({choice.request.request_id for choice in planned.choices}) == 4
    assert len({choice.request.sampling.seed for choice in planned.choices}) == 1
    assert planned.num_prompt_tokens == len(tokenizer.encode("fox")) + len(tokenizer.encode("dog"))


def test_the_table_of_a_stop_string_is_built_once_for_all_choices_of_a_request(tokenizer: TextTokenizer) -> None:
    planned = plan(tokenizer, prompt=["fox", "dog"], n=3, stop=["a", "b"])
    assert [stop.text for stop in planned.choices[0].stop_strings] == ["a", "b"]
    assert len({id(stop) for choice in planned.choices for stop in choice.stop_strings}) == 2


def test_token_ids_are_taken_as_they_are(tokenizer: TextTokenizer) -> None:
    assert plan(tokenizer, prompt=[5, 6]).choices[0].request.prompt_token_ids == (5, 6)


def test_echo_is_the_prompts_text(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("dog </s>")
    assert plan(tokenizer, prompt=[token_ids, [5]], echo=True).choices[0].echoed_text == "dog </s>"
    assert plan(tokenizer, prompt="fox", echo=True).choices[0].echoed_text == "fox"
    assert plan(tokenizer, prompt="fox").choices[0].echoed_text == ""


@pytest.mark.parametrize("threshold", [0, 10**6])
def test_a_thread_changes_nothing(tokenizer: TextTokenizer, threshold: int) -> None:
    planned = plan(tokenizer, {"thread_above_characters": threshold}, prompt="quick fox")
    assert planned.choices[0].request.prompt_token_ids == tuple(tokenizer.encode("quick fox"))


def test_prompt_and_completion_may_fill_the_context_exactly(tokenizer: TextTokenizer) -> None:
    assert sampling(plan(tokenizer, prompt=[5] * 60, max_tokens=4)).max_tokens == 4
    with pytest.raises(ContextLengthError, match="64 tokens"):
        plan(tokenizer, prompt=[5] * 60, max_tokens=5)


@pytest.mark.parametrize("is_chat", [False, True])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, is_chat: bool
) -> None:
    encoded: list[str] = []
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text, *settings, **more: encoded.append(text))
    text = "ab " * 10_000
    asked: Any = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": ["fox", text]}
    with pytest.raises(ContextLengthError, match=r"holds 64 tokens; the prompt has at least [0-9]+ and 4 ") as caught:
        (plan_chat if is_chat else plan)(tokenizer, max_tokens=4, **asked)
    assert caught.value.parameter == ("messages" if is_chat else "prompt")
    assert encoded == []


def test_very_long_texts_are_tokenized_one_at_a_time(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    monkeypatch.setattr(tokenizer.bound, "least_tokens", lambda text: 0)
    encode = TextTokenizer.encode

    def watched(self: TextTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(self, text[:9000], add_special_tokens)

    monkeypatch.setattr(TextTokenizer, "encode", watched)

    async def main() -> None:
        planning = planner(tokenizer)
        body = json.dumps({"model": "m", "prompt": "ab " * 100_000}).encode()
        request = parse_request(body, CompletionRequest)
        refused = await asyncio.gather(
            *(planning.plan_completion(request, ReplyIdentity("cmpl-1", 0, 77)) for _ in range(4)),
            return_exceptions=True,
        )
        assert {type(error) for error in refused} == {ContextLengthError}

    asyncio.run(main())
    assert threads == {"long-text_0"}


def test_default_of_a_completion_is_not_clipped(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ContextLengthError):
        plan(tokenizer, prompt=[5] * 60)


def test_chat_may_use_what_is_left_of_the_context(tokenizer: TextTokenizer) -> None:
    planned = plan_chat(tokenizer)
    assert sampling(planned).max_tokens == CONTEXT_TOKENS - planned.num_prompt_tokens
    assert sampling(plan_chat(tokenizer, max_tokens=3)).max_tokens == 3
    assert sampling(plan_chat(tokenizer, max_completion_tokens=3)).max_tokens == 3
    with pytest.raises(ContextLengthError):
        plan_chat(tokenizer, messages=[{"role": "user", "content": "x y z " * 64}])


@pytest.mark.parametrize(
    ("fields", "error", "parameter"),
    [
        ({"model": "other"}, UnknownModelError, "model"),
        ({"prompt": ""}, InvalidRequestError, "prompt"),
        ({"prompt": []}, InvalidRequestError, "prompt"),
        ({"prompt": [[]]}, InvalidRequestError, "prompt"),
        ({"prompt": ["a", ""]}, InvalidRequestError, "prompt"),
        ({"prompt": [100_000]}, InvalidRequestError, "prompt"),
        ({"prompt": ["a"] * 9, "n": 15}, InvalidRequestError, "prompt"),
        ({"logit_bias": {"100000": 1}}, InvalidRequestError, "logit_bias"),
        ({"min_tokens": 17}, InvalidRequestError, "min_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tokenizer: TextTokenizer, fields: dict[str, Any], error: type[MoemeshError], parameter: str
) -> None:
    with pytest.raises(error) as caught:
        plan(tokenizer, **fields)
    assert getattr(caught.value, "parameter", None) == parameter


def test_chat_template_gets_the_clients_variables(tokenizer: TextTokenizer) -> None:
    with_prompt = plan_chat(tokenizer)
    without = plan_chat(tokenizer, chat_template_kwargs={"add_generation_prompt": False})
    assert without.num_prompt_tokens < with_prompt.num_prompt_tokens


def test_vocabulary_bound_is_the_models(tokenizer: TextTokenizer) -> None:
    defaults = replace(tokenizer.defaults, vocabulary_size=4)
    small = TextTokenizer(tokenizer._tokenizer, {}, defaults)
    with pytest.raises(InvalidRequestError, match="vocabulary of 4"):
        plan(small, prompt="fox")


def test_reasoning_effort_is_a_variable_of_the_chat_template() -> None:
    source = "{{ reasoning_effort }}{% for message in messages %}{{ message.content }}{% endfor %}"
    told: list[dict[str, Any]] = []

    class Knowing:
        defaults = CheckpointDefaults(frozenset(), None)

        def render_chat(self, messages: Any, arguments: dict[str, Any], now: Any) -> str:
            told.append(dict(arguments))
            raise InvalidRequestError(source)

    for fields in (
        {"reasoning_effort": "low"},
        {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        {"reasoning_effort": None},
    ):
        with pytest.raises(InvalidRequestError):
            plan_chat(Knowing(), **fields)  # type: ignore[arg-type]
    assert told == [{"reasoning_effort": "low"}, {"reasoning_effort": "high"}, {}]


def test_what_a_request_says_of_the_cache_reaches_the_mesh(tokenizer: TextTokenizer) -> None:
    plain, off, salted = plan(tokenizer), plan(tokenizer, cache="off"), plan(tokenizer, cache="on", cache_salt="a")
    said = [(p.choices[0].request.uses_cache, p.choices[0].request.cache_salt) for p in (plain, off, salted)]
    assert said == [(True, ""), (False, ""), (True, "a")]
    assert plan_chat(tokenizer, cache="off", cache_salt="b").choices[0].request.cache_salt == "b"


def test_what_a_request_says_of_drafts_reaches_the_mesh(tokenizer: TextTokenizer) -> None:
    plans = [plan(tokenizer), plan(tokenizer, drafts="on"), plan(tokenizer, drafts=None), plan(tokenizer, drafts="off")]
    assert [planned.choices[0].request.uses_drafts for planned in plans] == [True, True, True, False]
    assert not plan_chat(tokenizer, drafts="off").choices[0].request.uses_drafts


@pytest.mark.parametrize("field", ["cache", "drafts"])
@pytest.mark.parametrize("value", ["no", "", True, 0, "OFF"])
def test_another_value_of_a_switch_is_refused_by_its_name(tokenizer: TextTokenizer, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f'`{field}`: must be "on" or "off"') as raised:
        plan(tokenizer, **{field: value})
    assert raised.value.parameter == field


@pytest.mark.parametrize(
    "body", ['{"a": "\u00fc", "b": 12345678901234567890}', " {} \n", '{"a": 1e15, "cache_salt": null}']
)
def test_the_salt_of_the_header_becomes_part_of_the_body(body: str) -> None:
    salted = with_salt(body.encode(), 's"\u00fc')
    assert json.loads(salted) == parse_object(salted) == {**json.loads(body), "cache_salt": 's"\u00fc'}
    assert parse_object(with_salt(salted, 's"\u00fc')) == parse_object(salted), "both may say the same"


@pytest.mark.parametrize("body", [b'{"cache_salt": "t"}', b'{"cache_salt": ""}', b"[1]", b"no json", b"[" * 100_000])
def test_a_body_that_says_another_salt_or_cannot_take_one_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"say different things|JSON"):
        with_salt(body, "s")


def test_a_salt_makes_a_long_body_longer_by_itself_only_and_in_a_thread(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def watched(body: bytes, salt: str) -> bytes:
        threads.append(threading.current_thread())
        return with_salt(body, salt)

    monkeypatch.setattr(planning_module, "with_salt", watched)
    body = json.dumps({"prompt": "\u0436" * (4 << 20)}, ensure_ascii=False).encode()
    assert len(asyncio.run(planner(tokenizer).add_salt(body, "s"))) == len(body) + len(',"cache_salt":"s"')
    assert asyncio.run(planner(tokenizer).add_salt(body, None)) == body
    assert threads != [threading.main_thread()]


def test_an_empty_salt_is_refused_by_its_name(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="cache_salt") as raised:
        plan(tokenizer, cache_salt="")
    assert raised.value.parameter == "cache_salt"
