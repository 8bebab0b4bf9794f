"""Fields that clients send and this server does not serve. Pure.

The rule: a field that would change the answer is refused by its name; one that would not is taken, and named once in
the log. Two tables say which is which: `TAKEN` change nothing whatever they say, `NEUTRAL` change nothing at the values
listed; and a null asks for nothing whatever field it stands in. `openai_schema.py` refuses the rest as unknown.
Sources: OpenAI's API reference, and what vLLM, SGLang, llama.cpp, text-generation-inference and OpenRouter take too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from common.errors import InvalidRequestError

Json = dict[str, Any]
_WITHOUT_TOOLS = "it does not generate tool calls yet; leave it out"

TAKEN = frozenset(
    {
        # the owner of the request, and what is kept of it
        "custom_labels",
        "litellm_metadata",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "rid",
        "safety_identifier",
        "session_id",
        "store",
        "user",
        # how soon it is answered, and where
        "data_parallel_rank",
        "id_slot",
        "keep_alive",
        "prediction",
        "priority",
        "provider",
        "service_tier",
        "slot_id",
        # what is cached: to the same bits; `cache` and `cache_salt` are served
        "cache_prompt",
        "extra_key",
        "n_cache_reuse",
        "use_cache",
        # what else the reply tells
        "include_timings",
        "perf_metrics_in_response",
        "return_cached_tokens_details",
        "return_progress",
        "stream_options",  # those of a stream are served
        "timings_per_token",
        "usage",
        # hints that none of the model families served knows
        "parallel_tool_calls",  # says how, where there are tools
        "reasoning_effort",  # chats hand it to the chat template
        "verbosity",
        # numbers of ways to sample that are off: their switches are in the other table
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "mirostat_eta",
        "mirostat_tau",
        "repeat_last_n",
        "smoothing_curve",
        "xtc_threshold",
    }
)
"""Fields of a request that change nothing, whatever their value."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),  # it may equal `n`, too
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
    # vLLM, SGLang
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "custom_params": ({},),
    "detokenize": (True,),
    "documents": ([],),
    "extra_body": ({},),  # of clients that do not unfold it
    "early_stopping": (False,),
    "guided_choice": ([],),
    "guided_decoding_backend": (),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "no_stop_trim": (False,),
    "prompt_logprobs": (),
    "regex": ("",),
    "ebnf": ("",),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stream_reasoning": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # llama.cpp, text-generation-inference, OpenRouter, Mistral, Fireworks and older servers
    "context_length_exceeded_behavior": ("error",),
    "details": (False,),
    "decoder_input_details": (False,),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "grammar": ("",),
    "json_schema": ({},),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "models": ([],),
    "n_keep": (0,),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "options": ({},),
    "penalty_alpha": (0,),
    "plugins": ([],),
    "post_sampling_probs": (False,),
    "raw_output": (False,),
    "reasoning": ({},),
    "repeat_penalty": (1,),
    "response_fields": ([],),
    "return_full_text": (False,),
    "return_tokens": (False,),
    "safe_prompt": (False,),
    "smoothing_factor": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "transforms": ([],),
    "typical": (1,),
    "typical_p": (1,),
    "watermark": (False,),
    "xtc_probability": (0,),
}
"""Fields of a request that are accepted at these values, which ask for nothing."""

OF_OTHER_ROUTE: Mapping[str, tuple[object, ...]] = {
    "add_special_tokens": (False,),
    "echo": (False,),
    "top_logprobs": (0,),
}
"""The same for fields that the other route serves; what is wrong with them otherwise is that they stand here."""

_REASONS = {name: _WITHOUT_TOOLS for name in ("tools", "tool_choice", "functions", "function_call")} | {
    "repeat_penalty": "use `repetition_penalty` instead",
}
"""What is said in place of `leave it out`, at the request's own level."""

TAKEN_IN_STREAM_OPTIONS = frozenset({"include_obfuscation"})
"""Events are not padded here."""

_OF_SDKS = frozenset({"cache_control", "provider_specific_fields"})
"""What Anthropic's clients say of caching, and what LiteLLM keeps in the messages of replies, which come back."""
TAKEN_IN_MESSAGE = _OF_SDKS | {
    "annotations",
    "created",
    "createdAt",
    "created_at",
    "id",
    "metadata",
    "parsed",  # OpenAI's SDK keeps there what it read in `content`
    "status",
    "timestamp",
}
NEUTRAL_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "images": ([],),
    "prefix": (False,),
    "reasoning_details": ([],),
    "refusal": ("",),
    "thinking_blocks": ([],),
    "type": ("message",),
    "weight": (1,),
}
TAKEN_IN_PART = _OF_SDKS | {"annotations", "extras", "id", "index", "metadata"}
TAKEN_IN_CALL = _OF_SDKS | {"index"}
TAKEN_IN_FUNCTION = _OF_SDKS | {"parsed_arguments"}
"""OpenAI's SDK keeps there what it read in `arguments`."""


@dataclass(slots=True)
class Sieve:
    """Leaves out of one request what changes nothing. `unused` names it afterwards, without places in lists."""

    max_fields: int
    """A larger object is left as it is, to be refused as a whole."""
    unused: dict[str, None] = field(default_factory=dict)

    def sift(
        self,
        fields: Json,
        served: Collection[str],
        taken: Set[str],
        neutral: Mapping[str, tuple[object, ...]],
        place: str = "",
    ) -> Json:
        """Returns `fields` without those that change nothing. `place` is the object's in the request (`messages[1].`).

        Raises InvalidRequestError for one that is known and would change the answer.
        """
        if len(fields) > self.max_fields:
            return fields
        kept: Json = {}
        for name, value in fields.items():
            if name in served:
                kept[name] = value
            elif (
                value is None
                or name in taken
                or _asks_for_nothing(value, neutral.get(name, ()))
                or (not place and _asks_for_nothing(value, OF_OTHER_ROUTE.get(name, ())))
            ):
                self.unused[_without_indices(place) + name] = None
            elif name in neutral:
                reason = f": {_REASONS[name]}" if name in _REASONS and not place else "; leave it out"
                raise InvalidRequestError(f"`{place}{name}` is not supported by this server{reason}", f"{place}{name}")
            else:
                kept[name] = value  # unknown, and refused as such where the rest is checked
        return kept


def _asks_for_nothing(value: object, neutral_values: tuple[object, ...]) -> bool:
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    # `False == 0` in Python; in JSON they differ.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutral_values)


def _without_indices(place: str) -> str:
    return "".join(piece.partition("]")[2] if "]" in piece else piece for piece in place.split("["))
