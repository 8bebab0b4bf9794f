"""The page says what was found, and of whom."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from tests.benchmarks.agents.conversations import Traffic
from tests.benchmarks.agents.playing import Played, PlayedTurn
from tests.benchmarks.agents.report import AgentsReport, write_report
from tests.benchmarks.machine import Machine
from tests.benchmarks.peers.contenders import Contender
from tests.benchmarks.peers.engines import HttpEngine
from tests.benchmarks.rates import Rates
from tests.benchmarks.streaming_client import Answer, StreamTimes

MACHINE = Machine("cpu", 2, 4.0, "AVX512", "avx2", "6.1", "3.11", "2.13", "5.2", "abc", 0.1)
RATES = Rates(2, 1e10, 2e10, 1e11, 2e11, 3e11)


def played(*answers: tuple[int, ...], ttft_s: float = 0.1, cached: int | None = 0) -> Played:
    """One conversation, an answer a second."""
    return [
        [
            PlayedTurn(50, Answer(StreamTimes(at_s, ((at_s + ttft_s, 1), (at_s + 0.9, 1))), token_ids, cached))
            for at_s, token_ids in enumerate(answers)
        ]
    ]


def contender(name: str, is_peer: bool) -> Contender[HttpEngine]:
    return Contender(name, is_peer, "bf16", "as it ships", lambda: contextlib.nullcontext(HttpEngine("", {})))


def report() -> AgentsReport:
    return AgentsReport(
        machine=MACHINE,
        rates=RATES,
        model="small",
        traffic=Traffic(1, 2, 40, (5, 5), (2, 2), (0, 0)),
        time_limit_s=9,
        contenders=[contender("mesh", False), contender("mesh PREFIX_CACHE=off", False), contender("vllm", True)],
        played={
            "mesh": [played((1, 2), (3, 4), ttft_s=0.2, cached=25)],
            "mesh PREFIX_CACHE=off": [played((1, 2), (3, 5))],
            "vllm": [played((6, 6), ttft_s=0.4, cached=None)],
        },
        absent={"llama.cpp": "no compiler"},
        minutes=1.0,
    )


def test_meshes_are_compared_with_the_first_one_and_who_was_stopped_is_named() -> None:
    sentences = report().sentences()
    assert sentences == [
        "1 of 2 answers of `mesh PREFIX_CACHE=off` are those of `mesh`, token for token.",
        "`vllm` answered 1 of 2 turns in its time; its tokens/s are of these.",
    ]


def test_the_page_has_ratios_to_the_best_peer_cached_shares_and_who_is_absent(tmp_path: Path) -> None:
    json_path, page_path, plot_path = write_report(report(), tmp_path)
    page = page_path.read_text()
    assert "|  | turn 1 | turn 2 |" in page
    assert "| mesh | 200 (2.00) | 200 |" in page
    assert "| mesh | 50.0% | 50.0% |" in page
    assert "| vllm | - | - |" in page
    assert "- llama.cpp: no compiler" in page
    assert max(map(len, (line for line in page.splitlines() if not line.startswith("|")))) <= 120
    document = json.loads(json_path.read_text())
    assert document["turns"]["mesh"][0]["cached_tokens"] == ["25 25"]
    assert document["rows"][2]["figures"]["seconds"] is None
    assert plot_path.stat().st_size > 0
