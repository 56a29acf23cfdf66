"""Numbers for Prometheus. docs/serving.md has a line for each name."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from blip2.serving.engine import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

OUTCOMES = {  # by status
    200: "ok",
    401: "unauthorized",
    429: "busy",
    499: "cancelled",
    503: "unavailable",
    504: "timeout",
}


class Metrics:
    """What one server counts."""

    def __init__(self) -> None:
        """Begin at zero."""
        disable_created_metrics()  # else each has a second line that says when it began
        self._registry = CollectorRegistry()
        within = {"registry": self._registry}
        self.requests = Counter(
            "blip2_requests", "Chat requests by outcome.", ["outcome"], **within
        )
        self.prompt_tokens = Counter("blip2_prompt_tokens", "Tokens read.", **within)
        self.completion_tokens = Counter("blip2_completion_tokens", "Tokens made.", **within)
        self.pictures = Counter(
            "blip2_pictures", "Pictures: looked at, known already, refused.", ["outcome"], **within
        )
        self.first_token = Histogram(
            "blip2_first_token_seconds",
            "From a request's last byte to its first text.",
            buckets=_SECONDS,
            **within,
        )
        self.token = Histogram(
            "blip2_token_seconds",
            "Between tokens of an answer, on average.",
            buckets=_TOKEN_SECONDS,
            **within,
        )
        self.request = Histogram(
            "blip2_request_seconds",
            "From a request's last byte to its answer's.",
            buckets=_SECONDS,
            **within,
        )
        self._waiting = Gauge("blip2_requests_waiting", "Requests without rows yet.", **within)
        self._running = Gauge("blip2_requests_running", "Requests that have rows.", **within)
        self._used = Gauge("blip2_rows_used", "Rows of the cache in use.", **within)
        self._rows = Gauge("blip2_rows", "Rows of the cache.", **within)
        self._share = Gauge("blip2_rows_used_share", "Share of the rows in use.", **within)

    def count(self, status: int) -> None:
        """A chat request is over."""
        other = "bad_request" if status < 500 else "error"
        self.requests.labels(OUTCOMES.get(status, other)).inc()

    def text(self, accepted: int, load: Load) -> bytes:
        """All of it in Prometheus's text format.

        Args:
            accepted: answers that are under way, those whose pictures are being decoded included.
            load: the engines'.
        """
        self._waiting.set(max(0, accepted - load.running))
        self._running.set(load.running)
        self._used.set(load.rows_used)
        self._rows.set(load.rows)
        self._share.set(load.rows_used / load.rows if load.rows else 0)
        return generate_latest(self._registry)
