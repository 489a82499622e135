"""What is counted for Prometheus, in a registry of its own."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safesteer.policy import Plan

NAMESPACE = "safesteer"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        seconds = partial(Histogram, namespace=NAMESPACE, registry=self.registry, buckets=SECONDS)
        self.requests = counter("requests", "Requests by endpoint and HTTP status.", ("endpoint", "status"))
        self.tokens = counter("tokens", "Tokens read and written.", ("kind",))
        self.steered = counter("steered_requests", "Requests on which any category acted.")
        self.acted = counter("category_acted", "Requests on which a category acted.", ("category", "gate"))
        self.doses = counter("category_dose", "Sum of the doses that a category added.", ("category",))
        self.refused = counter("refused_steering", "Requests refused for what they asked of steering.")
        self.failed = counter("failed_answers", "Answers that failed after the request was accepted.")
        self.reloads = counter("policy_reloads", "Reloads of the policy file.", ("result",))
        self.seconds = seconds("request_seconds", "Time to the end of an answer.")
        self.first = seconds("first_token_seconds", "Time to the first piece of an answer.")
        self.waiting = Gauge("waiting_requests", "Requests in the queue.", namespace=NAMESPACE, registry=self.registry)

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
