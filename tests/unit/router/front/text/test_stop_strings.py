from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.front.text.stop_strings import StopString, StopStringMatcher

SHORT_TEXT = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopStringMatcher(list(map(StopString, stops)))
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.stopped:
            return shown, True
    return [*shown, matcher.flush()], False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """By the definition: the first end counts, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(STOPS, SHORT_TEXT, st.lists(st.integers(0, 4), max_size=12))
def test_result_is_the_same_however_the_text_is_cut(stops: list[str], text: str, sizes: list[int]) -> None:
    shown, stopped = run(stops, cut(text, sizes))
    assert ("".join(shown), stopped) == expected(stops, text)


@given(STOPS, SHORT_TEXT)
def test_as_much_as_possible_is_shown_at_once(stops: list[str], text: str) -> None:
    matcher = StopStringMatcher(list(map(StopString, stops)))
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.push(character)
        if matcher.stopped:
            return
        held = max(length for stop in stops for length in range(len(stop)) if text[:end].endswith(stop[:length]))
        assert len(shown) == end - held


def test_stop_string_over_three_pieces_never_leaks_its_start() -> None:
    assert run(["<end>"], ["one <e", "n", "d> two"]) == (["one ", "", ""], True)


def test_false_start_comes_out_once_it_is_one() -> None:
    assert run(["<end>"], ["a<en", "try"]) == (["a", "<entry", ""], False)


def test_held_text_comes_out_at_the_end() -> None:
    assert run(["\n\n"], ["line\n"]) == (["line", "\n"], False)


@given(STOPS, SHORT_TEXT, SHORT_TEXT)
def test_only_stop_strings_that_end_where_they_may_count(stops: list[str], early: str, late: str) -> None:
    matcher = StopStringMatcher(list(map(StopString, stops)))
    shown = matcher.push(early, may_stop=False) + matcher.push(late)
    text, ends = early + late, range(len(early) + 1, len(early + late) + 1)
    ending = [(end, max((len(s) for s in stops if text[:end].endswith(s)), default=0)) for end in ends]
    first = next(((end, length) for end, length in ending if length), None)
    assert matcher.stopped == (first is not None)
    if first is None:
        assert shown + matcher.flush() == text
    else:
        assert text[: first[0]].startswith(shown), "what was shown before the end cannot be taken back"
        assert shown == text[: first[0] - first[1]]
