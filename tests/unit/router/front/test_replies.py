from __future__ import annotations

import json
from typing import Any

import pytest

from common.ids import RequestId
from services.router.engine import FinishReason, GenerationRequest, SamplingParameters
from services.router.front.planning import PlannedRequest, ReplyIdentity
from services.router.front.replies import ChatForm, ChunkEncoder, CompletionForm, ReplyForm
from services.router.front.schema.openai_schema import CompletionRequest, StreamOptions
from services.router.front.text.choice_stream import ChoiceEvent, PlannedChoice, merge_events
from services.router.front.text.tokenizer import TextTokenizer


def encoder(form: ReplyForm, with_usage: bool = False, with_token_ids: bool = False) -> ChunkEncoder:
    sampling = SamplingParameters(1, 1.0, 1.0, 0, 1, None, frozenset())
    request = GenerationRequest(RequestId("r"), (5,), sampling, 0)
    fields = CompletionRequest(
        model='mo"del',
        prompt="a",
        stream_options=StreamOptions(include_usage=with_usage),
        return_token_ids=with_token_ids,
    )
    choices = (PlannedChoice(0, request, (), ""),)
    return ChunkEncoder(PlannedRequest(fields, ReplyIdentity("id-1", 5, 7), None, choices), form)


def decode(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n")[:-1]]


@pytest.mark.parametrize("form_class", [CompletionForm, ChatForm])
@pytest.mark.parametrize("with_usage", [False, True])
def test_prepared_chunks_equal_composed_ones(
    tokenizer: TextTokenizer, form_class: type[CompletionForm] | type[ChatForm], with_usage: bool
) -> None:
    form = form_class(tokenizer.vocabulary, False)
    event = ChoiceEvent(3, 'a"\n\u2028\\ 你', (1,), (), None, 1)
    (chunk,) = decode(encoder(form, with_usage).event(event))
    assert chunk["choices"] == form.chunk_choices(event)
    assert chunk["model"] == 'mo"del'
    assert ("usage" in chunk) == with_usage


def test_text_with_line_breaks_stays_one_event(tokenizer: TextTokenizer) -> None:
    data = encoder(CompletionForm(tokenizer.vocabulary, False)).event(ChoiceEvent(0, "a\n\nb\r\n", (1,), (), None, 1))
    assert data.count(b"\n") == 2
    assert b"\r" not in data


def test_a_token_without_text_is_a_chunk_of_its_own_for_a_client_that_asked_for_ids(tokenizer: TextTokenizer) -> None:
    for form in (ChatForm(tokenizer.vocabulary, False), CompletionForm(tokenizer.vocabulary, False)):
        data = encoder(form, with_token_ids=True).event(ChoiceEvent(0, "", (7,), (), None, 2))
        (chunk,) = decode(data)
        assert chunk["choices"][0]["token_ids"] == [7]


def test_last_text_and_finish_of_a_chat_are_two_chunks(tokenizer: TextTokenizer) -> None:
    event = ChoiceEvent(0, "end", (1,), (), FinishReason.LENGTH, 1)
    chunks = [chunk["choices"][0] for chunk in decode(encoder(ChatForm(tokenizer.vocabulary, False)).event(event))]
    assert [(chunk["delta"], chunk["finish_reason"]) for chunk in chunks] == [
        ({"content": "end"}, None),
        ({}, "length"),
    ]


def test_merged_events_keep_everything_in_order() -> None:
    merged = merge_events(
        [ChoiceEvent(1, "a", (5, 6), (), None, 2), ChoiceEvent(1, "b", (7,), (), FinishReason.STOP, 3)]
    )
    assert merged == ChoiceEvent(1, "ab", (5, 6, 7), (), FinishReason.STOP, 3)
