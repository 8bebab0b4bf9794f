"""How the scheduler is tuned."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """It is checked when it is made: a ConfigurationError names the field and what would be right."""

    block_tokens: int = 32
    """Tokens that a KV block holds."""
    max_batch_tokens: int = 512
    """Token budget of a step: decode tokens first, prefill chunks in what is left."""
    max_batch_sequences: int = 64
    prefill_chunk_tokens: int = 256
    max_waiting: int = 512
    """Length of the queue; a request that comes then is sent away with a time to come back."""
    max_reserved_tokens: int = 4_194_304
    """Prompts and max_tokens of all requests inside: bounds the router's memory."""
    micro_batches_per_pipeline: int | None = None
    """Steps that may be in flight in a pipeline; None: as many as it has slots, and one more while nothing decodes."""
    min_decode_share: int = 1
    """Decoding sequences are cut into several micro-batches only as far as each keeps this many: every micro-batch
    reads all weights again, and until the arithmetic outweighs that, one large step is faster than two small ones."""
    plans_ahead: bool = True
    """Whether a decode step may be planned, and sent, before the tokens that it goes on with are known."""
    max_failed_steps: int = 3
    """Failed steps in a row after which a request is still recomputed; one more and it fails."""
    max_held_releases: int = 64
    """Releases that wait for a step to go with; one more and they go in a step of their own."""
    max_queue_s: float = 600.0
    """Longest wait for a place in a pipeline."""
    max_outage_s: float = 60.0
    """Longest wait while no pipeline is open at all, from when the last one closed."""
    max_stalled_s: float = 3600.0
    """Longest wait of a request that runs for the answer to a step, over all that failed meanwhile."""
    max_request_s: float = 3600.0
    """Longest life of a request."""
    canary_interval_s: float = 1.0
    """An open pipeline in which nothing has been answered for this long gets a step that carries nothing."""
    pipeline_policy: str = "least_in_flight"

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            lowest = 0 if setting.name in ("max_failed_steps", "max_held_releases") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < lowest:
                raise ConfigurationError(f"{setting.name} is {value}; at least {lowest} is needed")
            if isinstance(value, float) and not value > 0:
                raise ConfigurationError(f"{setting.name} is {value}; more than 0 is needed")
