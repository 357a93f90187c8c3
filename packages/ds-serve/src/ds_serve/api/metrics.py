"""What Prometheus reads at `/metrics`.

Names follow those of other servers where they mean the same. Counters that a step changes are read
from the engine when somebody asks, so a step pays nothing for them but its experts' counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ds_serve.api.served import Served
    from ds_serve.engine import StepReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST_EXPERT_SERIES = 4096  # more than that is told by layer alone
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server.

    Args:
        served: the model.
    """

    def __init__(self, served: Served) -> None:
        self._registry = CollectorRegistry()
        made = {"registry": self._registry, "namespace": "ds_serve"}
        self.requests = Counter(
            "requests", "Requests by route, key and status.", ("route", "key", "status"), **made
        )
        self.finished = Counter("answers", "Answers by how they ended.", ("finish_reason",), **made)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS, **made
        )
        self.between_tokens = Histogram(
            "inter_token_latency_seconds", "From token to token.", buckets=_SECONDS, **made
        )
        self.whole = Histogram(
            "request_seconds", "From request to last token.", buckets=_SECONDS, **made
        )
        self.queued = Histogram(
            "queue_seconds", "From request to its first step.", buckets=_SECONDS, **made
        )
        self.step = Histogram("step_seconds", "Of one step.", buckets=_SECONDS, **made)
        self._registry.register(_Engine(served))

    def observe(self, report: StepReport) -> None:
        """Take note of a step."""
        self.step.observe(report.seconds)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """Reads the engine when asked."""

    def __init__(self, served: Served) -> None:
        self._served = served
        c = served.model.config
        self._first = c.first_k_dense_replace
        self._tokens: np.ndarray | None = None  # [M, E]: tokens that each expert got
        self._experts = c.n_routed_experts or 0
        self._counts = {"read": 0, "written": 0, "drafts": 0, "accepted": 0, "steps": 0}
        served.engine.observers.append(self._observe)

    def _observe(self, report: StepReport) -> None:
        self._counts["steps"] += 1
        for name in ("read", "written", "drafts", "accepted"):
            self._counts[name] += getattr(report, name)
        layers = len(report.experts)
        if not layers:
            return
        if self._tokens is None:
            self._tokens = np.zeros([layers, self._experts], np.int64)
        each = report.experts.reshape(layers, -1) + np.arange(layers)[:, None] * self._experts
        counts = np.bincount(each.ravel(), minlength=self._tokens.size)
        self._tokens += counts.reshape(self._tokens.shape)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now."""
        scheduler, counts = self._served.engine.scheduler, self._counts
        pool = scheduler.pool
        gauges = {
            "requests_running": ("Texts in the step.", len(scheduler.running)),
            "requests_waiting": (
                "Texts that wait.",
                max(0, self._served.engine.texts - len(scheduler.running)),
            ),
            "cache_usage_ratio": (
                "Share of the cache's blocks that are held.",
                1 - pool.free / pool.blocks,
            ),
            "cache_tokens": ("Tokens that the cache holds.", self._served.engine.cache_tokens),
            "cache_bytes": ("Memory of the cache.", self._served.engine.steps.cache.nbytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"ds_serve_{name}", text, value)
        counters = {
            "steps": ("Steps done.", counts["steps"]),
            "read_tokens": ("Tokens read: prompts, answers, drafts.", counts["read"]),
            "generated_tokens": ("Tokens written.", counts["written"]),
            "draft_tokens": ("Tokens guessed and tried.", counts["drafts"]),
            "accepted_draft_tokens": ("Of these, right ones.", counts["accepted"]),
            "prompt_tokens": ("Tokens of prompts.", scheduler.prompt_tokens),
            "prefix_cache_hit_tokens": ("Of these, found in the cache.", scheduler.cached_tokens),
            "preemptions": ("Texts that gave up their blocks.", scheduler.preemptions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"ds_serve_{name}", text, value)
        if self._tokens is not None:
            yield from self._load(self._tokens.copy())

    def _load(self, tokens: np.ndarray) -> Iterator[Metric]:
        violation = GaugeMetricFamily(
            "ds_serve_expert_load_max_violation",
            "The busiest expert's load over the mean, less 1.",
            labels=("layer",),
        )
        loads = CounterMetricFamily(
            "ds_serve_expert_tokens", "Tokens that an expert got.", labels=("layer", "expert")
        )
        for layer, row in enumerate(tokens, start=self._first):
            violation.add_metric([str(layer)], row.max() / max(row.mean(), 1e-9) - 1)
            if tokens.size <= _MOST_EXPERT_SERIES:
                for expert, count in enumerate(row):
                    loads.add_metric([str(layer), str(expert)], int(count))
        yield violation
        if tokens.size <= _MOST_EXPERT_SERIES:
            yield loads
