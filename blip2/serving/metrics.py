"""Numbers for Prometheus. docs/serving.md has a line for each name."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

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
    """What one server counts, in one process or in several."""

    def __init__(self, processes: int = 1) -> None:
        """Begin at zero; several are within `together.metrics_together`."""
        disable_created_metrics()  # else each has a second line that says when it began
        self._processes, self._registry = processes, CollectorRegistry()
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
        registry = CollectorRegistry()
        registry.register(_Now(accepted, load))
        if self._processes > 1:
            MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self._registry) + generate_latest(registry)


class _Now(Collector):
    """What is as it is now, and not counted."""

    def __init__(self, accepted: int, load: Load) -> None:
        share = load.rows_used / load.rows if load.rows else 0
        self._values = (
            ("requests_waiting", "Requests without rows yet.", max(0, accepted - load.running)),
            ("requests_running", "Requests that have rows.", load.running),
            ("rows_used", "Rows of the cache in use.", load.rows_used),
            ("rows", "Rows of the cache.", load.rows),
            ("rows_used_share", "Share of the rows in use.", share),
        )

    def collect(self) -> Iterator[Metric]:
        """As a registry asks for it."""
        for name, described, value in self._values:
            yield GaugeMetricFamily(f"blip2_{name}", described, value)
