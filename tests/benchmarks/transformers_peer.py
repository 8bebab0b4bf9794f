"""transformers' generate() on the same weights, in a process of its own that sleeps while the mesh is timed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.benchmarks.streaming_client import StreamTimes


class TransformersPeer:
    """Static batches: all prompts of a round have one length, start together and end together."""

    def __init__(self, directory: Path, dtype: str, threads: int, *, is_sampling: bool = False) -> None:
        """`is_sampling`: at temperature 1 from the whole vocabulary, seeded; otherwise greedy."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, directory, dtype, threads, is_sampling)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> TransformersPeer:
        self._process.start()
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[StreamTimes, ...]:
        """One stream a prompt, with `max_tokens` tokens each."""
        self._connection.send((list(map(list, prompts)), max_tokens))
        sent_s, arrivals = self._take()
        return (StreamTimes(sent_s, tuple((at_s, 1) for at_s in arrivals)),) * len(prompts)

    def _take(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("the transformers process died; its words are above") from None


def _serve(connection: Connection, directory: Path, dtype: str, threads: int, is_sampling: bool) -> None:
    """Runs in the child until the other end closes."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging

    class NoteTimes(StoppingCriteria):
        """Asked after each token; never stops."""

        def __init__(self) -> None:
            self.times_s: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.times_s.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    quieten: Any = logging.disable_progress_bar
    quieten()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0} if is_sampling else {"do_sample": False}
    )
    torch.manual_seed(0)
    connection.send("ready")
    with torch.inference_mode():
        while True:
            try:
                prompts, max_tokens = connection.recv()
            except EOFError:
                return
            batch, notes = torch.tensor(prompts), NoteTimes()
            sent_s = time.perf_counter()
            model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_tokens,
                **sampling,
                stopping_criteria=StoppingCriteriaList([notes]),
            )
            connection.send((sent_s, notes.times_s))
