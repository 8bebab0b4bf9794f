"""What the front counts and times. Names carry their unit."""

from __future__ import annotations

import asyncio
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class ConnectionMetrics:
    """What the HTTP server counts of its connections. It is made once, on the registry of the process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open = Gauge("moemesh_http_connections", "HTTP connections that are open", registry=registry)
        self.ended = Counter(
            "moemesh_http_connections_ended_total",
            "HTTP connections that the server did not want or did not keep, by the reason",
            ["why"],
            registry=registry,
        )
        for why in ("refused", "displaced", "late", "invalid", "unread"):
            self.ended.labels(why)  # there from the start: an alert needs the 0


class FrontMetrics:
    """What the front counts and times. It is made once, on the registry of the process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Times at which counters were made are as many series again, and tell what the start time of the process tells.
        disable_created_metrics()
        self.registry = registry
        self._making: asyncio.Task[bytes] | None = None
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = counter("moemesh_http_requests_total", "HTTP requests by route and status", ["route", "status"])
        self.requests_in_flight = Gauge(
            "moemesh_http_requests_in_flight", "HTTP requests that have no complete answer yet", registry=registry
        )
        self.time_to_first_token_s = histogram(
            "moemesh_time_to_first_token_seconds",
            "From the complete request to the first token of any of its choices",
            buckets=_TTFT_BUCKETS_S,
        )
        self.inter_token_s = histogram(
            "moemesh_inter_token_seconds", "From one token of a choice to the next", buckets=_INTER_TOKEN_BUCKETS_S
        )
        self.request_s = histogram(
            "moemesh_request_seconds",
            "From the complete request to the last token of all its choices, of those that were not cut short",
            buckets=_REQUEST_BUCKETS_S,
        )
        self.prompt_tokens = counter("moemesh_prompt_tokens_total", "Tokens of accepted prompts")
        self.completion_tokens = counter("moemesh_completion_tokens_total", "Tokens generated")
        self.cancelled = counter("moemesh_http_requests_cancelled_total", "Requests whose client went away")
        self.abandoned = counter(
            "moemesh_requests_abandoned_total",
            "Resumable requests that were cancelled because no client came back for them in time",
        )
        self.reattached = counter(
            "moemesh_requests_reattached_total", "Clients that came back to a request by its id or key"
        )

    async def shared_text(self) -> bytes:
        """Returns `text`, made once for all who ask in one turn of the event loop, after they have asked: it takes
        milliseconds, for which all others would wait once per question."""
        if self._making is None:
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)

    async def _make(self) -> bytes:
        self._making = None
        return self.text()

    def text(self) -> bytes:
        """Returns everything on the registry, in Prometheus' text format."""
        return generate_latest(self.registry)
