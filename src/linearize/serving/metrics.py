"""What `/metrics` says, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = self._counter("responses", "Responses by path and status.", ("path", "status"))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.resumed_tokens = self._counter("resumed_tokens", "Tokens of prompts that a stored state stood for.")
        self.prefilled_tokens = self._counter("prefilled_tokens", "Tokens of prompts that were read.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens of answers.")
        self.cancelled = self._counter("cancelled_requests", "Prompts whose answers were given up.", ("reason",))
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From the request to the first token of an answer, waiting included."
        )
        self.request_seconds = self._histogram("request_seconds", "From the request to the end of its last answer.")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(f"linearize_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"linearize_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"linearize_{name}", text, registry=self.registry, buckets=SECONDS)
