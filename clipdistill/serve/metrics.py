"""What the service counts about itself, for Prometheus; no query, key or address is among it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOWER = ("model", "tower")
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})


@final
class Metrics:
    """The counters of one service; each service has a registry of its own.

    Labels are bounded: routes are the service's own patterns, models the one or two that it serves.
    """

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._series: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._requests = Counter(
            "clipdistill_requests", "Requests answered.", ["route", "method", "status"], registry=own
        )
        self._seconds = _seconds("request_seconds", "From a request's head to its answer's end.", ["route"], own)
        self._encoding = _seconds("encode_seconds", "Encoding one batch.", _TOWER, own)
        self._batches = Histogram(
            "clipdistill_batch_items", "Texts or pictures encoded together.", _TOWER, buckets=_SIZES, registry=own
        )
        self._waiting = Gauge("clipdistill_waiting_items", "Texts or pictures that wait.", _TOWER, registry=own)
        self._vectors = Gauge("clipdistill_index_vectors", "Rows of the index.", ["model"], registry=own)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answer; a made-up method counts as ``other``, so that strangers cannot add series."""
        self._of(self._requests, route, method if method in _METHODS else "other", str(status)).inc()
        self._of(self._seconds, route).observe(seconds)

    def encoded(self, model: str, tower: str, items: int, seconds: float) -> None:
        """Count one batch."""
        self._of(self._batches, model, tower).observe(items)
        self._of(self._encoding, model, tower).observe(seconds)

    def waiting(self, model: str, tower: str, items: int) -> None:
        """Note how long a queue is."""
        self._of(self._waiting, model, tower).set(items)

    def indexed(self, model: str, vectors: int) -> None:
        """Note how many rows a model's index has."""
        self._vectors.labels(model).set(vectors)

    def _of(self, metric: Any, *labels: str) -> Any:
        """One series of a metric, looked up once: the library's own look-up takes a lock and copies the labels."""
        known = self._series.get((metric, labels))
        if known is None:
            known = self._series[metric, labels] = metric.labels(*labels)
        return known

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)


def _seconds(name: str, what: str, labels: Sequence[str], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"clipdistill_{name}", what, labels, buckets=_SECONDS, registry=registry)
