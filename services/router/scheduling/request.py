"""One request's life as a state machine, who goes on, who waits or goes alone, and whose turn it is when something
raises.

WAITING -> RUNNING -> FINISHED
   ^  |       | |---> CANCELLED (also from WAITING)
   |  |       | '---> FAILED    (also from WAITING)
   '--+-------'  preempted: keeps its place in line and its tokens; its cache is computed again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType

import numpy as np

from common.ids import PipelineId, RequestId, SequenceId, StepId
from common.messages import AWAITED_TOKEN
from services.router.engine import FinishReason, GenerationRequest, RecoveryCounts, Token
from services.router.scheduling.blocks.key_chain import BlockKey, KeyChain
from services.router.scheduling.pace import RequestPace
from services.router.scheduling.step_plan import StepPlan

MAX_KV_HISTORY = 64
"""Steps that a request remembers of its cache. A mirror that lags by more is no help: all is replayed then."""
Attend = Callable[[str], None]
"""It is told whose turn it is, before anything is done for it; the empty string once it is no request's."""


class RequestState(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Request:
    """A request and what the scheduler knows of it. Compared by identity."""

    generation_request: GenerationRequest
    arrival: int
    """Place in line; kept through preemptions."""
    arrived_s: float
    queued_s: float = field(init=False)
    """When it last entered the queue."""
    state: RequestState = RequestState.WAITING
    generated_token_ids: list[int] = field(init=False)
    sequence_id: SequenceId | None = None
    """Its number on the wire, while it runs. Each recomputation draws a new one, so that nothing said of the old
    cache can be taken for the new."""
    pipeline: PipelineId | None = None
    num_computed_tokens: int = 0
    """Positions whose K and V are in the cache."""
    block_table: list[int] = field(default_factory=list)
    steps: dict[StepId, int] = field(default_factory=dict)
    """The steps in flight that it is part of, oldest first, with how many of its positions each has: several only while
    a prefill runs ahead, or a decode step is planned ahead, and never with drafts. One that ended in mid-flight keeps
    them, and its blocks, until the last of them lands."""
    num_told_blocks: int = 0
    """Blocks of its table that the stages of this generation know."""
    kv_history: list[tuple[int, int]] = field(default_factory=list)
    """(step, positions computed with it), ascending: what a copy of the cache holds that is good up to some step."""
    replay_position: int = 0
    """While its cache is rebuilt on some slots: positions that are there again."""
    replay_stop: int = 0
    """What must be there before it goes on; at or below `replay_position`: nothing is to be rebuilt."""
    held_sequence_id: SequenceId | None = field(init=False)
    """Its number when a router before this one ran it: stages may have its cache under this number."""
    num_failed_steps: int = 0
    """Failed steps since its last new token."""
    num_recoveries: int = 0
    """Times that a loss of nodes interrupted it."""
    num_replayed_tokens: int = 0
    """Positions computed again after such a loss."""
    num_retried_calls: int = 0
    """Expert calls of its steps that were asked of another copy too, or instead."""
    max_computed_tokens: int = 0
    """The furthest that its cache has ever come: what is computed again after a failure is not further."""
    pace: RequestPace = field(init=False)
    _told_early: bool | None = None
    """Whether it was too short to end when its last stage was told of its penalties and biases; None: it is not told
    in this generation."""
    waits_for_start: bool = field(init=False)
    """It came with a router's start and has not run since: nodes may have to load first, which is not an outage."""
    block_tokens: int = 32
    _keys: KeyChain = field(init=False)
    numeric_class: int | None = None
    """By which its cache is computed; None: nothing of it is there yet; 0: that is not known, and nothing is cached."""
    num_entered_blocks: int = 0
    """Blocks at its beginning that were entered into the table of cached ones, or were there."""
    has_asked: bool = False
    """Its prompt was counted among those that were looked for in the cache."""
    num_found_tokens: int = 0
    """Prompt tokens that were found in the cache, and that it had not computed before."""
    is_unconfirmed: bool = False
    """Its cache ends with blocks that were found, and no step behind them was answered."""
    restoring: StepId | None = None
    """The step in flight that gets blocks of it back from the session tier: nothing of it runs beside that."""
    was_misled: bool = False
    """What it had found was of another class than what was computed behind it: it finds nothing more."""

    def __post_init__(self) -> None:
        self._keys = KeyChain(self.generation_request.cache_salt, self.block_tokens)
        self.queued_s = self.arrived_s
        self.generated_token_ids = list(self.generation_request.generated_token_ids)
        self.held_sequence_id = self.generation_request.sequence_id
        self.pace = RequestPace(self.arrived_s)
        self.waits_for_start = self.generation_request.is_restored

    @property
    def request_id(self) -> RequestId:
        """Returns the front's name for it."""
        return self.generation_request.request_id

    @property
    def num_tokens(self) -> int:
        """Counts prompt and generated tokens."""
        return len(self.generation_request.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Counts known tokens that are not in the cache yet; at least 1 while it lives."""
        # Not by way of `num_tokens`: this is asked of every request in every step, more than once.
        generated = len(self.generated_token_ids)
        return len(self.generation_request.prompt_token_ids) + generated - self.num_computed_tokens

    @property
    def num_planned_tokens(self) -> int:
        """Counts positions in the cache or in steps in flight: where the next chunk begins. Not while it replays."""
        return self.num_computed_tokens + sum(self.steps.values())

    @property
    def num_unplanned_tokens(self) -> int:
        """Counts known tokens that are neither in the cache nor in a step in flight, less one that is in flight and not
        known yet. Not while it replays."""
        return self.num_remaining_tokens - sum(self.steps.values())

    @property
    def may_run_ahead(self) -> bool:
        """Says whether a further chunk of its prefill may follow those in flight: all that it needs of them is that
        they are computed before it, layer by layer. One that has broken a step goes one at a time, and one that is to
        start over not on."""
        has_trouble = self.num_failed_steps or self.is_misled or self.restoring
        return bool(self.steps) and self.num_unplanned_tokens > 0 and not has_trouble

    @property
    def ends_in_flight(self) -> bool:
        """Says whether the token that its step in flight samples is its last one, whichever it is."""
        return len(self.generated_token_ids) + len(self.steps) >= self.generation_request.sampling.max_tokens

    @property
    def may_go_on_unseen(self) -> bool:
        """Says whether its next decode step may be planned now, also where the token that this goes on with is not
        known: nothing else that the step says depends on that token. One that has broken a step is looked at first."""
        if self.num_failed_steps or self.is_misled or len(self.steps) > 1:
            return False
        sampling, num_generated = self.generation_request.sampling, len(self.generated_token_ids) + len(self.steps)
        is_told = not sampling.adjusts(num_generated) or self._told_early == sampling.is_early(num_generated)
        return is_told or not self.steps

    def max_drafts(self, num_unseen: int) -> int:
        """Returns how many tokens may be guessed to follow those known and so many under way: one more comes with them
        in any case, and the last stage is told no other biases in between. None of one that has broken a step."""
        if self.num_failed_steps or self.is_misled:
            return 0
        sampling, num_generated = self.generation_request.sampling, len(self.generated_token_ids) + num_unseen
        stop = sampling.max_tokens
        if sampling.is_early(num_generated):
            stop = min(stop, sampling.min_tokens)
        return max(0, stop - num_generated - 1)

    @property
    def is_decoding(self) -> bool:
        """Says whether only its newest token is left to compute."""
        return self.num_remaining_tokens == 1

    @property
    def is_new(self) -> bool:
        """Says whether it came to this router and has had no place yet, and was neither restored nor sent back."""
        return self.sequence_id is None and self.queued_s == self.arrived_s and not self.waits_for_start

    @property
    def is_replaying(self) -> bool:
        """Says whether some slots do not have all of its cache yet."""
        return self.replay_position < self.replay_stop

    def covered_by(self, mark: int) -> int:
        """Counts positions that a cache which is good up to step `mark` holds."""
        return max((stop for step, stop in self.kv_history if step <= mark), default=0)

    def note_computed(self, step: int, num_tokens: int, now_s: float, *, is_decode: bool) -> None:
        """Notes that this many more tokens are in the cache of every slot. `is_decode`: a token after a token."""
        self.num_computed_tokens += num_tokens
        if not self.num_failed_steps or self.num_computed_tokens > self.max_computed_tokens:
            self.pace.progressed(now_s, is_measure=is_decode)
        if self.steps:  # it waits for the next one already
            self.pace.planned(now_s)
        self.max_computed_tokens = max(self.max_computed_tokens, self.num_computed_tokens)
        self.is_unconfirmed = False
        self._note_history(step)

    def take_blocks(self, block_ids: Sequence[int], steps: Sequence[int]) -> None:
        """Adds whole blocks that hold its next tokens already, each by the step that goes with it. The stages are told
        its whole table again, since they take it for computed up to where a table begins."""
        start = self.num_computed_tokens
        for block_id, step in zip(block_ids, steps, strict=True):
            self.block_table.append(block_id)
            self.num_computed_tokens += self.block_tokens
            self._note_history(max(step, self.kv_history[-1][0] if self.kv_history else 0))
        self._note_found(start)

    def begin_restoring(self, step: StepId, block_ids: Sequence[int], numeric_class: int) -> None:
        """Notes that a step is to bring its next blocks back: to these, which are its own from now on, by a class."""
        self.block_table.extend(block_ids)
        self.restoring, self.numeric_class = step, numeric_class

    def note_restored(self, step: int, num_tokens: int, now_s: float) -> None:
        """Notes that a step has brought this many of its next tokens back to every slot: it goes on as if it had found
        them there."""
        start = self.num_computed_tokens
        self.num_computed_tokens += num_tokens
        self._note_history(step)
        if not self.num_failed_steps or self.num_computed_tokens > self.max_computed_tokens:
            self.pace.progressed(now_s, is_measure=False)
        self._note_found(start)

    def _note_found(self, start: int) -> None:
        """Notes that what is in its cache from `start` on was found."""
        stop = min(self.num_computed_tokens, len(self.generation_request.prompt_token_ids))
        self.num_found_tokens += max(0, stop - max(start, self.max_computed_tokens))
        self.max_computed_tokens = max(self.max_computed_tokens, self.num_computed_tokens)
        self.is_unconfirmed = True
        self.tell_anew()

    def _note_history(self, step: int) -> None:
        if self.kv_history and self.kv_history[-1][0] == step:
            self.kv_history.pop()
        self.kv_history.append((step, self.num_computed_tokens))
        if len(self.kv_history) > MAX_KV_HISTORY:
            del self.kv_history[0]

    def note_replayed(self, step: int, num_tokens: int, now_s: float) -> None:
        """Notes that this many more tokens are there again. Once all are, no copy from before this step has them."""
        if not self.num_failed_steps:
            self.pace.progressed(now_s, is_measure=False)
        self.num_replayed_tokens += num_tokens
        self.skip_replay(step, self.replay_position + num_tokens)

    def skip_replay(self, step: int, position: int) -> None:
        """Lets it go on from a position: what is before it is there again by this step, whoever has replayed it."""
        self.replay_position = position
        if not self.is_replaying:
            self.kv_history = [(step, self.num_computed_tokens)]

    @property
    def is_misled(self) -> bool:
        """Says whether it is to start over once its steps in flight are back, since it holds what has misled it."""
        return self.was_misled and self.is_unconfirmed

    def distrust_found(self) -> None:
        """Lets it find nothing more, as if it had not found what it has: it is to be computed from the beginning."""
        self.was_misled, self.num_found_tokens = True, 0

    def replay_from(self, position: int) -> None:
        """Lets positions from here on be rebuilt on some slots; the stages are told its whole table again."""
        self.replay_position, self.replay_stop = position, self.num_computed_tokens
        self.tell_anew()

    def tell_anew(self) -> None:
        """Lets all of it be told with the next steps, since it is not known what the stages have been told."""
        self.num_told_blocks, self._told_early = 0, None

    def token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns tokens at positions [start, stop). One that is not known yet is AWAITED_TOKEN. A decode step does not
        touch the prompt."""
        if start == self.num_tokens:
            return (AWAITED_TOKEN,) * (stop - start)
        prompt = self.generation_request.prompt_token_ids
        generated = self.generated_token_ids
        return prompt[start:stop] + tuple(generated[max(0, start - len(prompt)) : max(0, stop - len(prompt))])

    def check_invariants(self, in_flight: Collection[StepId], num_guessed: int) -> None:
        """Raises AssertionError where one that runs contradicts itself, or the steps in flight of its pipeline.
        `num_guessed`: drafts of it in these."""
        name = self.request_id
        assert self.state is RequestState.RUNNING, f"{name} is {self.state} and runs"
        assert self.num_remaining_tokens >= 1, f"{name} has nothing to compute"
        assert self.steps.keys() <= set(in_flight), f"{name} is in a step that has landed"
        assert list(self.steps) == sorted(self.steps), f"{name} is in steps out of order"
        if not self.is_replaying:
            covered = len(self.block_table) * self.block_tokens
            least = -num_guessed - self.is_decoding
            assert self.num_unplanned_tokens >= least, f"{name} has more in flight than tokens"
            assert covered >= self.num_planned_tokens, f"{name} has more cache than blocks"

    def block_key(self, index: int, numeric_class: int) -> BlockKey:
        """Returns the name of what its block `index` holds, all of whose tokens must be known."""
        assert (index + 1) * self.block_tokens <= self.num_tokens, "a token that is awaited has no part in a key"
        return self._keys.key(index, numeric_class, self.token_ids)

    def tells_adjustments(self, num_generated: int) -> bool:
        """Returns whether the last stage must be told of its penalties and biases in the step that goes on after so
        many tokens; it then counts as told."""
        sampling = self.generation_request.sampling
        is_early = sampling.is_early(num_generated)
        was_told, self._told_early = self._told_early, is_early
        return sampling.adjusts(num_generated) and was_told != is_early

    def token_counts(self) -> bytes:
        """Returns what the penalties of the next token look at, as `ScheduledChunk.token_counts` has it."""
        sampling = self.generation_request.sampling
        if not sampling.counts_tokens:
            return b""
        prompt = self.generation_request.prompt_token_ids if sampling.counts_prompt else ()
        return count_tokens(prompt, self.generated_token_ids)

    def start(self, pipeline: PipelineId, sequence_id: SequenceId, now_s: float) -> None:
        """WAITING -> RUNNING, with an empty cache."""
        self._move({RequestState.WAITING}, RequestState.RUNNING)
        self.pace.begin(now_s, is_retry=self.num_failed_steps > 0)
        self.pipeline, self.sequence_id = pipeline, sequence_id
        self._forget_cache()
        self.waits_for_start = False
        self.held_sequence_id = None  # whatever stages still have of it is now either adopted or of no use

    def requeue(self, now_s: float) -> None:
        """RUNNING -> WAITING: the cache is lost, the generated tokens stay. Blocks and steps were given back before."""
        if self.steps or self.block_table:
            raise ValueError(f"request {self.request_id} still holds a step or blocks")
        self._move({RequestState.RUNNING}, RequestState.WAITING)
        self.start_over(now_s)

    def start_over(self, now_s: float) -> None:
        """-> WAITING, whatever it holds: its pipeline's blocks do not add up, and are given up as a whole."""
        self.state, self.steps, self.block_table = RequestState.WAITING, {}, []
        self.pipeline, self.sequence_id = None, None
        self._forget_cache()
        self.queued_s = now_s

    def _forget_cache(self) -> None:
        self.num_computed_tokens = self.replay_position = self.replay_stop = self.num_entered_blocks = 0
        self.numeric_class, self.is_unconfirmed, self.restoring = None, False, None
        self.kv_history.clear()
        self.tell_anew()

    def accept_token(self, sampled: Token) -> Token:
        """Appends a token; RUNNING -> FINISHED at a stop token or at max_tokens. A stop token is not text."""
        if self.state is not RequestState.RUNNING:
            raise ValueError(f"request {self.request_id} is {self.state} and takes no token")
        if self.num_found_tokens and not self.generated_token_ids:
            sampled = replace(sampled, num_cached_tokens=self.num_found_tokens)
        self.generated_token_ids.append(sampled.token_id)
        self.num_failed_steps = 0
        sampling = self.generation_request.sampling
        finish_reason = None
        if sampled.token_id in sampling.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif len(self.generated_token_ids) >= sampling.max_tokens:
            finish_reason = FinishReason.LENGTH
        if finish_reason is not None:
            self.state = RequestState.FINISHED
        if finish_reason is None and not (self.num_recoveries or self.num_replayed_tokens or self.num_retried_calls):
            return sampled
        recovery = RecoveryCounts(self.num_recoveries, self.num_replayed_tokens, self.num_retried_calls)
        return replace(sampled, finish_reason=finish_reason, recovery=recovery)

    def end(self, state: RequestState) -> None:
        """Cancels or fails it."""
        self._move({RequestState.WAITING, RequestState.RUNNING}, state)

    def _move(self, allowed: set[RequestState], state: RequestState) -> None:
        if self.state not in allowed:
            raise ValueError(f"request {self.request_id} is {self.state} and cannot become {state}")
        self.state = state


def going_on_unseen(under_way: StepPlan, running: Sequence[Request]) -> list[Request]:
    """Returns who is in the step after this one, the only one in flight, if that can be said before its tokens are
    known; else nobody.

    That is so while it decodes and all that run here do. Those go on for which the token under way is not the last one
    anyhow. One that ends with a stop token has a row too many in the next step, of which nothing comes. A prompt that
    is to join is not kept waiting by one more step, and a request about which the last stage must be told more than
    that it goes on is not told before all of that is known.
    """
    if not under_way.only_decodes or under_way.computing_slots:
        return []
    going_on = [request for request in running if not request.ends_in_flight]
    if not all(request.is_decoding and not request.is_replaying and request.may_go_on_unseen for request in going_on):
        return []
    return going_on


def wait_for_others(decoding: Sequence[Request], ready: Sequence[Request], most: int) -> bool:
    """Returns whether those that are ready had better go with those that are in steps now, once these are back: all
    that decode need no more steps, of `most` of them at most, than are in flight. Who goes alone waits for nobody."""
    num_steps = len({next(reversed(request.steps)) for request in decoding if request.steps})
    num_needed = -(-len(decoding) // max(1, most))
    return num_steps >= num_needed and not any(request.num_failed_steps for request in ready)


def isolated(picked: Sequence[tuple[Request, int]]) -> Sequence[tuple[Request, int]]:
    """Returns a request whose last step failed alone, so that one that breaks its steps takes no others along."""
    suspect = next((pick for pick in picked if pick[0].num_failed_steps), None)
    return picked if suspect is None else [suspect]


class Blame:
    """Keeps the requests whose handling raised, until their owner ends them."""

    def __init__(self, attend: Attend = lambda name: None) -> None:
        self.attend = attend
        self._broken: dict[Request, Exception] = {}
        self._handled: list[Request] = []
        """Innermost last: one may be handled for the sake of another, which needs its blocks."""

    def handling(self, request: Request) -> Blame:
        """Begins the turn of a request, for the `with` statement that this is called in. An exception is kept with the
        request and goes no further. What ends the process is passed on, and the request stays the one that was attended
        to."""
        self._handled.append(request)
        self.attend(request.request_id)
        return self

    # Not a generator, which would cost more than what it guards.

    def __enter__(self) -> None:
        """The turn has begun in `handling`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Ends the turn. Returns whether the error is dealt with."""
        if error is not None and not isinstance(error, Exception):
            return False
        request = self._handled.pop()
        self.attend(self._handled[-1].request_id if self._handled else "")
        if error is not None:
            self._broken.setdefault(request, error)
        return True

    def has(self, request: Request) -> bool:
        """Returns whether its handling raised: its owner ends it in a moment, and nothing more is to be done for it."""
        return request in self._broken

    def pop_broken(self) -> list[tuple[Request, Exception]]:
        """Returns requests whose handling raised since the last call, with the first that each of them raised."""
        broken, self._broken = self._broken, {}
        return list(broken.items())


def count_tokens(prompt_token_ids: Sequence[int], generated_token_ids: Sequence[int]) -> bytes:
    """Returns int32 [*, 3]: token id, times generated, 1 if in the prompt; a row for each token that came up,
    ascending.

    `prompt_token_ids`: empty where no penalty looks at the prompt.
    """
    times, prompt = Counter(generated_token_ids), frozenset(prompt_token_ids)
    rows = [(token_id, times[token_id], int(token_id in prompt)) for token_id in sorted(prompt.union(times))]
    return np.array(rows, dtype=np.int32).tobytes()
