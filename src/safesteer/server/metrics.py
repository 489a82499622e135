"""What is counted for Prometheus, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safesteer.policy import Plan

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry, "namespace": "safesteer"}
        self.requests = Counter("requests", "Requests by endpoint and HTTP status.", ("endpoint", "status"), **kept)  # type: ignore[arg-type]
        self.tokens = Counter("tokens", "Tokens read and written.", ("kind",), **kept)  # type: ignore[arg-type]
        self.steered = Counter("steered_requests", "Requests on which any category acted.", **kept)  # type: ignore[arg-type]
        self.acted = Counter("category_acted", "Requests on which a category acted.", ("category", "gate"), **kept)  # type: ignore[arg-type]
        self.doses = Counter("category_dose", "Sum of the doses that a category added.", ("category",), **kept)  # type: ignore[arg-type]
        self.refused = Counter("refused_steering", "Requests refused for what they asked of steering.", **kept)  # type: ignore[arg-type]
        self.failed = Counter("failed_answers", "Answers that failed after the request was accepted.", **kept)  # type: ignore[arg-type]
        self.reloads = Counter("policy_reloads", "Reloads of the policy file.", ("result",), **kept)  # type: ignore[arg-type]
        self.seconds = Histogram("request_seconds", "Time to the end of an answer.", buckets=SECONDS, **kept)  # type: ignore[arg-type]
        self.first = Histogram("first_token_seconds", "Time to the first piece of an answer.", buckets=SECONDS, **kept)  # type: ignore[arg-type]
        self.waiting = Gauge("waiting_requests", "Requests in the queue.", **kept)  # type: ignore[arg-type]

    def plan(self, plan: Plan) -> None:
        """Count what acts on a request."""
        if plan.acting:
            self.steered.inc()
        for one in plan.acting:
            self.acted.labels(one.category, one.gate).inc()
            self.doses.labels(one.category).inc(max(0.0, one.dose))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
