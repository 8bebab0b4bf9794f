from __future__ import annotations

from common.ids import RequestId
from services.router.engine import FinishReason, GenerationRequest, SamplingParameters, Token
from services.router.front.text.choice_stream import ChoiceEvent, ChoiceStream, PlannedChoice, merge_events
from services.router.front.text.stop_strings import StopString
from services.router.front.text.tokenizer import TextTokenizer

EOS = 2


def stream_of(
    tokenizer: TextTokenizer,
    *stop_strings: str,
    echoed_text: str = "",
    ignore_eos: bool = False,
    is_event_each_token: bool = False,
) -> ChoiceStream:
    ending_ids = frozenset() if ignore_eos else frozenset({EOS})
    sampling = SamplingParameters(99, 1.0, 1.0, 0, 1, None, ending_ids)
    request = GenerationRequest(RequestId("r"), (1,), sampling, 0)
    planned = PlannedChoice(0, request, tuple(map(StopString, stop_strings)), echoed_text)
    return ChoiceStream(planned, tokenizer.vocabulary, is_event_each_token=is_event_each_token)


def push_all(
    stream: ChoiceStream, token_ids: list[int], last: FinishReason | None, logprob: float | None = None
) -> list[ChoiceEvent]:
    events = []
    for position, token_id in enumerate(token_ids, start=1):
        reason = last if position == len(token_ids) else None
        event = stream.push(Token(token_id, logprob, (), reason))
        if event is not None:
            events.append(event)
        if stream.finish_reason is not None:
            break
    return events


def text_of(events: list[ChoiceEvent]) -> str:
    return "".join(event.text for event in events)


def test_a_token_that_makes_no_text_waits_for_one_that_does_unless_token_ids_were_asked_for(
    tokenizer: TextTokenizer,
) -> None:
    token_ids = tokenizer.encode("a👩b")
    assert len(token_ids) > 3, "a character of several tokens"
    plain, each = stream_of(tokenizer), stream_of(tokenizer, is_event_each_token=True)
    held_back = push_all(plain, token_ids, FinishReason.LENGTH)
    at_once = push_all(each, token_ids, FinishReason.LENGTH)
    assert len(held_back) < len(token_ids)
    assert [event.token_ids for event in at_once] == [(token_id,) for token_id in token_ids]
    assert [event.num_tokens for event in at_once] == list(range(1, len(token_ids) + 1))
    assert merge_events(at_once) == merge_events(held_back)


def test_end_of_sequence_token_ends_and_is_no_text(tokenizer: TextTokenizer) -> None:
    events = push_all(stream_of(tokenizer), [*tokenizer.encode("fox"), EOS], FinishReason.STOP)
    assert text_of(events) == "fox"
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].token_ids[-1] == EOS


def test_a_stop_token_of_the_client_is_no_text_either(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("fox jumps")
    sampling = SamplingParameters(99, 1.0, 1.0, 0, 1, None, frozenset({token_ids[-1]}))
    request = GenerationRequest(RequestId("r"), (1,), sampling, 0)
    stream = ChoiceStream(PlannedChoice(0, request, (), ""), tokenizer.vocabulary)
    events = push_all(stream, token_ids, FinishReason.STOP)
    assert text_of(events) == tokenizer.vocabulary.decode(token_ids[:-1])


def test_half_a_character_at_the_length_limit_comes_out_marked(tokenizer: TextTokenizer) -> None:
    events = push_all(stream_of(tokenizer), tokenizer.encode("a👩")[:-1], FinishReason.LENGTH)
    assert text_of(events) == "a\ufffd"
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_stop_string_ends_the_choice_and_is_cut_off(tokenizer: TextTokenizer) -> None:
    stream = stream_of(tokenizer, "jumps")
    events = push_all(stream, tokenizer.encode("fox jumps over"), None)
    assert text_of(events) == "fox "
    assert stream.finish_reason is FinishReason.STOP
    assert stream.num_tokens < len(tokenizer.encode("fox jumps over"))


def test_stop_string_that_is_complete_with_the_last_token_beats_the_length_limit(tokenizer: TextTokenizer) -> None:
    events = push_all(stream_of(tokenizer, "jumps"), tokenizer.encode("fox jumps"), FinishReason.LENGTH)
    assert (text_of(events), events[-1].finish_reason) == ("fox ", FinishReason.STOP)


def test_false_start_of_a_stop_string_comes_out_at_the_end(tokenizer: TextTokenizer) -> None:
    events = push_all(stream_of(tokenizer, "jumps!"), tokenizer.encode("fox jumps"), FinishReason.LENGTH)
    assert (text_of(events), events[-1].finish_reason) == ("fox jumps", FinishReason.LENGTH)


def test_a_choice_that_is_cut_gives_what_was_held_back_and_ends_one_position_later(tokenizer: TextTokenizer) -> None:
    for stop_strings, text, shown, rest in (((), "a👩", "a", "\ufffd"), (("jumps!",), "fox jumps", "fox ", "jumps")):
        token_ids = tokenizer.encode(text)[: -1 if not stop_strings else None]
        stream = stream_of(tokenizer, *stop_strings)
        assert text_of(push_all(stream, token_ids, None)) == shown
        end = stream.cut()
        assert (end.text, end.finish_reason, end.num_tokens) == (rest, FinishReason.LENGTH, len(token_ids) + 1)
        assert stream.num_tokens == end.num_generated_tokens == len(token_ids)


def test_echoed_prompt_comes_first_and_holds_no_stop_string(tokenizer: TextTokenizer) -> None:
    events = push_all(stream_of(tokenizer, "jumps", echoed_text="it jumps: "), tokenizer.encode("fox"), None)
    assert text_of(events) == "it jumps: fox"


def test_ids_and_logprobs_of_held_tokens_come_with_the_next_event(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("a👩b")
    events = push_all(stream_of(tokenizer), token_ids, FinishReason.LENGTH, logprob=-1.0)
    assert [token_id for event in events for token_id in event.token_ids] == token_ids
    assert [token.token_id for event in events for token in event.logprobs] == token_ids
    assert all(event.text for event in events)


def test_text_offsets_count_whole_characters_before_the_token(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("a👩b")
    events = push_all(stream_of(tokenizer), token_ids, FinishReason.LENGTH, logprob=-1.0)
    offsets = [token.text_offset for event in events for token in event.logprobs]
    assert offsets == [0, *[1] * (len(token_ids) - 2), 2]


def test_ignored_end_of_sequence_token_goes_on(tokenizer: TextTokenizer) -> None:
    token_ids = [*tokenizer.encode("fox"), EOS, *tokenizer.encode(" dog")]
    events = push_all(stream_of(tokenizer, ignore_eos=True), token_ids, FinishReason.LENGTH)
    assert text_of(events) == "fox dog"


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("fox fox fox")
    fox = len(tokenizer.encode("fox"))
    for min_tokens, wanted in ((0, ""), (fox, "fox ")):
        sampling = SamplingParameters(99, 1.0, 1.0, 0, 1, None, frozenset({EOS}), min_tokens=min_tokens)
        request = GenerationRequest(RequestId("r"), (1,), sampling, 0)
        stream = ChoiceStream(PlannedChoice(0, request, (StopString("fox"),), ""), tokenizer.vocabulary)
        assert text_of(push_all(stream, token_ids, FinishReason.LENGTH)) == wanted
        assert stream.finish_reason is FinishReason.STOP
