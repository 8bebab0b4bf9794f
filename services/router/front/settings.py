"""What an operator may set about the HTTP front."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.router.front.http.cross_origin import OriginPolicy


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """Bounds and names of the front. Everything has a value that suits one machine."""

    served_name: str
    """The `model` that clients ask for."""
    max_body_bytes: int = 8 * 1024 * 1024
    """A longer request body is refused with 413 while it is being read."""
    keep_alive_interval_s: float = 5.0
    """An SSE comment goes out after this long without a token, so that proxies do not cut the line."""
    max_sequences: int = 128
    """The largest number of prompts times `n` in one request."""
    thread_above_characters: int = 4096
    """Prompts and bodies longer than this are parsed and tokenized in a thread, off the event loop."""
    system_fingerprint: str | None = None
    """It goes into replies as it is, and stands for what decides the bits of a result."""
    resume_grace_s: float = 60.0
    """A request that may be resumed goes on for this long without a client; after a restart every request does."""
    retention_s: float = 600.0
    """How long after its end such a request can be asked for."""
    max_kept_requests: int = 10_000
    """How many resumable and idempotent requests are kept, under way or ended; the next one is refused with 429."""
    max_kept_bytes: int = 256 << 20
    """How many bytes of them are kept, and as many of plain ones, while they are under way."""
    origins: OriginPolicy = field(default_factory=OriginPolicy)
    """It says which web pages may ask."""
