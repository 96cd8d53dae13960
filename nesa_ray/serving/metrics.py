"""What an endpoint counts and measures, for Prometheus: exposed by itself, and through Ray's own exporter.

An engine's names are nesa_serve_*, Ray's are ray_nesa_serve_*; all have the label `model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LOOK_EVERY_S = 0.5
_Labelled = Mapping[str, tuple[str, tuple[str, ...]]]  # name -> what it is, its labels

COUNTERS: _Labelled = {
    "requests": ("outputs that ended, by how: stop, length, cancelled or failed", ("finish",)),
    "http_requests": ("HTTP requests answered", ("route", "status")),
    "prompt_tokens": ("tokens of the prompts taken", ()),
    "cached_prompt_tokens": ("those of them that the prefix cache had", ()),
    "output_tokens": ("tokens generated", ()),
    "preemptions": ("sequences that gave up their blocks for others, to be computed again", ()),
}
GAUGES: _Labelled = {
    "running": ("sequences being computed", ()),
    "waiting": ("requests that wait for admission", ()),
    "cache_blocks": ("blocks of the key-value cache", ()),
    "cache_blocks_used": ("blocks that sequences hold", ()),
    "stage_load": ("share of the time in which a stage computed, since it was last looked at", ("stage",)),
}
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_s": (
        "seconds from a request to its first token",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    ),
    "time_per_output_token_s": (
        "seconds of a token after a request's first, on average",
        (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
    ),
    "request_s": ("seconds from a request to its end", (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)),
}


@dataclass(frozen=True)
class Described:
    """What an endpoint tells; `prefix` begins the names."""

    prefix: str
    counters: _Labelled
    gauges: _Labelled
    histograms: Mapping[str, tuple[str, tuple[float, ...]]]


ENGINE = Described("nesa_serve_", COUNTERS, GAUGES, HISTOGRAMS)


class Metrics:
    """One endpoint's.  Thread-safe.  They go to Ray's exporter as well where this process is connected to a cluster."""

    def __init__(self, model: str, described: Described = ENGINE) -> None:
        self._model = {"model": model}
        self._registry = CollectorRegistry()
        self._own: dict[str, Any] = {}
        self._rays: dict[str, Any] = {}
        prefix = described.prefix
        for own, several in ((Counter, described.counters), (Gauge, described.gauges)):
            for name, (about, labels) in several.items():
                self._own[name] = own(prefix + name, about, ("model", *labels), registry=self._registry)
        for name, (about, buckets) in described.histograms.items():
            self._own[name] = Histogram(
                prefix + name, about, ("model",), registry=self._registry, buckets=(*buckets, float("inf"))
            )
        if ray.is_initialized():
            self._rays = _ray_metrics(described)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        self._own[name].labels(**self._model, **labels).inc(amount)
        if self._rays and amount:
            self._rays[name].inc(amount, {**self._model, **labels})

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._own[name].labels(**self._model, **labels).set(value)
        if self._rays:
            self._rays[name].set(value, {**self._model, **labels})

    def observe(self, name: str, value: float) -> None:
        """Adds an observation to a histogram."""
        self._own[name].labels(**self._model).observe(value)
        if self._rays:
            self._rays[name].observe(value, self._model)

    def total(self, name: str) -> float:
        """What a counter has come to, over all labels."""
        return sum(s.value for m in self._own[name].collect() for s in m.samples if s.name.endswith("_total"))

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class StageLoads:
    """Each stage's share of the time in which it computed, between two looks."""

    def __init__(self, stages: int) -> None:
        self.shares = [0.0] * stages
        self._before = [(0.0, 0.0)] * stages

    def see(self, stats: Sequence[Mapping[str, float]]) -> None:
        """A look at every Worker.stats(); one soon after the last, by whomever, changes nothing."""
        now = [(s["busy_s"], s["alive_s"]) for s in stats]
        spans = [(b - b0, a - a0) for (b, a), (b0, a0) in zip(now, self._before, strict=True)]
        if min(alive_s for _, alive_s in spans) >= _LOOK_EVERY_S:
            self.shares = [round(min(1.0, busy_s / alive_s), 3) for busy_s, alive_s in spans]
            self._before = now


def _ray_metrics(described: Described) -> dict[str, Any]:
    from ray.util import metrics

    made: dict[str, Any] = {}
    prefix = described.prefix
    for kind, several in ((metrics.Counter, described.counters), (metrics.Gauge, described.gauges)):
        for name, (about, labels) in several.items():
            made[name] = kind(prefix + name, about, tag_keys=("model", *labels))
    for name, (about, buckets) in described.histograms.items():
        made[name] = metrics.Histogram(prefix + name, about, boundaries=list(buckets), tag_keys=("model",))
    return made
